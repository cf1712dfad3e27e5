"""Runs this build's llama.cpp quantiser (the "own quantiser") on a few rows, without and with importance matrices.

The maker's matrix is not known, so several are tried: none, two log-normal ones of spread 1 (real matrices have about
1), and one of spread 1.5. An estimate that depends on the matrix is compared with its range over these.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from verification.engines.quantise import WRITTEN, even_matrix, quantised_bytes
from verification.gguf.reader import GGUFTensor
from verification.weight_parity.structure.scale import Scale, group_scales, scale
from verification.weight_parity.structure.shift import Shift, shift

Array = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
SAMPLED = 64  # rows that are quantised with several matrices
SPREADS = (1.0, 1.0, 1.5)  # spreads of the log-normal matrices; real matrices have about 1


@dataclass(frozen=True)
class Own:
    """The result of llama.cpp's quantiser on a few rows with one matrix."""

    error: float  # relative
    scale: Scale
    shift: Shift
    values: Array  # (rows, in)


def own_values(kind: str, W: Array, matrix: Array | None = None) -> Array | None:
    """W (.., in) quantised by llama.cpp and dequantised; None for a type that cannot be written.

    A type that needs a matrix gets a matrix of equal importances if none is given.
    """
    if kind not in WRITTEN or not np.isfinite(W).all():
        return None
    raw = quantised_bytes(W, kind, even_matrix(kind, W.shape) if matrix is None else matrix)
    return None if raw is None else GGUFTensor("", W.shape, kind, raw).values()


def own_spread(kind: str, W: Array) -> list[Own]:
    """llama.cpp's quantiser on rows W (rows, in), first without a matrix; empty for a type that cannot be written."""
    found = []
    for number, spread in enumerate((0.0, *SPREADS)):
        F = own_values(kind, W, log_normal(W.shape[1], spread, number) if spread else None)
        if F is None:
            break
        E = F - W
        norm = float(np.linalg.norm(W)) or 1.0
        found.append(Own(float(np.linalg.norm(E)) / norm, scale(F, E), shift(W, E), F))
        if kind == "Q8_0":  # a matrix does not change this type
            break
    return found


def largest_row_errors(spread: list[Own], W: Array) -> Float64:
    """The largest error norm of each row over the tried matrices, (rows,)."""
    found: Float64 = np.max([np.linalg.norm((one.values - W).astype(np.float64), axis=1) for one in spread], axis=0)
    return found


def largest_group_scale(spread: list[Own], W: Array, *, axis: int, size: int = 1) -> float:
    """The largest |scale of a group - median of all groups| over the tried matrices; W is (out, in)."""
    apart = [group_scales(one.values, one.values - W, axis=axis, size=size)[0] for one in spread]
    return max((float(np.abs(found - np.median(found)).max()) for found in apart), default=0.0)


def log_normal(width: int, spread: float, seed: int) -> Array:
    """A log-normal importance matrix, (width,)."""
    rng = np.random.default_rng(seed)
    return np.exp(np.float32(spread) * rng.standard_normal(width)).astype(np.float32)
