"""Counts the codes that are not the nearest to the reference on the file's own scales.

llama.cpp first chooses the scales of a K-quant, IQ4 or Q8_0 block, with any importance matrix, and then rounds every
weight to the nearest value on these scales. So each weight of the reference W must lie in the cell of its code: at most
half a step from the dequantised F, or beyond F at the end of the range. This test needs neither the matrix nor the
maker. Healthy, 13 types, three matrices: not one code of 1.5 million lies outside. Other weights put a share near
0.8 d / step of all codes outside, d the standard deviation of their difference.

With a matrix, Q4_0 to Q5_1 are rounded with one scale and stored with another (least squares); other quantisers may do
so for any type. Here every group must have *some* scale and minimum (a, b) with |a w + b - code| <= 1/2: the room that
is left for b is concave in a, and its maximum must not be negative.
Shapes: W, F (out, in); low, high: ends of the code's range, of the same shape; groups: (out * in / group, group).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import IQ4_NL, MXFP4

from verification.gguf.reader import GGUFTensor

Array = npt.NDArray[np.float32]
Raw = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]
# Tolerance: a float16 scale's last bit, or arithmetic in float16: 2^-10 of the value and of the minimum; a scale below
# float16's normal numbers has a larger last bit, 2^-24.
LAST_BIT = np.float32(2.0**-10)
BATCH = 1 << 20  # weights at a time
LOOKED = 8192  # most groups of a tensor for which other scales are tried
WIDEST = 0.8, 1.25  # range of tried scales, divided by the stored one; llama.cpp tries 0.9 / 8 = 11 % either way
THIRD = np.float32(1 / 3)
STEPS = 20  # steps of the search for a scale: each cuts the interval to 2/3, all together to 3e-4
_SCALE_AT = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}  # byte offset of a block's float16 scale; 0 in other types


@dataclass(frozen=True)
class _Uniform:
    """A type whose codes have equal distances."""

    codes: tuple[int, int]  # bytes of a block that hold codes
    steps: int  # number of steps between the lowest and the highest code
    group: int  # weights that share a scale
    minimum: bool = False  # whether the lowest value is stored
    highest: int = 0xFF  # byte that gives the highest code everywhere
    signed: bool = False  # the lowest value is minus the highest


_UNIFORM = {
    "Q4_0": _Uniform((2, 18), 15, 32),
    "Q4_1": _Uniform((4, 20), 15, 32, minimum=True),
    "Q5_0": _Uniform((2, 22), 31, 32),
    "Q5_1": _Uniform((4, 24), 31, 32, minimum=True),
    "Q8_0": _Uniform((2, 34), 254, 32, highest=0x7F, signed=True),
    "Q2_K": _Uniform((16, 80), 3, 16, minimum=True),
    "Q3_K": _Uniform((0, 96), 7, 16),
    "Q4_K": _Uniform((16, 144), 15, 32, minimum=True),
    "Q5_K": _Uniform((16, 176), 31, 32, minimum=True),
    "Q6_K": _Uniform((0, 192), 63, 16),
}
# codebooks: bytes of a block that hold codes, the byte whose two codes stand for 1, the values
_BOOKS = {
    "IQ4_NL": ((2, 18), 0x88, IQ4_NL.kvalues),
    "IQ4_XS": ((8, 136), 0x88, IQ4_NL.kvalues),
    "MXFP4": ((1, 17), 0x11, MXFP4.kvalues),
}
STORED_OTHERWISE = frozenset(("Q4_0", "Q4_1", "Q5_0", "Q5_1"))  # stored with another scale under a matrix


@dataclass(frozen=True)
class Rounding:
    """The codes of one tensor that are not the nearest."""

    rows: Counts  # (out,): codes in each row that are not the nearest
    columns: Counts  # (in,)
    unexplained: float  # types in `STORED_OTHERWISE`: share of the groups that no other scale explains
    unexplained_rows: Counts  # (out,): unexplained groups in each row, among the searched groups

    @property
    def count(self) -> int:
        return int(self.rows.sum())

    @property
    def share(self) -> float:
        return self.count / max(self.rows.size * self.columns.size, 1)


def has_cells(kind: str) -> bool:
    """Whether the codes of a type are chosen one by one, so that each has a cell; not so in lattice types."""
    return kind in _UNIFORM or kind in _BOOKS


def rounding(tensor: GGUFTensor, values: Array, wanted: Array, *, saved: float = 0.0) -> Rounding | None:
    """Count the codes whose cell does not hold the reference's weight; None for a type without cells, or without bytes.

    Args:
        values: F, the tensor's dequantised values; `wanted` W; both (out, in).
        saved: half a rounding of the type that the reference is saved in, relative: the file's maker may have had
            weights with more bits.
    """
    if not has_cells(tensor.type) or not tensor.raw.size:
        return None
    out, width = values.shape
    rows, columns, lost = np.zeros(out, np.int64), np.zeros(width, np.int64), np.zeros(out, np.int64)
    search = tensor.type in STORED_OTHERWISE
    kind = _UNIFORM.get(tensor.type)
    touched = looked = 0
    for part, raw in _batches(tensor, out):
        F, W = values[part], wanted[part]
        ends = None if kind is None else _ends(tensor.type, raw, F.shape)
        outside = _outside(tensor.type, raw, F, W, ends, saved)
        rows[part] = outside.sum(axis=1)
        columns += outside.sum(axis=0)
        if not search or ends is None or kind is None or not outside.any():
            continue
        groups = np.flatnonzero(outside.reshape(-1, kind.group).any(axis=1))
        most = max(LOOKED * F.size // values.size, 64)
        some = groups[:: -(-len(groups) // most)]
        bad = some[_without_scale(kind, *(x.reshape(-1, kind.group)[some] for x in (*ends, F, W)))]
        lost[part] += np.bincount(bad // (width // kind.group), minlength=len(F))
        touched, looked = touched + len(groups), looked + len(some)
    total = values.size // kind.group if kind is not None else 1
    share = float(lost.sum()) / looked * touched / total if looked else 0.0
    return Rounding(rows, columns, share, lost)


def _outside(kind: str, raw: Raw, values: Array, wanted: Array, ends: tuple[Array, Array] | None, saved: float) -> Mask:
    """Whether each weight lies outside of the cell of its code, (out, in).

    For equally spaced codes, only weights further than half a step from their value are tested. All others lie inside,
    because the tolerance of every such type exceeds the rounding of the float32 sum.
    """
    last, block = _last_bit(kind, raw), GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]
    if ends is None:
        below, above = _book_cells(kind, raw, values)
        slack = last.repeat(block).reshape(values.shape) * np.maximum(np.abs(values), np.abs(wanted)) + np.float32(
            saved
        ) * np.abs(wanted)
        found: Mask = ~((below - slack <= wanted) & (above + slack >= wanted))
        return found
    form = _UNIFORM[kind]
    half = np.abs(ends[1] - ends[0]) / np.float32(2 * form.steps)
    found = ~(np.abs(wanted - values) <= half)
    last = last[np.flatnonzero(found) // block]
    F, W, low, high, half = (x[found] for x in (values, wanted, *ends, half))
    minimum = np.abs(low) if form.minimum else np.float32(0)
    low, high = np.minimum(low, high), np.maximum(low, high)
    slack = last * (np.maximum(np.abs(F), np.abs(W)) + minimum) + np.float32(saved) * np.abs(W)
    below = np.where(low + half / 2 >= F, -np.inf, F - half)
    above = np.where(high - half / 2 <= F, np.inf, F + half)
    found[found] = ~((below - slack <= W) & (above + slack >= W))
    return found


def nearest_values(tensor: GGUFTensor, values: Array, wanted: Array) -> Array | None:
    """W rounded to the nearest values on the tensor's scales, (out, in); None as in `rounding`."""
    if not has_cells(tensor.type) or not tensor.raw.size:
        return None
    found = np.empty_like(values)
    for part, raw in _batches(tensor, len(values)):
        W = wanted[part]
        if tensor.type in _UNIFORM:
            low, high = _ends(tensor.type, raw, W.shape)
            step = (high - low) / np.float32(_UNIFORM[tensor.type].steps)
            safe = np.where(step == 0, np.float32(1), step)
            found[part] = low + step * np.clip(np.rint((W - low) / safe), 0, _UNIFORM[tensor.type].steps)
        else:
            unit, book, cuts = _book(tensor.type, raw, W.shape)
            found[part] = unit * book[np.searchsorted(cuts, W / np.where(unit == 0, np.float32(1), unit))]
    return found


def _without_scale(kind: _Uniform, low: Array, high: Array, values: Array, wanted: Array) -> Mask:
    """Whether no scale and minimum gives a group's codes, (groups,); False for a group without a step.

    The arrays are (groups, group).
    """
    step = (high - low)[:, :1] / np.float32(kind.steps)
    found = np.zeros(len(low), dtype=np.bool_)
    used = step[:, 0] != 0
    step = step[used]
    zero = low[used][:, :1] if kind.minimum else np.zeros_like(step)  # the value of code 0
    codes, W, first, last = ((x[used] - zero) / step for x in (values, wanted, low, high))
    codes = np.rint(codes)
    below = np.where(codes <= first + np.float32(0.25), -np.inf, codes - np.float32(0.5))
    above = np.where(codes >= last - np.float32(0.25), np.inf, codes + np.float32(0.5))
    slack = 2 * LAST_BIT * np.abs(codes).max(axis=1, initial=0)
    found[used] = ~_has_room(W, below, above, -slack, shift=kind.minimum)
    return found


def _has_room(W: Array, below: Array, above: Array, least: Array, *, shift: bool) -> Mask:
    """Whether some a leaves at least `least` of room for b in below <= a W + b <= above, (groups,).

    W, below, above: (groups, weights). Without `shift` b is 0. The room is concave in a, so a ternary search finds its
    maximum; the search of a group ends when it has enough room.
    """

    def room(a: Array) -> Array:
        most, least = (above - a * W).min(axis=1), (below - a * W).max(axis=1)
        left: Array = most - least if shift else 2 * np.minimum(most, -least)
        return left

    found = np.zeros(len(W), dtype=np.bool_)
    left = np.arange(len(W))
    low: Array
    high: Array
    low, high = (np.full((len(W), 1), x, dtype=np.float32) for x in WIDEST)
    for _ in range(STEPS):
        one, two = low + (high - low) * THIRD, high - (high - low) * THIRD
        at_one, at_two = room(one), room(two)
        enough = np.maximum(at_one, at_two) >= least
        found[left[enough]] = True
        on = ~enough
        up = (at_one < at_two)[:, None]
        low, high = np.where(up, one, low)[on], np.where(up, high, two)[on]
        left, W, below, above, least = left[on], W[on], below[on], above[on], least[on]
        if not left.size:
            break
    return found


def _batches(tensor: GGUFTensor, rows: int) -> Iterator[tuple[slice, Raw]]:
    """Slices of rows with their blocks' bytes."""
    raw = tensor.raw.reshape(rows, -1)
    size = max(BATCH * rows // max(int(np.prod(tensor.shape)), 1), 1)
    for first in range(0, rows, size):
        yield slice(first, first + size), raw[first : first + size].reshape(-1)


def _last_bit(kind: str, raw: Raw) -> Array:
    """The last bit of every block's float16 scale or minimum, relative, at least 2^-10; (blocks,)."""
    size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    if kind == "MXFP4":  # the scale is a power of two
        return np.zeros(raw.size // size, dtype=np.float32)
    at, ends = _SCALE_AT.get(kind, 0), 4 if kind in _UNIFORM and _UNIFORM[kind].minimum else 2
    stored = np.ascontiguousarray(raw.reshape(-1, size)[:, at : at + ends]).view("<f2").astype(np.float32)
    least = np.abs(stored).min(axis=1)
    found = np.maximum(LAST_BIT, np.float32(2.0**-24) / np.where(least > 0, least, np.inf))
    return np.minimum(found, 1).astype(np.float32)


def _filled(kind: str, raw: Raw, shape: tuple[int, ...], codes: tuple[int, int], byte: int) -> Array:
    """The dequantised values of the blocks with every code byte set to `byte`."""
    blocks = raw.reshape(-1, GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]).copy()
    blocks[:, slice(*codes)] = byte
    return GGUFTensor("", shape, kind, blocks.reshape(-1)).values()


def _ends(kind: str, raw: Raw, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Values of the lowest and the highest code of every weight."""
    form = _UNIFORM[kind]
    high = _filled(kind, raw, shape, form.codes, form.highest)
    return (-high if form.signed else _filled(kind, raw, shape, form.codes, 0)), high


def _book(kind: str, raw: Raw, shape: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """The unit of every weight, the codebook's values in order, and the middles between these values."""
    codes, one, values = _BOOKS[kind]
    book = np.unique(np.asarray(values, dtype=np.float32))
    cuts: Array = (book[1:] + book[:-1]) * np.float32(0.5)
    return _filled(kind, raw, shape, codes, one), book, cuts


def _book_cells(kind: str, raw: Raw, values: Array) -> tuple[Array, Array]:
    """Lower and upper end of every weight's cell in a codebook, infinite at the range's ends."""
    unit, _, cuts = _book(kind, raw, values.shape)
    at = np.searchsorted(cuts, values / np.where(unit == 0, np.float32(1), unit))
    edges = np.concatenate([[-np.inf], cuts, [np.inf]]).astype(np.float32)
    with np.errstate(invalid="ignore"):  # infinity times zero in empty blocks
        one, two = edges[at] * unit, edges[at + 1] * unit
    below = np.where(unit == 0, -np.inf, np.minimum(one, two)).astype(np.float32)
    above = np.where(unit == 0, np.inf, np.maximum(one, two)).astype(np.float32)
    return below, above
