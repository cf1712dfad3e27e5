"""The adapter's file format, byte for byte, as docs/adapter_format.md specifies it."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from core_models import logits, tiny_llama
from peft import PeftModel

from so8t_core import InputError, SO8TConfig, attach, gates, load_adapter, save_adapter

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


def test_golden_names_and_types_of_every_form(tmp_path: Path) -> None:
    """One rotation for q, k and v; scale, second rotation, its permutation and the earlier product beside it."""
    config = SO8TConfig(layers=[1], targets=["q_proj", "k_proj", "v_proj"], scale="channel", shuffle=True)
    config.accumulate = True
    model = attach(tiny_llama(), config)
    save_adapter(model, tmp_path / "adapter")
    data = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    root = "base_model.model.model.layers.1.self_attn.q_proj.lora_so8t."
    assert {
        key.removeprefix(root): (entry["dtype"], entry["shape"]) for key, entry in header.items() if root in key
    } == {
        "theta": ("F32", [4, 28]),
        "log_scale": ("F32", [32]),
        "permutation": ("I64", [32]),
        "shuffled_theta": ("F32", [4, 28]),
        "accumulated": ("F64", [4, 8, 8]),
        "shuffled_accumulated": ("F64", [4, 8, 8]),
    }
    assert len(header) == 7  # and the metadata: k and v have no tensor of their own
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    attention = "model.layers.1.self_attn."
    assert fields["shared"] == {f"{attention}q_proj": [f"{attention}k_proj", f"{attention}v_proj"]}


def test_format_1_is_read(tmp_path: Path) -> None:
    """An adapter as the first version wrote it: `target`, and none of the newer keys."""
    model = attach(tiny_llama(), SO8TConfig(layers=[1], init_scale=0.3, targets=["down_proj"]))
    save_adapter(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    for key in ("targets", "share", "scale", "shuffle", "accumulate", "shared", "format_version"):
        del fields[key]
    path.write_text(json.dumps(fields | {"target": "down_proj"}), encoding="utf-8")
    assert torch.equal(logits(load_adapter(tiny_llama(), tmp_path / "adapter")), logits(model))
    through_peft = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
    assert torch.equal(logits(through_peft), logits(model))
    path.write_text(json.dumps(fields | {"format_version": 3}), encoding="utf-8")
    with pytest.raises(InputError, match="format_version is 3, this SO8T reads 1 to 2"):
        load_adapter(tiny_llama(), tmp_path / "adapter")


def test_golden_config(tmp_path: Path) -> None:
    lora = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"]}
    save_adapter(attach(tiny_llama(), SO8TConfig(layers=[0, -1], init_scale=0.05, lora=lora)), tmp_path / "adapter")
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    peft = {"auto_mapping", "base_model_name_or_path", "peft_version", "revision", "task_type", "target_modules"}
    assert {key: value for key, value in fields.items() if key not in peft} == {
        "peft_type": "SO8T",
        "layers": [0, -1],
        "init_scale": 0.05,
        "target": None,
        "targets": ["o_proj"],
        "share": True,
        "shared": {},
        "scale": "none",
        "shuffle": False,
        "accumulate": False,
        "format_version": 2,
        "lora": {"r": 2, "lora_alpha": 6, "target_modules": ["o_proj", "q_proj"]},
        "inference_mode": True,
    }
