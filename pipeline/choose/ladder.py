"""The file types to compare, ranked by size and weight error before any logit is computed.

The weight error of a file is sqrt(sum ||W' - W||^2 / sum ||W||^2) over its tensors, against the F16 file it was made
from. A type is dominated and left out when another type is no larger and has a clearly smaller weight error. KLD
follows the squared weight error only roughly: on SmolLM2 their ratio differed by up to 1.77 between types of similar
size. So an error is clearly larger from sqrt(1.77) = 1.33 times the other error on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from so8t_core.errors import InputError
from verification.engines.quantise import type_number
from verification.gguf.reader import GGUFFile, read_gguf

TYPES = (
    *("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_0"),
    *("IQ4_NL", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K"),
)  # llama.cpp makes these types without an importance matrix

CLEARLY = 1.33  # times the weight error of a smaller file: measured, see above


class Rung(BaseModel):
    """One file of the ladder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    path: Path
    bytes: int
    weight_error: float


def check_types(types: Sequence[str]) -> list[str]:
    """The names of known types in capitals, each once.

    Raises:
        InputError: an unknown type, or no type.
    """
    found = list(dict.fromkeys(kind.strip().upper() for kind in types if kind.strip()))
    for kind in found:
        type_number(kind)
    if not found:
        raise InputError(f"--types names no type; e.g. {','.join(TYPES[:3])}")
    return found


def weight_error(file: GGUFFile, source: GGUFFile) -> float:
    """Relative error of all weights together; infinite where a tensor is missing or not finite."""
    wrong = total = 0.0
    for name, tensor in source.tensors.items():
        other = file.tensors.get(name)
        if other is None or other.shape != tensor.shape:
            return math.inf
        for a, b in zip(tensor.pieces(), other.pieces(), strict=True):
            values = a.values()
            wrong += float(np.sum((b.values() - values) ** 2, dtype=np.float64))
            total += float(np.sum(values**2, dtype=np.float64))
    error = math.sqrt(wrong / total) if total else math.inf
    return error if math.isfinite(error) else math.inf


def rung(kind: str, path: Path, source: GGUFFile) -> Rung:
    """A file with its size and weight error."""
    return Rung(kind=kind, path=path, bytes=path.stat().st_size, weight_error=weight_error(read_gguf(path), source))


def undominated(rungs: Sequence[Rung], *, max_size: int | None = None) -> list[Rung]:
    """The rungs to measure, from small to large: at most `max_size`, and not clearly worse than a smaller rung.

    Raises:
        InputError: every file is larger than `max_size`.
    """
    within = [one for one in rungs if max_size is None or one.bytes <= max_size]
    if not within:
        least = min(rungs, key=lambda one: one.bytes)
        raise InputError(f"--max-size is {max_size} bytes, the smallest file, {least.kind}, has {least.bytes}")
    found: list[Rung] = []
    for one in sorted(within, key=lambda one: (one.bytes, one.weight_error)):
        twin = any((other.bytes, other.weight_error) == (one.bytes, one.weight_error) for other in found)
        best = min((other.weight_error for other in found), default=math.inf)
        if not found or (one.weight_error < CLEARLY * best and not twin):
            found.append(one)
    return found
