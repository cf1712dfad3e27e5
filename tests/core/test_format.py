"""The adapter's file format, byte for byte, as docs/adapter_format.md specifies it."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from core_models import tiny_llama

from so8t_core import SO8TConfig, attach, gates, save_adapter

KEY = "base_model.model.model.layers.1.self_attn.o_proj.lora_so8t.theta"


def test_golden_bytes(tmp_path: Path) -> None:
    model = attach(tiny_llama(), SO8TConfig(layers=[1]))
    (gate,) = gates(model).values()
    with torch.no_grad():
        gate.theta.copy_(torch.arange(4 * 28).reshape(4, 28) / 1024)
    save_adapter(model, tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    header = (
        '{"__metadata__":{"format":"pt"},"' + KEY + '":{"dtype":"F32","shape":[4,28],"data_offsets":[0,448]}}'
    ).encode()
    header += b" " * (-len(header) % 8)
    values = struct.pack("<112f", *(k / 1024 for k in range(112)))
    golden = struct.pack("<Q", len(header)) + header + values
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == golden


def test_golden_config(tmp_path: Path) -> None:
    lora = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"]}
    save_adapter(attach(tiny_llama(), SO8TConfig(layers=[0, -1], init_scale=0.05, lora=lora)), tmp_path / "adapter")
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    ours = {key: fields[key] for key in ("peft_type", "layers", "init_scale", "target", "lora", "inference_mode")}
    assert ours == {
        "peft_type": "SO8T",
        "layers": [0, -1],
        "init_scale": 0.05,
        "target": "o_proj",
        "lora": {"r": 2, "lora_alpha": 6, "target_modules": ["o_proj", "q_proj"]},
        "inference_mode": True,
    }
