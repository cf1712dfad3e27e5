"""The wrong scale of a tensor or a group of rows or columns: c = <E, F> / <F, F>, the share by which F is too large.

A least-squares quantiser leaves E orthogonal to F (c = 0); an unbiased one leaves E orthogonal to W, which gives
c = |E|^2 / |F|^2. With an importance matrix c lies between these or below, depending on the type; this range is
measured with llama.cpp's quantiser on the same tensor. Standard error, errors independent:
sqrt(sum (E - c F)^2 F^2) / sum F^2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
SIGMA = 1.4826  # median absolute deviation of a Gaussian variable -> its standard deviation
ENOUGH = 32  # least number of groups that show their spread


@dataclass(frozen=True)
class Scale:
    """The scale of a whole tensor's error."""

    value: float
    standard_error: float
    relative: float  # |E| / |F|: an unbiased quantiser has the value relative^2


@dataclass(frozen=True)
class GroupScale:
    """The group of rows or columns whose scale differs most from the other groups'."""

    index: int
    value: float  # the group's scale minus the median of all groups
    z: float


def scale(values: Array, error: Array) -> Scale:
    """The tensor's scale; `values` F and `error` E of one shape."""
    F, E = values.astype(np.float64), error.astype(np.float64)
    square = float(np.vdot(F, F)) or 1.0
    value = float(np.vdot(E, F)) / square
    rest = (E - value * F) * F
    return Scale(value, float(np.sqrt(np.vdot(rest, rest))) / square, float(np.sqrt(np.vdot(E, E) / square)))


def group_scale(values: Array, error: Array, *, axis: int, size: int = 1) -> GroupScale:
    """The group of `size` neighbouring rows (axis 0) or columns (axis 1) of (O, I) arrays with the largest z.

    With enough groups, z counts in the spread of the groups if it exceeds the standard error: a matrix changes each
    group a little, so standard errors are too small.
    """
    found, errors = group_scales(values, error, axis=axis, size=size)
    apart = found - np.median(found)
    spread = SIGMA * float(np.median(np.abs(apart))) if len(found) >= ENOUGH else 0.0
    z = np.abs(apart) / np.maximum(np.maximum(errors, spread), 1e-12)
    at = int(z.argmax())
    return GroupScale(at, float(apart[at]), float(z[at]))


def group_scales(values: Array, error: Array, *, axis: int, size: int = 1) -> tuple[Float64, Float64]:
    """Scales of groups of neighbouring rows or columns, and their standard errors; both (groups,)."""
    F, E = values.astype(np.float64), error.astype(np.float64)
    other = 1 - axis
    squares = _groups((F * F).sum(axis=other), size)
    squares = np.where(squares > 0, squares, np.inf)
    found = _groups((E * F).sum(axis=other), size) / squares
    spread = found.repeat(size)[: F.shape[axis]]
    rest = ((E - (spread[:, None] if axis == 0 else spread[None, :]) * F) * F) ** 2
    return found, np.sqrt(_groups(rest.sum(axis=other), size)) / squares


def _groups(sums: Float64, size: int) -> Float64:
    """Sums of neighbouring groups; the last group may be shorter."""
    padded = np.pad(sums, (0, -len(sums) % size))
    total: Float64 = padded.reshape(-1, size).sum(axis=1)
    return total
