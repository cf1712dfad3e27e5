"""Statistics of a tensor that quantisation hardly changes: its norm and a few random projections.

A projection of W (rows, columns) is u^T W v with signs u, v of +1 or -1; column j of the signs belongs to projection j.
For any E, the mean over random signs of (u^T E v)^2 is ||E||^2 (Frobenius), so the projections of two tensors give the
relative error of one against the other without the tensors: sqrt(mean_j (S'_j - S_j)^2) / ||W||. With 32
projections the estimate of ||E||^2 has a relative standard error of sqrt(2/32) = 25 % for an E like noise, and at most
sqrt(8/32) = 50 % for any E. The signs are the bits of SHAKE-256("so8t rows") and ("so8t columns"): bit j of word i,
from the lowest, belongs to row or column i and projection j; a word has ceil(projections / 8) bytes.
Source: Johnson and Lindenstrauss; Achlioptas 2003.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from verification.gguf.reader import GGUFTensor

Floats = npt.NDArray[np.float64]
_DIGIT = re.compile(r"\d+")
# Largest relative error of a healthy tensor, by stored type. One rounding of F16 is 2^-11 of each weight at most, and
# the reference's statistics come from an F16 file. A block format of b bits has an error of about 1.2 * 2^-b on
# Gaussian weights (Q8_0 0.005, Q4_K 0.07, Q2_K 0.27); the bound of 4 * 2^-b has room for outliers and the estimate.
_OF_FLOATS = {"F64": 2.0**-10, "F32": 2.0**-10, "F16": 2.0**-10, "BF16": 2.0**-7}
_ALMOST_ALL = 0.9  # another tensor of the same norm has an error of sqrt(2)


def projections(tensor: GGUFTensor, width: int) -> tuple[float, Floats]:
    """(Frobenius norm, (width,) projections) of a tensor of any rank; its last axis is the columns."""
    columns = tensor.shape[-1]
    v = _signs("columns", columns, width)
    square, total, row = 0.0, np.zeros(width), 0
    for piece in tensor.pieces():
        values = piece.values().reshape(-1, columns)
        u = _signs("rows", row + len(values), width)[row:]
        square += float(np.vdot(values, values.astype(np.float64)))
        total += ((values @ v) * u).sum(axis=0, dtype=np.float64)
        row += len(values)
    return math.sqrt(square), total


def relative_error(found: Floats, norm: float, wanted: Floats) -> float:
    """Estimated ||W' - W|| / ||W|| from both tensors' projections (W,); infinite if W is zeros and W' is not."""
    distance = math.sqrt(float(np.mean((found.astype(np.float64) - wanted) ** 2)))
    return distance / norm if norm > 0 else math.inf if distance else 0.0


def largest_error(kind: str) -> float:
    """The largest relative error of a tensor of this type that holds the reference's weights."""
    if kind in _OF_FLOATS:
        return _OF_FLOATS[kind]
    bits = _DIGIT.search(kind)
    return min(_ALMOST_ALL, 4 * 2.0 ** -int(bits[0])) if bits else _ALMOST_ALL


@functools.lru_cache(maxsize=64)
def _signs(axis: str, count: int, width: int) -> npt.NDArray[np.float32]:
    size = -(-width // 8)
    words = hashlib.shake_256(f"so8t {axis}".encode()).digest(count * size)
    bits = np.unpackbits(np.frombuffer(words, dtype=np.uint8).reshape(count, size), axis=1, bitorder="little")
    return np.where(bits[:, :width] == 1, np.float32(1), np.float32(-1))


def finite(values: Iterable[float]) -> bool:
    """Whether all statistics are finite, so that they can be stored."""
    return all(math.isfinite(value) for value in values)
