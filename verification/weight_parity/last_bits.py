"""Blocks that fit worse than the quantiser's own, held against what the last bits of float32 can do to a block.

Another build of llama.cpp adds the same numbers with other roundings: one multiplication and addition contracted to
one operation (arm64), or another order. Where two scales of a block are nearly equally good, it may settle on the
other one, and the squared error of that block may be several times as large: up to 4.3 times (Q4_K) and 2.5 times
(IQ4_NL) on SmolLM2-135M, whose weights lie near a coarse grid. So the quantiser is asked again about the same rows,
with every weight moved by up to `MOVED` of itself. A block that is worse than all of these answers has another cause.

`MOVED`: a sum of n rounded products is off by about sqrt(n) 2^-24 of its terms, 2^-20 for the 256 weights of the
largest block. `DRAWS`: measured on files of llama.cpp built with contraction (11 types, SmolLM2-135M, 37 blocks beyond
`WORSE`), 4 draws leave one block unexplained, 16 leave none.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from verification.engines.quantise import quantised_bytes
from verification.gguf.reader import GGUFTensor

Array = npt.NDArray[np.float32]
WORSE = 1.2  # squared error of a block over the own quantiser's, from which the quantiser is asked again
MOVED = 2.0**-20
DRAWS = 32
MOST_ROWS = 64  # rows asked again, those of the worst blocks first
_SAME = 1 + 2.0**-10  # two sums of the same squared errors, in float32


def unexplained(
    kind: str,
    rows: Array,
    wanted: Array,
    errors: npt.NDArray[np.float64],
    own_errors: npt.NDArray[np.float64],
    matrices: Array | None = None,
) -> int:
    """Number of blocks that are worse than the own quantiser makes of their weights, whatever the last bits.

    Args:
        kind: a type that the quantiser writes.
        rows: (rows, in), what the quantiser starts from.
        wanted: (rows, in), the reference's weights.
        errors: (rows, blocks in a row), squared error of each block of the file; 0 for one that is not to be asked.
        own_errors: (rows, blocks in a row), of the own quantiser's blocks.
        matrices: (rows, in), the importance matrix of each row; rows of one matrix stand together.
    """
    ratio = np.where(errors > WORSE * own_errors, errors / np.maximum(own_errors, np.finfo(np.float64).tiny), 0.0)
    worst = ratio.max(axis=1, initial=0.0)
    chosen = np.sort(np.argsort(-worst, kind="stable")[:MOST_ROWS])
    chosen = chosen[worst[chosen] > 0]
    if len(chosen) == 0:
        return 0
    W, V, asked = rows[chosen], wanted[chosen], ratio[chosen] > 0
    matrix = None if matrices is None else matrices[chosen]
    bound = own_errors[chosen].copy()
    rng = np.random.default_rng(0)
    for _ in range(DRAWS):
        moved = (W * (1 + MOVED * rng.uniform(-1, 1, W.shape))).astype(np.float32)
        made = _quantised(kind, moved, matrix)
        squares = (made.astype(np.float64) - V) ** 2
        bound = np.maximum(bound, squares.reshape(*bound.shape, -1).sum(axis=-1))
    return int(np.count_nonzero(asked & (errors[chosen] > _SAME * bound)))


def _quantised(kind: str, rows: Array, matrices: Array | None) -> Array:
    """What the quantiser makes of rows (rows, in), each under its own matrix."""
    if matrices is None:
        groups = [slice(0, len(rows))]
    else:
        starts = [0, *(np.flatnonzero((matrices[1:] != matrices[:-1]).any(axis=1)) + 1), len(rows)]
        groups = [slice(a, b) for a, b in pairwise(starts)]
    made = []
    for group in groups:
        part = rows[group]
        raw = quantised_bytes(part, kind, None if matrices is None else matrices[group.start])
        assert raw is not None  # the quantiser has made this type of these rows before
        made.append(GGUFTensor("", part.shape, kind, raw).values())
    return np.concatenate(made)
