"""Damaged blocks: those that fit the reference worse than llama.cpp's quantiser does, for no reason of arithmetic.

Another build of llama.cpp rounds its sums otherwise: arm64 contracts a multiplication and an addition to one operation.
If two scales of a block are nearly equally good, that build may choose the other one, and the squared error of the
block may be several times as large: up to 4.3 times (Q4_K) on SmolLM2-135M, whose weights lie near a coarse grid. A
block that is more than `WORSE` times as bad is therefore damaged only if two explanations fail:
  ties: the quantiser is asked `DRAWS` times about the same rows, with every weight moved by up to `MOVED` of itself (a
        sum of 256 rounded products is off by about sqrt(256) 2^-24), and the block is worse than each of its answers;
  scale: some code of the block is not the nearest on the block's own scales, as after a flipped bit.
Measured with llama.cpp built with contraction on SmolLM2-135M: ties explain all 37 such blocks of files without a
matrix. Under log-normal matrices ties or scales explain 26 of 28; the two others are of Q5_1. With a matrix, Q4_0 to
Q5_1 fit the scale again after the codes are chosen, so there a block is looked at from `WORSE_AFTER_FIT` on.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from verification.engines.quantise import quantised_bytes
from verification.gguf.reader import GGUFTensor
from verification.weight_parity.structure.rounding import LAST_BIT, nearest_values

Array = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
WORSE = 1.2  # squared error of a block over the own quantiser's, from which the block is looked at
WORSE_AFTER_FIT = 1.5**2  # the bound of `block_bounds` for blocks of 32
_FITTED_LAST = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")
MOVED = 2.0**-20
DRAWS = 32
MOST_ROWS = 64  # rows that the quantiser is asked about, those of the worst blocks first
_SAME = 1 + 2.0**-10  # two sums of the same squared errors, in float32


def damaged_blocks(
    tensor: GGUFTensor,
    values: Array,
    own: Array,
    start: Array,
    wanted: Array,
    asked: Mask,
    matrices: Array | None = None,
) -> int:
    """Number of damaged blocks of a tensor, all arrays with rows of its width: (rows, in).

    Args:
        tensor: the file's, of a type that the quantiser writes.
        values: its values.
        own: the values of the own quantiser's bytes.
        start: the values that the quantiser starts from.
        wanted: the reference's weights.
        asked: (blocks,), the blocks that may be damaged; the others are equal to the own quantiser's.
        matrices: (groups, in), the importance matrices; each group has as many rows, in order (experts).
    """
    per_row = len(asked) // len(wanted)
    mine, theirs = _errors(values, wanted, per_row), _errors(own, wanted, per_row)
    ratio = np.where(asked.reshape(mine.shape), mine, 0.0) / np.maximum(theirs, np.finfo(np.float64).tiny)
    worst = ratio.max(axis=1, initial=0.0)
    rows = np.sort(np.argsort(-worst, kind="stable")[:MOST_ROWS])
    least = WORSE_AFTER_FIT if matrices is not None and tensor.type in _FITTED_LAST else WORSE
    rows = rows[worst[rows] > least]
    if len(rows) == 0:
        return 0
    matrix = None if matrices is None else matrices[rows * len(matrices) // len(wanted)]
    bound = _worst_answers(tensor.type, start[rows], wanted[rows], theirs[rows], matrix)
    left = (ratio[rows] > least) & (mine[rows] > _SAME * bound)
    if not left.any():
        return 0
    raw = tensor.raw.reshape(len(wanted), -1)[rows]
    part = dataclasses.replace(tensor, shape=wanted[rows].shape, raw=raw.reshape(-1))
    nearest = nearest_values(part, values[rows], wanted[rows])
    if nearest is not None:
        left &= _not_nearest(values[rows], nearest, wanted[rows], per_row)
    return int(np.count_nonzero(left))


def _errors(values: Array, wanted: Array, per_row: int) -> Float64:
    """Squared error of each block, (rows, blocks in a row)."""
    squares = (values.astype(np.float64) - wanted) ** 2
    summed: Float64 = squares.reshape(len(wanted), per_row, -1).sum(axis=-1)
    return summed


def _not_nearest(values: Array, nearest: Array, wanted: Array, per_row: int) -> Mask:
    """Whether a block holds a code that is not the nearest on its scales, (rows, blocks in a row).

    Codes are chosen before scale and minimum are rounded to float16, which moves the block's values by up to `LAST_BIT`
    of the largest: so much nearer, and so much less far, another code may be.
    """
    blocks = (len(wanted), per_row, -1)
    further = (np.abs(values - wanted) - np.abs(nearest - wanted)).reshape(blocks).max(axis=-1)
    found: Mask = further > 2 * LAST_BIT * np.abs(values).reshape(blocks).max(axis=-1)
    return found


def _worst_answers(kind: str, start: Array, wanted: Array, own_errors: Float64, matrices: Array | None) -> Float64:
    """Largest squared error of each block over the quantiser's answers, (rows, blocks in a row)."""
    worst = own_errors.copy()
    rng = np.random.default_rng(0)
    for _ in range(DRAWS):
        moved = (start * (1 + MOVED * rng.uniform(-1, 1, start.shape))).astype(np.float32)
        worst = np.maximum(worst, _errors(_quantised(kind, moved, matrices), wanted, worst.shape[1]))
    return worst


def _quantised(kind: str, rows: Array, matrices: Array | None) -> Array:
    """The quantiser's values for rows (rows, in), each under its own matrix of `matrices` (rows, in)."""
    parts = [(rows, None)] if matrices is None else list(zip(rows[:, None], matrices, strict=True))
    made = []
    for part, matrix in parts:
        raw = quantised_bytes(part, kind, matrix)
        assert raw is not None  # the quantiser has made this type of these rows before
        made.append(GGUFTensor("", part.shape, kind, raw).values())
    return np.concatenate(made)
