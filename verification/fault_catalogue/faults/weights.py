"""Faults of weights: wrong order, scale, tensor, way of making the file, or numbers out of range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from verification.engines.quantise import quantise, quantised_bytes
from verification.fault_catalogue.edit import (
    edit_tensor,
    permuted,
    poisoned,
    scaled,
    swapped,
    unpermuted,
    without_tensor,
)
from verification.fault_catalogue.fault import Fault, Plant, layer_of, steps
from verification.fault_catalogue.models import Healthy, noise
from verification.gguf.reader import read_gguf
from verification.gguf.writer import Info, Raw
from verification.weight_parity.hypotheses import halves_to_pairs

HEAD = 64  # rows of a head in every pair that these faults use


def _edit(tensor: str, change: Any) -> Plant:
    """Apply `change(values, strength)` to a tensor of the middle layer."""

    def plant(pair: Healthy, source: Path, target: Path, strength: float) -> None:
        edit_tensor(source, target, layer_of(pair, tensor), lambda w: change(w, strength))

    return plant


def _noise(w: Any, strength: float) -> Any:
    return w + np.float32(strength * np.sqrt(np.mean(w**2))) * noise(w.shape, 7)


def _one(w: Any, strength: float) -> Any:
    """Multiply the largest weight by 1 + `strength`."""
    w.reshape(-1)[np.argmax(np.abs(w))] *= np.float32(1 + strength)
    return w


def _heads(w: Any, strength: float) -> Any:
    w[:HEAD], w[HEAD : 2 * HEAD] = w[HEAD : 2 * HEAD].copy(), w[:HEAD].copy()
    return w


def _fused(pair: Healthy, source: Path, target: Path, strength: float) -> None:
    """Exchange the k and v rows in Phi-3's q | k | v."""
    kv = int(pair.checkpoint.config["num_key_value_heads"]) * HEAD

    def change(w: Any) -> Any:
        return np.concatenate([w[: -2 * kv], w[-kv:], w[-2 * kv : -kv]])

    edit_tensor(source, target, layer_of(pair, "attn_qkv.weight"), change)


def every_weight(source: Path, target: Path, change: Any) -> Path:
    """Change every matrix of a file; `change` also gets the matrix's number."""
    raw = Raw.read(source)
    tensors = read_gguf(source).tensors
    for number, info in enumerate(raw.tensors):
        if len(info.dims) > 1:
            tensor = tensors[info.name]
            values = np.ascontiguousarray(change(tensor.values().copy(), number), dtype=np.float32)
            data = quantised_bytes(values, tensor.type)
            assert data is not None
            info.data = data.tobytes()
    return raw.write(target)


def _other_weights(pair: Healthy, source: Path, target: Path, strength: float) -> None:
    """A fine-tune near the reference: independent noise on every matrix, quantised in the same way."""
    middle = target.with_suffix(".float.gguf")

    def change(w: Any, number: int) -> Any:
        return w + np.float32(strength * np.sqrt(np.mean(w**2))) * noise(w.shape, number)

    every_weight(pair.files["F16"], middle, change)
    quantise(middle, target, read_gguf(source).file_type, threads=1)
    middle.unlink()


def _fewer_bits(pair: Healthy, source: Path, target: Path, strength: float) -> None:
    """Round every matrix to a float type with fewer bits of mantissa."""

    def change(w: Any, number: int) -> Any:
        mantissa, exponent = np.frexp(w)
        return np.ldexp(np.round(np.ldexp(mantissa, round(strength))), exponent - round(strength))

    every_weight(source, target, change)


def _retyped(kind: str, tensor: str) -> Plant:
    """Write one tensor in another quantised type, as a mixed recipe or a fallback does."""

    def plant(pair: Healthy, source: Path, target: Path, strength: float) -> None:
        raw, name = Raw.read(source), layer_of(pair, tensor)
        data = quantised_bytes(pair.opened["F16"].tensors[name].values(), kind)
        assert data is not None
        for info in raw.tensors:
            if info.name == name:
                info.kind, info.data = int(GGMLQuantizationType[kind]), data.tobytes()
        raw.write(target)

    return plant


def _file_type(pair: Healthy, source: Path, target: Path, strength: float) -> None:
    raw = Raw.read(source)
    raw.keys["general.file_type"] = raw.keys["general.file_type"][0], 15
    raw.write(target)


def _head(pair: Healthy, source: Path, target: Path, strength: float) -> None:
    """Give a tied model a separate head, as after merging an adapter into the embedding."""
    raw = Raw.read(source)
    embedding = read_gguf(source).tensors["token_embd.weight"]
    values = _noise(embedding.values().copy(), strength).astype(np.float16)
    raw.tensors.insert(1, Info("output.weight", [values.shape[1], values.shape[0]], 1, values.tobytes()))
    raw.write(target)


def _rolled(pair: Healthy, source: Path, target: Path, strength: float) -> None:
    edit_tensor(source, target, "token_embd.weight", lambda w: np.roll(w, round(strength), axis=0))


def _poison(value: float) -> Plant:
    def plant(pair: Healthy, source: Path, target: Path, strength: float) -> None:
        poisoned(source, target, layer_of(pair, "ffn_up.weight"), value)

    return plant


def _tensors_of(*names: str) -> Plant:
    def plant(pair: Healthy, source: Path, target: Path, strength: float) -> None:
        one, other = (layer_of(pair, name) if "blk" not in name else name for name in names)
        swapped(source, target, one, other)

    return plant


QK = ("attn_q", "attn_k")
GAIN = steps("x {:.9g}", 1.1, 1.01, 1.001, 1.0001)
SHARE = steps("{:g} of its size", 0.1, 0.01, 0.001, 0.0001)
FAULTS = [
    Fault(
        "q rows not permuted",
        "attention layout",
        lambda pair, s, t, x: unpermuted(s, t, layer_of(pair, "attn_q.weight"), HEAD),
        ("attn_q",),
    ),
    Fault(
        "k rows permuted twice",
        "attention layout",
        lambda pair, s, t, x: permuted(s, t, layer_of(pair, "attn_k.weight"), HEAD),
        ("attn_k",),
        level="Q4_K_M",
    ),
    Fault("two heads exchanged", "attention layout", _edit("attn_q.weight", _heads), ("attn_q",)),
    Fault("k and v rows exchanged in a fused tensor", "attention layout", _fused, ("attn_qkv",), pair="phi3"),
    Fault(
        "q permuted although the family needs none",
        "attention layout",
        _edit("attn_q.weight", lambda w, x: halves_to_pairs(w, 128)),
        ("attn_q",),
        pair="gemma2",
    ),
    Fault(
        "untied head left out",
        "embedding and head",
        lambda pair, s, t, x: without_tensor(s, t, "output.weight"),
        ("output.weight",),
        pair="llama",
    ),
    Fault(
        "tied head written with other values",
        "embedding and head",
        _head,
        ("output.weight",),
        SHARE,
        real=1,
        pair="smollm3",
    ),
    Fault("embedding rows shifted", "embedding and head", _rolled, ("token_embd",), steps("by {:g}", 1)),
    Fault("a weight is NaN", "number range", _poison(np.nan), ("ffn_up",)),
    Fault("a weight overflowed to infinity", "number range", _poison(np.inf), ("ffn_up",)),
    Fault("a weight clipped at F16's end", "number range", _poison(65504.0), ("ffn_up",)),
    Fault(
        "tensors of two layers exchanged",
        "weights",
        _tensors_of("ffn_down.weight", "blk.0.ffn_down.weight"),
        ("ffn_down",),
    ),
    Fault(
        "gate and up exchanged",
        "weights",
        _tensors_of("ffn_gate.weight", "ffn_up.weight"),
        ("ffn_gate", "ffn_up"),
        level="Q4_K_M",
    ),
    Fault(
        "v_proj scaled",
        "weights",
        lambda pair, s, t, x: scaled(s, t, layer_of(pair, "attn_v.weight"), x),
        ("attn_v",),
        GAIN,
        real=1,
    ),
    Fault(
        "noise on one tensor",
        "weights",
        _edit("ffn_gate.weight", _noise),
        ("ffn_gate",),
        steps("{:g} of its size", 0.1, 0.01, 0.001, 0.0001, 1e-6),
        real=1,
    ),
    Fault(
        "noise on one tensor", "weights", _edit("ffn_gate.weight", _noise), ("ffn_gate",), SHARE, real=1, level="Q4_K_M"
    ),
    Fault(
        "one weight changed",
        "weights",
        _edit("ffn_up.weight", _one),
        ("ffn_up",),
        steps("+ {:g} of it", 1, 0.1, 0.01, 0.001, 0.0001),
        real=1,
    ),
    Fault(
        "a bias left out",
        "weights",
        lambda pair, s, t, x: without_tensor(s, t, layer_of(pair, "attn_q.bias")),
        ("attn_q.bias",),
        pair="llama",
    ),
    Fault("a bias of zeros", "weights", _edit("attn_q.bias", lambda w, x: w * 0), ("attn_q.bias",), pair="llama"),
    Fault(
        "quantised from another finetune",
        "other source",
        _other_weights,
        ("tensors",),
        # 0.01 adds 1 % to the error of a 4-bit type: a user cannot notice that, and the file is judged healthy
        steps("{:g} of the weights", 0.1, 0.01, 0.001, 0.0001),
        real=0,
        level="Q4_K_M",
    ),
    Fault(
        "quantised from another finetune",
        "other source",
        _other_weights,
        ("tensors",),
        steps("{:g} of the weights", 0.01, 0.001, 0.0001, 1e-5),
        real=0,
        level="Q8_0",
    ),
    Fault(
        "weights went through a smaller float type",
        "other source",
        _fewer_bits,
        ("tensors",),
        steps("{:g} bits", 4, 5, 6, 7, 8),
        real=0,
    ),
    Fault("a quantised tensor in a float file", "types", _retyped("Q8_0", "ffn_up.weight"), ("ffn_up",)),
    Fault("file type says another type", "types", _file_type, ("file_type",)),
]
