"""Faults of the Hugging Face directory: a wrong file in it before the conversion, or a wrong merge in it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from verification.engines.convert import convert
from verification.fault_catalogue.fault import Fault, Plant, steps
from verification.fault_catalogue.models import Healthy
from verification.weight_parity.hypotheses import rotated

Change = Callable[[Path, float], None]


def _converted(change: Change) -> Plant:
    """Change one file in the reference's directory, then convert it with upstream's converter."""

    def plant(pair: Healthy, source: Path, target: Path, strength: float) -> None:
        with tempfile.TemporaryDirectory(prefix="so8t-fault-") as scratch:
            copy = Path(shutil.copytree(pair.reference, Path(scratch) / "hf"))
            change(copy, strength)
            convert(copy, target, model_name=f"tiny-{pair.name}")

    return plant


def _json(name: str, edit: Callable[[dict[str, Any], float], None]) -> Change:
    def change(directory: Path, strength: float) -> None:
        path = directory / name
        value = json.loads(path.read_text(encoding="utf-8"))
        edit(value, strength)
        path.write_text(json.dumps(value), encoding="utf-8")

    return change


def _theta(config: dict[str, Any], strength: float) -> None:
    config["rope_parameters"]["rope_theta"] *= strength


def _no_scaling(config: dict[str, Any], strength: float) -> None:
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]}


def _eps(config: dict[str, Any], strength: float) -> None:
    config["rms_norm_eps"] = strength


def _no_bos(config: dict[str, Any], strength: float) -> None:
    config.pop("add_bos_token")


def _without(name: str) -> Change:
    return lambda directory, strength: (directory / name).unlink()


def _saved(tensor: str, change: Callable[[Healthy, Any, float], Any]) -> Plant:
    """Save the reference with one changed tensor of the middle layer; `target` becomes a directory."""

    def plant(pair: Healthy, source: Path, target: Path, strength: float) -> None:
        shutil.copytree(pair.reference, target, dirs_exist_ok=True)
        name = f"model.layers.{pair.layers // 2}.{tensor}.weight"
        path = next(p for p in target.glob("*.safetensors") if name in load_file(p))
        tensors = load_file(path)
        new = torch.from_numpy(change(pair, tensors[name].float().numpy(), strength)).to(tensors[name].dtype)
        save_file({**tensors, name: new.contiguous()}, path, metadata={"format": "pt"})

    return plant


def _turned(*powers: int) -> Callable[[Healthy, Any, float], Any]:
    def change(pair: Healthy, w: Any, strength: float) -> Any:
        for power in powers:
            w = rotated(w, pair.rotation(pair.layers // 2), transposed=power < 0)
        return w

    return change


def _off_by(pair: Healthy, w: Any, angle: float) -> Any:
    from so8t_core.rotation import exp_so8

    generator = torch.Generator().manual_seed(5)
    return rotated(w, exp_so8(torch.randn(w.shape[1] // 8, 28, generator=generator, dtype=torch.float64) * angle))


def _merge(pair: Healthy, w: Any, strength: float) -> Any:
    assert pair.sources.base is not None
    base = pair.sources.base[f"model.layers.{pair.layers // 2}.mlp.down_proj.weight"]
    return base + strength * (w - base)


O_PROJ, DOWN = "self_attn.o_proj", "mlp.down_proj"
FAULTS = [
    Fault(
        "config.json with another RoPE base",
        "rope",
        _converted(_json("config.json", _theta)),
        ("rope",),
        steps("x {:g}", 0.02, 0.999),
        pair="llama",
    ),
    Fault(
        "config.json without RoPE scaling",
        "rope",
        _converted(_json("config.json", _no_scaling)),
        ("rope_freqs",),
        pair="llama",
    ),
    Fault(
        "config.json with another epsilon",
        "norm",
        _converted(_json("config.json", _eps)),
        ("epsilon",),
        steps("{:g}", 1e-5, 1.01e-6),
        pair="llama",
    ),
    Fault(
        "chat template's file left out",
        "chat template",
        _converted(_without("chat_template.jinja")),
        ("tokenizer.chat_template",),
        pair="phi3",
    ),
    Fault(
        "add_bos_token lost from tokenizer_config.json",
        "BOS and stop",
        _converted(_json("tokenizer_config.json", _no_bos)),
        ("add_bos_token",),
        pair="phi3",
    ),
    Fault(
        "saved without the rotation in one layer",
        "adapter",
        _saved(O_PROJ, _turned(-1)),
        ("o_proj",),
        judged="checkpoint",
    ),
    Fault(
        "saved with the rotation's inverse in one layer",
        "adapter",
        _saved(O_PROJ, _turned(-1, -1)),
        ("o_proj",),
        judged="checkpoint",
    ),
    Fault(
        "saved with one layer's R off by an angle",
        "adapter",
        _saved(O_PROJ, _off_by),
        ("o_proj",),
        steps("{:g} rad", 0.1, 0.01, 0.001, 0.0001),
        real=2,
        judged="checkpoint",
    ),
    Fault(
        "saved with the LoRA's scale ignored in one layer",
        "adapter",
        _saved(DOWN, _merge),
        ("down_proj",),
        steps("x {:g}", 2.828427, 0, 1.1, 1.01),
        judged="checkpoint",
    ),
]
