"""The profile of a tensor's error: its size along the rows and along the columns, in stretches of equal length.

e_g = |E_g| / |W|, E_g the error inside stretch g, W the whole tensor; the squares of all stretches of one axis add up
to the square of the tensor's relative error. Shapes: W, F (.., out, in); experts count as rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
STRETCHES = 32  # largest number: a stretch is a head in many models, and the picture needs a few hundred bytes


@dataclass(frozen=True)
class Profile:
    """The relative error of each stretch."""

    rows: tuple[float, ...]
    columns: tuple[float, ...]


def error_profile(values: Array, wanted: Array) -> Profile:
    """The error profile of `values` F against `wanted` W, both of shape (.., out, in) or (in,)."""
    W = wanted.reshape(-1, wanted.shape[-1])
    squares = (values.reshape(W.shape) - W).astype(np.float64) ** 2
    norm = float(np.linalg.norm(W)) or 1.0
    rows, columns = (
        tuple(float(np.sqrt(part.sum())) / norm for part in np.array_split(sums, min(STRETCHES, len(sums))))
        for sums in (squares.sum(axis=1), squares.sum(axis=0))
    )
    return Profile(rows, columns)
