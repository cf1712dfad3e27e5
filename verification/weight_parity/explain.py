"""Causes of a difference that no hypothesis about attention explains: a flipped bit, moved rows, another merge scale.

Each cause is exact or nearly exact. One bit differs. The rows are the expected rows in another order. The tensor lies
on the line from the base's weight through the reference's weight, so the merge had another scale f: 0 nothing merged,
1 right, 2 merged twice, sqrt(r) an rsLoRA scale ignored or wrongly used. W = B + f (W_ref - B), f by least squares.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from verification.contract.finding import Cause

Array = npt.NDArray[np.float32]
Raw = npt.NDArray[np.uint8]
ON_THE_LINE = 0.2  # largest share of the difference beside the line
LEAST = 5e-4  # a smaller |f - 1| does not count as another scale
CERTAIN = 6.0  # standard errors of f


def damage_cause(actual: Raw, expected: Raw, rows: int) -> Cause | None:
    """One flipped bit, or the expected rows in another order; both arrays hold bytes of the same type."""
    if actual.size != expected.size:
        return None
    at = np.flatnonzero(actual != expected)
    if at.size == 1 and int(actual[at[0]] ^ expected[at[0]]).bit_count() == 1:
        return Cause("one flipped bit", "flipped_bit")
    if rows > 1 and at.size and actual.size % rows == 0:
        a, b = (
            np.ascontiguousarray(x.reshape(rows, -1)).view(f"V{x.size // rows}").ravel() for x in (actual, expected)
        )
        if sorted(map(bytes, a)) == sorted(map(bytes, b)):
            return Cause("the reference's rows in another order", "row_order")
    return None


def merge_cause(values: Array, wanted: Array, base: Array, step: Array | float = 0.0) -> Cause | None:
    """Another scale of the change that was merged into the base; the three arrays have one shape.

    Args:
        step: distance of the type's neighbouring numbers, (1) or of the arrays' shape. If a weight changes by a small
            d, its stored number moves by a whole step in d / step of all cases, so rounding alone adds |d| step to the
            squares beside the line.
    """
    change = wanted.astype(np.float64) - base
    square = float(np.vdot(change, change))
    if square == 0:
        return None
    difference = values.astype(np.float64) - wanted
    excess = float(np.vdot(change, difference)) / square
    beside = float(np.linalg.norm(difference - excess * change))
    rounding = 2 * float(np.sum(np.abs(excess * change) * step))
    allowed = (ON_THE_LINE * float(np.linalg.norm(difference))) ** 2 + rounding
    certain = abs(excess) * np.sqrt(square * change.size) >= CERTAIN * beside
    if abs(excess) < LEAST or beside**2 > allowed or not certain:
        return None
    return Cause(f"the change from the base scaled by {1 + excess:.4g}", "merge")
