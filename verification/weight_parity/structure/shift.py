"""A constant added to a tensor: mean(E), relative to the reference's root mean square.

K-quants with a minimum have a bias (1e-3 of the RMS was measured, 41 standard errors from zero), so a shift is compared
with the shift of llama.cpp's quantiser, never with zero. Standard error of the mean: rms(E) / sqrt(weights).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Shift:
    """The mean error of a tensor, divided by the reference's RMS."""

    value: float
    standard_error: float


def shift(wanted: Array, error: Array) -> Shift:
    """The shift in `error` E against `wanted` W, both of one shape."""
    rms = float(np.sqrt(np.mean(wanted.astype(np.float64) ** 2))) or 1.0
    own = error.astype(np.float64)
    return Shift(float(own.mean()) / rms, float(np.sqrt(np.mean(own**2) / own.size)) / rms)
