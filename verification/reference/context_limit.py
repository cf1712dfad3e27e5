"""The longest context at which llama.cpp computes what the reference does: LongRoPE's original length.

A LongRoPE model has two sets of factors. Hugging Face picks one by the length of the text, llama.cpp by the *allocated*
context of a sequence, which it pads to a multiple of 256. Only up to the original length do both take the short ones
for every text; so files are shipped, and served, with no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from verification.gguf.reader import GGUFFile
from verification.logit_parity.run_modes import is_longrope, original_length

PAD = 256  # llama.cpp rounds a sequence's context up to a multiple of this


def limit_of_config(config: Mapping[str, Any]) -> int | None:
    """The limit of a checkpoint, from its config.json; None where there is none."""
    return _padded(original_length(config)) if is_longrope(config) else None


def limit_of_file(file: GGUFFile) -> int | None:
    """The limit of a GGUF file, from its tensors and metadata; None where there is none."""
    if "rope_factors_long.weight" not in file.tensors:
        return None
    return _padded(file.get("rope.scaling.original_context_length"))


def _padded(original: int | None) -> int | None:
    """The largest context that is still within the original length after llama.cpp's padding."""
    return None if original is None else max(original // PAD * PAD, PAD)
