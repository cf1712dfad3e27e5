"""Faults of keys that change the arithmetic: RoPE, norms, windows and soft-caps, shapes, engine settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from verification.fault_catalogue.edit import edit_tensor, set_metadata, shifted, swapped, without_tensor
from verification.fault_catalogue.fault import Fault, Plant, layer_of, steps
from verification.fault_catalogue.models import Healthy
from verification.gguf.reader import read_gguf


def _scaled_key(key: str) -> Plant:
    """A number of the architecture times the strength."""

    def plant(pair: Healthy, source: Path, target: Path, strength: float) -> None:
        full, value = _full(source, key)
        scaled = value * strength
        set_metadata(source, target, {full: float(scaled) if isinstance(value, float) else round(scaled)})

    return plant


def _key(key: str, value: Any = None, *, own: bool = True) -> Plant:
    """A key set to `value`, or removed."""

    def plant(pair: Healthy, source: Path, target: Path, strength: float) -> None:
        set_metadata(source, target, {_full(source, key)[0] if own else key: value})

    return plant


def _full(source: Path, key: str) -> tuple[str, Any]:
    file = read_gguf(source)
    return f"{file.architecture}.{key}", file.get(key)


def _set_to_strength(key: str) -> Plant:
    def plant(pair: Healthy, source: Path, target: Path, strength: float) -> None:
        full, value = _full(source, key)
        new = None if strength == 0 else float(strength) if isinstance(value, float) else round(strength)
        set_metadata(source, target, {full: new})

    return plant


def _linear_scaling(pair: Healthy, source: Path, target: Path, strength: float) -> None:
    prefix = read_gguf(source).architecture
    keys = {f"{prefix}.rope.scaling.type": "linear", f"{prefix}.rope.scaling.factor": float(strength)}
    set_metadata(source, target, keys)


def _factors(pair: Healthy, source: Path, target: Path, strength: float) -> None:
    """All ones for 0, else the last divisor times the strength."""

    def change(values: Any) -> Any:
        if strength == 0:
            return np.ones_like(values)
        values[-1] *= np.float32(strength)
        return values

    edit_tensor(source, target, "rope_freqs.weight", change)


def _norm_gain(pair: Healthy, source: Path, target: Path, strength: float) -> None:
    edit_tensor(source, target, layer_of(pair, "attn_norm.weight"), lambda w: w * np.float32(strength))


def _norm_offset(pair: Healthy, source: Path, target: Path, strength: float) -> None:
    shifted(source, target, layer_of(pair, "attn_norm.weight"), strength)


EPS = "attention.layer_norm_rms_epsilon"
FAULTS = [
    Fault(
        "RoPE base of another model",
        "rope",
        _scaled_key("rope.freq_base"),
        ("rope.freq_base",),
        steps("x {:.7g}", 0.1, 1.1, 1.01, 1.001, 1.000001),
    ),
    Fault("RoPE base not written", "rope", _key("rope.freq_base"), ("rope.freq_base",)),
    Fault(
        "linear RoPE scaling that the model has not",
        "rope",
        _linear_scaling,
        ("rope.scaling",),
        steps("factor {:g}", 4, 2, 1.1, 1.001),
        real=1,
    ),
    Fault(
        "half of the head's channels turned",
        "rope",
        _scaled_key("rope.dimension_count"),
        ("rope.dimension_count",),
        steps("x {:g}", 0.5),
    ),
    Fault(
        "llama3's RoPE factors left out",
        "rope",
        lambda pair, s, t, x: without_tensor(s, t, "rope_freqs.weight"),
        ("rope_freqs",),
        pair="llama",
    ),
    Fault(
        "llama3's RoPE factors wrong",
        "rope",
        _factors,
        ("rope_freqs",),
        (*steps("all 1", 0), *steps("last x {:.7g}", 1.1, 1.001, 1.0001, 1.000001)),
        pair="llama",
    ),
    Fault(
        "LongRoPE's attention factor wrong",
        "rope",
        _scaled_key("rope.scaling.attn_factor"),
        ("attn_factor",),
        steps("x {:.7g}", 0.9486833, 1.01, 1.0001, 1.000001),
        pair="phi3",
    ),
    Fault(
        "LongRoPE's long and short factors exchanged",
        "rope",
        lambda pair, s, t, x: swapped(s, t, "rope_factors_long.weight", "rope_factors_short.weight"),
        ("rope_factors",),
        pair="phi3",
    ),
    Fault(
        "LongRoPE's original length wrong",
        "rope",
        _scaled_key("rope.scaling.original_context_length"),
        ("original_context_length",),
        steps("x {:g}", 2, 1.01),
        pair="phi3",
    ),
    Fault(
        "norm's epsilon of another model",
        "norm",
        _set_to_strength(EPS),
        (EPS,),
        steps("{:.9g}", 1e-3, 1e-4, 2e-6, 1.01e-5, 1.0001e-5, 1.000001e-5, 1.00000001e-5),
        real=2,
    ),
    Fault(
        "norm's gain off",
        "norm",
        _norm_gain,
        ("attn_norm",),
        steps("x {:.9g}", 1.01, 1.001, 1.0001, 1.00001, 1.00000001),
    ),
    Fault(
        "Gemma's norm + 1 applied twice",
        "norm",
        _norm_offset,
        ("attn_norm",),
        steps("+ {:g}", 1, 0.1, 0.01, 0.001, 1e-5),
        pair="gemma2",
    ),
    Fault("Gemma's norm + 1 missing", "norm", _norm_offset, ("attn_norm",), steps("{:g}", -1), pair="gemma2"),
    Fault(
        "pre- and post-norm exchanged",
        "norm",
        lambda pair, s, t, x: swapped(s, t, layer_of(pair, "attn_norm.weight"), layer_of(pair, "ffn_norm.weight")),
        ("attn_norm", "ffn_norm"),
        pair="gemma2",
    ),
    Fault(
        "final soft-cap missing",
        "window and soft-cap",
        _key("final_logit_softcapping"),
        ("final_logit_softcapping",),
        pair="gemma2",
    ),
    Fault(
        "attention soft-cap wrong",
        "window and soft-cap",
        _scaled_key("attn_logit_softcapping"),
        ("attn_logit_softcapping",),
        steps("x {:.7g}", 0.5, 1.1, 1.001, 1.000001),
        pair="gemma2",
    ),
    Fault(
        "sliding window wrong",
        "window and soft-cap",
        _scaled_key("attention.sliding_window"),
        ("attention.sliding_window",),
        steps("x {:.4g}", 8, 2, 1.004),
        real=1,
        pair="gemma2",
    ),
    Fault(
        "context longer than the model's",
        "shape",
        _scaled_key("context_length"),
        ("context_length",),
        steps("x {:.4g}", 32, 4, 1.001),
        real=1,
    ),
    Fault(
        "heads counted wrong",
        "shape",
        _scaled_key("attention.head_count"),
        ("head_count", "head_count_kv"),
        steps("x {:g}", 2),
        pair="llama",
    ),
    Fault(
        "number of layers wrong",
        "shape",
        lambda pair, s, t, x: set_metadata(s, t, {_full(s, "block_count")[0]: pair.layers - round(x)}),
        ("block_count",),
        steps("- {:g}", 1),
        pair="llama",
    ),
    Fault(
        "a sampling setting nobody asked for",
        "engine settings",
        lambda pair, s, t, x: set_metadata(s, t, {"general.sampling.temp": float(x)}),
        ("general.sampling",),
        steps("temperature {:g}", 2.0, 0.81),
    ),
    Fault("a key of another family", "engine settings", _key("rescale_every_n_layers", 1), ("rescale_every_n_layers",)),
    Fault(
        "a soft-cap that the model has not",
        "window and soft-cap",
        _key("attn_logit_softcapping", 30.0),
        ("attn_logit_softcapping",),
    ),
]
