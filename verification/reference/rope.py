"""Computes RoPE scaling as stored in GGUF files from config.json.

llama3: one divisor a frequency in `rope_freqs.weight`, f_i = 1 for wavelengths below original/high, `factor` above
original/low, 1 / ((1 - s)/factor + s) between with s = (original/wavelength - low) / (high - low), wavelength
2 pi theta^(2i/d). LongRoPE: `rope_factors_long/short.weight` as given, and the attention factor
sqrt(1 + ln(s)/ln(original)), s = max/original. linear and yarn have keys only.

A LongRoPE model has two sets of factors. Hugging Face chooses one by the length of the text, llama.cpp by the
*allocated* context of a sequence, padded to a multiple of 256. Both choose the short factors for every text only up to
the original length. So files are shipped and served with at most `limit_of_config` or `limit_of_file` tokens.
Source: llama.cpp's converter and the model families' papers (Llama 3.1, LongRoPE).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from verification.gguf.reader import GGUFFile

Array = npt.NDArray[np.float32]
PAD = 256  # llama.cpp rounds a sequence's context up to a multiple of this
_FIXED = ("default", "linear", "llama3", "yarn", "mrope", "proportional")  # one set of frequencies for every length


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """The global layers' RoPE settings, from any form of config.json; keys rope_theta, rope_type, ..."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    given = given if isinstance(given, dict) else {}
    rope = dict(given.get("full_attention") or (given if "sliding_attention" not in given else {}))
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if rope.get(key) is None and config.get(key) is not None:
            rope[key] = config[key]
    rope.setdefault("rope_type", rope.get("type") or "default")
    rope["rope_type"] = "longrope" if rope["rope_type"] == "su" else str(rope["rope_type"]).lower()
    return rope


def local_theta(config: dict[str, Any]) -> float | None:
    """RoPE base of the sliding-window layers (Gemma-3); None if the config gives none."""
    given = config.get("rope_parameters") or {}
    value = (given.get("sliding_attention") or {}).get("rope_theta", config.get("rope_local_base_freq"))
    return None if value is None else float(value)


def head_dim(config: dict[str, Any]) -> int | None:
    """Channels a head; hidden / heads if config.json does not give them."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    return config.get("head_dim") or (hidden // heads if hidden and heads else None)


def factor_tensors(config: dict[str, Any]) -> dict[str, Array]:
    """Tensors of a GGUF file that come from the config's RoPE scaling, not from a checkpoint tensor.

    Their shape is (rotary dimensions / 2,).
    """
    rope, dim = rope_parameters(config), head_dim(config)
    if rope["rope_type"] == "llama3" and dim:
        return {"rope_freqs.weight": llama3_divisors(rope, dim)}
    if rope.get("long_factor") and rope.get("short_factor"):
        return {
            f"rope_factors_{kind}.weight": np.asarray(rope[f"{kind}_factor"], dtype=np.float32)
            for kind in ("long", "short")
        }
    return {}


def llama3_divisors(rope: dict[str, Any], dim: int) -> Array:
    """(dim/2,) divisors of the RoPE frequencies."""
    # in float32, as in the converter, so that the factors agree to the last bits
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    frequencies = (1.0 / np.power(np.float32(rope.get("rope_theta", 1e4)), exponents)).astype(np.float32)
    factor, low, high = (
        float(rope.get(key, default))
        for key, default in (("factor", 8.0), ("low_freq_factor", 1.0), ("high_freq_factor", 4.0))
    )
    original = float(rope.get("original_max_position_embeddings", 8192))
    wavelength = 2 * math.pi / frequencies.astype(np.float64)
    smooth = (original / wavelength - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(wavelength < original / high, 1.0, np.where(wavelength > original / low, factor, between)).astype(
        np.float32
    )


def attention_factor(config: dict[str, Any]) -> float | None:
    """LongRoPE's scale of the attention logits' inputs; None without LongRoPE."""
    rope = rope_parameters(config)
    original = rope.get("original_max_position_embeddings")
    if rope["rope_type"] != "longrope" or not original or not rope.get("long_factor"):
        return None
    scale = float(config["max_position_embeddings"]) / float(original)
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0


def original_length(config: Mapping[str, Any]) -> int | None:
    """The length that the RoPE was trained for, if the model was stretched beyond it; otherwise None."""
    found = _in_rope(config, "original_max_position_embeddings")
    return int(found) if found else None


def is_longrope(config: Mapping[str, Any]) -> bool:
    """Whether the model has two sets of factors, one for short and one for long texts (Phi-3)."""
    kind = _in_rope(config, "rope_type") or _in_rope(config, "type")
    return str(kind).lower() in ("longrope", "su")


def depends_on_length(config: Mapping[str, Any]) -> bool:
    """Whether a text's length or allocated context can change the frequencies; True for an unknown RoPE type."""
    given = [value for name in ("rope_parameters", "rope_scaling") if isinstance(value := config.get(name), Mapping)]
    nested = [value for settings in given for value in settings.values() if isinstance(value, Mapping)]  # by layer type
    kinds = [settings.get("rope_type") or settings.get("type") or "default" for settings in (*given, *nested)]
    return any(str(kind).lower() not in _FIXED for kind in kinds)


def _in_rope(config: Mapping[str, Any], key: str) -> Any:
    places = [config, config.get("rope_parameters"), config.get("rope_scaling")]
    return next((place[key] for place in places if isinstance(place, Mapping) and place.get(key)), None)


def limit_of_config(config: Mapping[str, Any]) -> int | None:
    """The largest safe context of a checkpoint, from its config.json; None if there is no limit."""
    return _padded(original_length(config)) if is_longrope(config) else None


def limit_of_file(file: GGUFFile) -> int | None:
    """The largest safe context of a GGUF file, from its tensors and metadata; None if there is no limit."""
    if "rope_factors_long.weight" not in file.tensors:
        return None
    return _padded(file.get("rope.scaling.original_context_length"))


def _padded(original: int | None) -> int | None:
    """The largest context that is within the original length after llama.cpp's padding."""
    return None if original is None else max(original // PAD * PAD, PAD)
