"""The known direction: the share of the change from the base that is missing or doubled in a tensor.

c = <E, D> / |D|^2 with D = reference - base: 0 healthy, -1 not merged, +1 merged twice. The estimate does not depend on
the importance matrix, the type or the rank of D. The part of E along F is removed first, because a matrix scales it.
Standard error: blocks are independent, so sqrt(sum over blocks <E_b, D_b>^2) / |D|^2. Estimates of several tensors are
averaged with weights 1 / SE^2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
CERTAIN = 6.5  # standard errors: P(|z| > 6.5) over 300 tensors is 2e-8
LEAST = 0.05  # people make no faults with a smaller share, and correlations of D with W may look like one


@dataclass(frozen=True)
class Direction:
    """The share of the change from the base in the error."""

    value: float
    standard_error: float

    @property
    def detected(self) -> bool:
        return abs(self.value) > max(CERTAIN * self.standard_error, LEAST)

    @property
    def cause(self) -> str:
        """The cause in words."""
        return f"the change from the base scaled by {1 + self.value:.3g}"


def direction(values: Array, error: Array, change: Array, *, block: int) -> Direction | None:
    """The share of `change` D in `error` E; None where reference and base are equal.

    Args:
        values: F; all three have one shape, with rows of a multiple of `block` weights.
    """
    F, E, D = (x.astype(np.float64).reshape(-1, block) for x in (values, error, change))
    square = float(np.vdot(D, D))
    if not square:
        return None
    E = E - float(np.vdot(E, F)) / (float(np.vdot(F, F)) or 1.0) * F
    value = float(np.vdot(E, D)) / square
    parts = ((E - value * D) * D).sum(axis=1)
    return Direction(value, float(np.sqrt(np.vdot(parts, parts))) / square)


def together(found: Iterable[Direction]) -> Direction | None:
    """The average of several tensors' estimates; None if there is no estimate."""
    known = [one for one in found if one.standard_error > 0]
    if not known:
        return None
    weights = [one.standard_error**-2 for one in known]
    total = sum(weights)
    value = sum(weight * one.value for weight, one in zip(weights, known, strict=True)) / total
    return Direction(value, float(total**-0.5))
