"""Bounds for quantised blocks that differ from the oracle's: differences that another build of llama.cpp explains.

If a build contracts a multiplication and an addition (arm64), the quantiser's float32 sums change in the last bit. In a
direct type (scale from the extremes, then codes), a scale may then change by its last float16 bit, or a code by one. In
a search type (K, IQ, or any with an imatrix), the search may find another scale of nearly the same error. Bounds:
  direct:  |scale bits - oracle's| <= 1 and |value - oracle's value| <= one step + the scale's last bit;
  search:  rms(value - w) <= c rms(oracle's value - w) + 2^-10 rms(oracle's value), w the weights that were quantised.
A tensor is within bounds if all its blocks are, and if no more blocks differ than contraction can change.
Measured on Gaussian weights, llama.cpp b11434 with and without contraction: error ratios up to 1.11 (256 values) and
1.31 (32 values), shares of blocks up to 0.27 Q2_K, 0.08 Q4_K, 0.37 Q5_K, 0.03 others, 0.0007 direct; a rotation by
1e-3 rad gives 0.57, 0.68, 0.92, 0.22 and 0.43. Weights on a coarser grid (a dequantised model) have ties everywhere and
may exceed the bounds: such a tensor from a contracting build is judged by its errors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from verification.gguf.reader import GGUFTensor

Array = npt.NDArray[np.float64]
Raw = npt.NDArray[np.uint8]

# byte offsets of a block's float16 scale (and minimum); whether an imatrix makes it a search type
_DIRECT: dict[str, tuple[tuple[int, ...], bool]] = {
    "Q8_0": ((0,), False),
    "Q4_0": ((0,), True),
    "Q5_0": ((0,), True),
    "Q4_1": ((0, 2), True),
    "Q5_1": ((0, 2), True),
    "TQ1_0": ((52,), False),
    "TQ2_0": ((64,), False),
}
# largest share of blocks that may differ; these three types search over scale and minimum and have many near ties
_SHARES_WITHOUT_IMATRIX = {"Q2_K": 0.40, "Q4_K": 0.20, "Q5_K": 0.60}
_SHARE_SEARCH, _SHARE_DIRECT = 0.10, 0.01
_SPREAD = 4.0  # standard deviations by which a small tensor may exceed its share
LAST_BIT = 2.0**-10  # largest relative size of a float16's last bit
_BATCH = 1 << 14  # blocks dequantised at a time


@dataclass(frozen=True)
class Held:
    """The difference between one tensor's blocks and the oracle's."""

    name: str
    type: str
    blocks: int
    differ: int  # blocks whose bytes differ
    allowed: int  # largest number of blocks that may differ by another build
    beyond: int  # blocks outside their type's bound
    last_bit: int  # differing blocks whose values stay within the scale's last bit
    largest: float  # largest |value - oracle's|, relative to the rms of its block
    worst_ratio: float  # largest rms error, relative to the oracle's

    @property
    def within(self) -> bool:
        return self.beyond == 0 and self.differ <= self.allowed

    def __str__(self) -> str:
        return (
            f"{self.name} ({self.type}): {self.differ} of {self.blocks} blocks differ ({self.allowed} may, "
            f"{self.last_bit} in the scale's last bit only), {self.beyond} beyond the type's bound, largest difference "
            f"{self.largest:.2g} of the block's rms, error up to {self.worst_ratio:.3g} times the oracle's"
        )


def hold(mine: GGUFTensor, twin: Raw, source: npt.NDArray[np.float32], *, imatrix: bool) -> Held:
    """Compare a tensor's differing blocks with its type's bounds.

    Args:
        mine: the candidate's quantised tensor.
        twin: the bytes that the quantiser gives at the same type.
        source: the values that `twin` was quantised from.
        imatrix: the oracle was made with an importance matrix.
    """
    kind = GGMLQuantizationType[mine.type]
    values, size = GGML_QUANT_SIZES[kind]
    a, b = mine.raw.reshape(-1, size), twin.reshape(-1, size)
    rows = np.flatnonzero((a != b).any(axis=1))
    weights = source.reshape(-1, values)
    beyond = last_bit = 0
    largest = worst = 0.0
    for start in range(0, len(rows), _BATCH):
        some = rows[start : start + _BATCH]
        own, other = (dequantize(np.ascontiguousarray(x[some]), kind).astype(np.float64) for x in (a, b))
        found = _blocks(own, other, weights[some].astype(np.float64))
        if not np.isfinite(own).all():
            beyond += int((~np.isfinite(own).all(axis=1)).sum())
        within = _direct(mine.type, a[some], b[some], own, other) if _is_direct(mine.type, imatrix) else found.within
        beyond += int((~within & np.isfinite(own).all(axis=1)).sum())
        last_bit += int(found.last_bit.sum())
        largest, worst = max(largest, float(found.largest.max())), max(worst, float(found.ratio.max()))
    allowed = _allowed(mine.type, len(a), imatrix)
    return Held(mine.name, mine.type, len(a), len(rows), allowed, beyond, last_bit, largest, worst)


@dataclass(frozen=True)
class _Found:
    within: npt.NDArray[np.bool_]
    last_bit: npt.NDArray[np.bool_]
    largest: Array
    ratio: Array


def _blocks(own: Array, other: Array, weights: Array) -> _Found:
    """Compare differing blocks, arrays of (blocks, values): bounds of the search types and size of the difference."""
    rms = np.sqrt((other**2).mean(axis=1))
    rounding = LAST_BIT * rms
    error = np.sqrt(((own - weights) ** 2).mean(axis=1))
    best = np.sqrt(((other - weights) ** 2).mean(axis=1))
    factor = 1.25 if own.shape[1] >= 256 else 1.5
    difference = np.abs(own - other).max(axis=1)
    # in a block with scale and minimum, scale times code spans at most max - min <= 2 max |value|
    last_bit: npt.NDArray[np.bool_] = difference <= 2 * LAST_BIT * np.abs(other).max(axis=1)
    floor = np.maximum(rounding, np.finfo(np.float32).tiny)
    return _Found(
        within=error <= factor * best + rounding,
        last_bit=last_bit,
        largest=np.nan_to_num(difference / np.maximum(rms, np.finfo(np.float32).tiny), nan=np.inf),
        ratio=np.nan_to_num(error / np.maximum(best, floor), nan=np.inf),
    )


def _is_direct(kind: str, imatrix: bool) -> bool:
    return kind in _DIRECT and not (imatrix and _DIRECT[kind][1])


def _direct(kind: str, a: Raw, b: Raw, own: Array, other: Array) -> npt.NDArray[np.bool_]:
    """Whether differing blocks keep the bounds of the direct types, (blocks,)."""
    offsets = _DIRECT[kind][0]
    within = np.ones(len(a), dtype=np.bool_)
    for offset in offsets:
        mine, theirs = (
            np.ascontiguousarray(x[:, offset : offset + 2]).view("<u2").ravel().astype(np.int64) for x in (a, b)
        )
        within &= np.abs(mine - theirs) <= 1  # neighbouring bit patterns; a flipped sign is far apart
    scale = np.ascontiguousarray(b[:, offsets[0] : offsets[0] + 2]).view("<f2").astype(np.float64)  # (blocks, 1)
    result: npt.NDArray[np.bool_] = within & (
        np.abs(own - other) <= np.abs(scale) * (1 + 2.0**-8) + 2 * LAST_BIT * np.abs(other).max(axis=1, keepdims=True)
    ).all(axis=1)
    return result


def _allowed(kind: str, blocks: int, imatrix: bool) -> int:
    share = _SHARE_DIRECT if _is_direct(kind, imatrix) else _SHARE_SEARCH
    if not imatrix:
        share = _SHARES_WITHOUT_IMATRIX.get(kind, share)
    return math.ceil(share * blocks + _SPREAD * math.sqrt(share * (1 - share) * blocks))
