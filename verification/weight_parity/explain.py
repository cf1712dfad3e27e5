"""What a tensor that differs from its expectation was made from, where no hypothesis about attention says it.

Each cause is exact or nearly so: one bit differs; the rows are the expected ones in another order; the tensor lies on
the line from the base's weight through the reference's (a merge with another scale: f = 0 nothing merged, 1 right, 2
merged twice, sqrt(r) an rsLoRA scale ignored or taken). W = B + f (W_ref - B), f by least squares.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from verification.contract.finding import Cause

Array = npt.NDArray[np.float32]
Raw = npt.NDArray[np.uint8]
ON_THE_LINE = 0.2  # share of the difference that may lie beside the line
LEAST = 5e-4  # |f - 1| below this is no other scale
CERTAIN = 6.0  # standard errors of f


def damage_cause(actual: Raw, expected: Raw, rows: int) -> Cause | None:
    """One flipped bit, or the right rows in another order; bytes of one type and size."""
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
    """Another scale of what was merged into the base; three arrays of one shape.

    Args:
        step: distance of the type's neighbouring numbers, (1) or of the arrays' shape. A small change d of a weight
            moves its stored number by a whole step in d / step of all cases, so rounding alone adds |d| step to the
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
