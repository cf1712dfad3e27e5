"""Faults of merging: a rotation or a LoRA that is missing, doubled, inverted, or slightly different."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from verification.engines.quantise import quantise, quantised_bytes
from verification.fault_catalogue.edit import transposed
from verification.fault_catalogue.fault import Fault, Plant, layer_of, steps
from verification.fault_catalogue.models import Healthy
from verification.gguf.reader import read_gguf
from verification.gguf.writer import Raw
from verification.weight_parity.expected import expected_values, inventory
from verification.weight_parity.hypotheses import rotated

OUTPUT = "attn_output.weight"


def _from_float(pair: Healthy, source: Path, target: Path, changes: dict[str, Any]) -> None:
    """Change tensors before the quantisation: `changes` maps names to functions of the float values."""
    kind = read_gguf(source).file_type
    raw = Raw.read(source)
    for info in raw.tensors:
        if info.name in changes:
            values = changes[info.name](pair.opened["F16"].tensors[info.name].values().copy())
            if kind != "F16":  # the rounding of a conversion to F16 in between
                values = np.asarray(values, dtype=np.float16).astype(np.float32)
            data = quantised_bytes(
                np.ascontiguousarray(values, dtype=np.float32), pair.opened[kind].tensors[info.name].type
            )
            assert data is not None
            info.data = data.tobytes()
    raw.write(target)


def _off_by(pair: Healthy, source: Path, target: Path, angle: float) -> None:
    """Multiply one layer's R by a random rotation with about this angle in every plane."""
    from so8t_core.rotation import exp_so8

    def turn(w: Any) -> Any:
        generator = torch.Generator().manual_seed(5)
        theta = torch.randn(w.shape[1] // 8, 28, generator=generator, dtype=torch.float64) * angle
        return rotated(w, exp_so8(theta))

    _from_float(pair, source, target, {layer_of(pair, OUTPUT): turn})


def _with_R(*powers: int) -> Plant:
    """Multiply the baked o_proj of one layer by R to the powers."""

    def plant(pair: Healthy, source: Path, target: Path, strength: float) -> None:
        R = pair.rotation(pair.layers // 2)

        def turn(w: Any) -> Any:
            for power in powers:
                w = rotated(w, R, transposed=power < 0)
            return w

        _from_float(pair, source, target, {layer_of(pair, OUTPUT): turn})

    return plant


def _with_fold(tensor: str, *powers: int) -> Plant:
    """Multiply the baked `tensor` of one layer by the adapter's map of its input, to the powers."""

    def plant(pair: Healthy, source: Path, target: Path, strength: float) -> None:
        name = layer_of(pair, tensor)
        fold = pair.sources.rotations[inventory(pair.checkpoint, pair.opened["F16"]).source_of[name]]

        def turn(w: Any) -> Any:
            for power in powers:
                w = rotated(w, fold, transposed=power < 0)
            return w

        _from_float(pair, source, target, {name: turn})

    return plant


def _every_target() -> list[Fault]:
    """The folds of every linear input, in an architecture with separate and in one with fused projections."""
    targets = {
        "llama rotated": ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
        "phi3 rotated": ("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    }
    kinds = {"not rotated": (-1,), "rotated back": (-1, -1), "rotated twice": (1,)}
    return [
        Fault(
            f"{tensor} of one layer {kind}",
            "adapter",
            _with_fold(f"{tensor}.weight", *powers),
            (tensor,),
            pair=pair,
            quick=number == place % len(kinds),  # one of the three is in the short run
        )
        for pair, names in targets.items()
        for place, tensor in enumerate(names)
        for number, (kind, powers) in enumerate(kinds.items())
    ]


def _wrong_side(pair: Healthy, source: Path, target: Path, strength: float) -> None:
    R = pair.rotation(pair.layers // 2)

    def turn(w: Any) -> Any:
        bare = rotated(w, R, transposed=True)
        return np.ascontiguousarray(rotated(np.ascontiguousarray(bare.T), R, transposed=True).T)

    _from_float(pair, source, target, {layer_of(pair, OUTPUT): turn})


def _change_scaled(tensor: str, *, everywhere: bool = False) -> Plant:
    """base + strength * (reference - base): a merge with another scale, no merge (0), or a double merge (2)."""

    def plant(pair: Healthy, source: Path, target: Path, strength: float) -> None:
        origin, file = pair.sources.base, pair.opened["F16"]
        assert origin is not None
        found = inventory(pair.checkpoint, file)
        names = [f"blk.{i}.{tensor}" for i in range(pair.layers)] if everywhere else [layer_of(pair, tensor)]

        def make(name: str) -> Any:
            base = expected_values(name, found.source_of[name], origin, file.architecture)
            return lambda w: base + np.float32(strength) * (w - base)

        _from_float(pair, source, target, {name: make(name) for name in names})

    return plant


def _base_converted(pair: Healthy, source: Path, target: Path, strength: float) -> None:
    """The base's file under the reference's name."""
    base, file = pair.sources.base, pair.opened["F16"]
    assert base is not None
    found, middle = inventory(pair.checkpoint, file), target.with_suffix(".float.gguf")
    raw = Raw.read(pair.files["F16"])
    for info in raw.tensors:
        values = expected_values(info.name, found.source_of[info.name], base, file.architecture)
        info.data = values.astype(np.float16 if len(info.dims) > 1 else np.float32).tobytes()
    raw.write(middle)
    quantise(middle, target, read_gguf(source).file_type, threads=1)
    middle.unlink()


ANGLES = steps("{:g} rad", 0.1, 0.01, 0.001, 0.0001, 0.00001)
FAULTS = [
    Fault("one layer's R off by an angle", "adapter", _off_by, ("attn_output",), ANGLES, real=2, logits=True),
    Fault("one layer's R off by an angle", "adapter", _off_by, ("attn_output",), ANGLES, real=2, level="Q8_0"),
    Fault("one layer's R off by an angle", "adapter", _off_by, ("attn_output",), ANGLES, real=2, level="Q4_K_M"),
    Fault("one layer not rotated", "adapter", _with_R(-1), ("attn_output",)),
    Fault("one layer not rotated", "adapter", _with_R(-1), ("attn_output",), level="Q4_K_M"),
    Fault("one layer rotated back", "adapter", _with_R(-1, -1), ("attn_output",)),
    Fault("one layer rotated twice", "adapter", _with_R(1), ("attn_output",)),
    Fault("rotated on the output's side", "adapter", _wrong_side, ("attn_output",)),
    Fault(
        "o_proj transposed", "adapter", lambda pair, s, t, x: transposed(s, t, layer_of(pair, OUTPUT)), ("attn_output",)
    ),
    Fault(
        "the base converted, nothing merged", "adapter", _base_converted, ("attn_output", "ffn_down"), level="Q4_K_M"
    ),
    Fault(
        "LoRA's scale wrong",
        "adapter",
        _change_scaled("ffn_down.weight", everywhere=True),
        ("ffn_down",),
        steps("x {:g}", 2.828427, 1.1, 1.01, 1.001),
        real=0,
    ),
    Fault(
        "LoRA's scale wrong in one layer",
        "adapter",
        _change_scaled("ffn_down.weight"),
        ("ffn_down",),
        steps("x {:g}", 2.828427, 1.1, 1.01, 1.001),
        real=0,
        level="Q8_0",
    ),
    Fault(
        "LoRA merged twice in one layer",
        "adapter",
        _change_scaled("ffn_down.weight"),
        ("ffn_down",),
        steps("x {:g}", 2),
    ),
    Fault("LoRA missing in one layer", "adapter", _change_scaled("ffn_down.weight"), ("ffn_down",), steps("x {:g}", 0)),
    *_every_target(),
]
