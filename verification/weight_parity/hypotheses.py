"""Hypotheses about how a tensor was made from the reference: the nearest one, its distance and its margin.

Every hypothesis is an array H of the tensor's shape; its distance is ||T - H|| / ||expected||. With noise of standard
deviation s a weight (the distance to the best, spread over n weights), two hypotheses a, b are separated by
z = (d_b^2 - d_a^2) / (2 s ||H_a - H_b||): the choice is safe at every quantisation level with a large z.
R is blockdiag(R_k) on the input of the tensor, W' = W @ R (see so8t_core.folding). In an adapter with a scale or a
second rotation, R is the whole map and R^T its inverse. Hypotheses that need R or the base are tested only if an
adapter or a base is given; transposes only if the tensor is square.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from verification.contract.finding import Code

if TYPE_CHECKING:  # torch and its users take seconds to import, and only an adapter needs them
    import torch

    from so8t_core.folding import Fold

Array = npt.NDArray[np.float32]
Role = Literal["o", "v", "q", "k", "other"]
# R (in/8, 8, 8), float64; a fold if the map of the input is more than one rotation
Rotation: TypeAlias = "torch.Tensor | Fold"
EXPECTED = "expected"
BASE = "the base's own weight (nothing baked)"
UNROTATED, TURNED_BACK, TWICE = "not rotated (R missing)", "rotated back (R^T in place of R)", "rotated twice"
WRONG_SIDE, ON_V = "rotated on the wrong side (R @ W)", "rotated as well (R @ v_proj)"
TRANSPOSED = "transposed"
HALVES = {True: "q/k rows not permuted", False: "q/k rows un-permuted"}  # key: whether the file has them in pairs
PAIRS = {True: "q/k rows permuted twice", False: "q/k rows permuted"}
_CODES: dict[str, Code] = {
    BASE: "merge",
    **dict.fromkeys((UNROTATED, TURNED_BACK, TWICE, WRONG_SIDE, ON_V), "rotation"),
    TRANSPOSED: "transposed",
    **dict.fromkeys((*HALVES.values(), *PAIRS.values()), "head_rows"),
}
DECIDED = 4.0  # z from which a hypothesis is preferred: probability 6e-5 by chance
SAMPLED_ROWS = 32  # rows of other layers' tensors: enough, because the weights of layers are unrelated


@dataclass(frozen=True)
class Nearest:
    """The nearest hypothesis of one tensor."""

    name: str
    best: str
    distance: float  # relative Frobenius distance to the best
    second: str
    second_distance: float
    z: float  # standard deviations by which the best is preferred to the second
    expected_distance: float
    z_expected: float  # the same against the expectation; 0 if that is the best

    @property
    def code(self) -> Code:
        """The best hypothesis as a finding's code."""
        return _CODES.get(self.best, "")

    @property
    def is_fault(self) -> bool:
        """Whether another hypothesis fits better than the expectation, and not by chance."""
        return self.best != EXPECTED and self.z_expected >= DECIDED


@dataclass(frozen=True)
class Other:
    """The same tensor of another layer: a few rows, and a function that loads the whole tensor."""

    name: str
    sample: Array
    load: Callable[[], Array]


@dataclass(frozen=True)
class Known:
    """The expected values of one tensor in the file's form, and the data for its other hypotheses."""

    role: Role
    expected: Array  # (out, in)
    base: Array | None = None  # the base's weight in the file's form
    rotation: Rotation | None = None  # rotation of o_proj's input
    in_pairs: bool = False  # whether q and k rows are permuted for RoPE on neighbours
    head_rows: int = 0  # rows a head, for q and k
    siblings: tuple[tuple[str, Array], ...] = ()  # other tensors of the layer with the same shape: ("k_proj", values)
    own: Rotation | None = None  # rotation of this tensor's input, if it is not o_proj


def rotation_of(fold: Fold) -> Rotation | None:
    """An adapter's map of the input of one weight: R (in/8, 8, 8) or a fold without its LoRA; None if there is none."""
    if fold.theta is None:
        return None
    if fold.log_scale is None and fold.shuffled is None:
        from so8t_core.folding import Turn

        return Turn(fold.theta, fold.accumulated).matrix()
    return replace(fold, loras=[])


def rotated(W: Array, R: Rotation, *, transposed: bool = False) -> Array:
    """W @ blockdiag(R), or R^T if `transposed`, in float64, as float32; for a fold its map or the inverse map."""
    import torch

    from so8t_core.folding import Fold, rotate_rows

    if isinstance(R, Fold):
        folded: Array = R.apply(torch.from_numpy(W), undo=transposed).numpy()
        return folded
    turned = rotate_rows(torch.from_numpy(W).double(), R.transpose(1, 2) if transposed else R)
    result: Array = turned.float().numpy()
    return result


def hypotheses(known: Known) -> Iterator[tuple[str, Array]]:
    """Every hypothesis about one tensor, in its shape, except other layers; "expected" first."""
    W = known.expected
    R = known.rotation if known.role == "o" else known.own
    square = W.shape[0] == W.shape[1]
    yield EXPECTED, W
    if known.base is not None:
        yield BASE, known.base
    if R is not None:
        unrotated = rotated(W, R, transposed=True)
        yield UNROTATED, unrotated
        yield TURNED_BACK, rotated(unrotated, R, transposed=True)
        yield TWICE, rotated(W, R)
        if _turns_rows(W, R):
            yield WRONG_SIDE, _left(unrotated, R)
    output = known.rotation if known.role == "v" else None
    if output is not None and _turns_rows(W, output):
        yield ON_V, _left(W, output)
    if square:
        yield TRANSPOSED, np.ascontiguousarray(W.T)
    if known.role in ("q", "k") and known.head_rows % 2 == 0 and known.head_rows:
        yield HALVES[known.in_pairs], pairs_to_halves(W, known.head_rows)
        yield PAIRS[known.in_pairs], halves_to_pairs(W, known.head_rows)
    for name, values in known.siblings:
        if values.shape == W.shape:
            yield f"{name} of the same layer", values


def sample_rows(values: Array) -> Array:
    """Every n-th row, about `SAMPLED_ROWS` of them."""
    return values[:: max(1, values.shape[0] // SAMPLED_ROWS)]


def nearest(name: str, actual: Array, known: Known, others: Sequence[Other] = ()) -> Nearest:
    """The hypothesis nearest to `actual` (out, in), in the file's form."""
    W = known.expected
    scale = float(np.linalg.norm(W)) or 1.0
    table = [(label, H) for label, H in hypotheses(known) if H.shape == actual.shape]
    table = [row for i, row in enumerate(table) if i == 0 or not np.array_equal(row[1], W)]
    distances = [float(np.linalg.norm(actual - H)) for _, H in table]
    sample = sample_rows(actual)
    fitting = [other for other in others if other.sample.shape == sample.shape]
    if fitting:
        there = [np.linalg.norm(sample - other.sample) for other in fitting]
        best_here = min(np.linalg.norm(sample - sample_rows(H)) for _, H in table)
        if min(there) < best_here or len(table) == 1:
            other = fitting[there.index(min(there))]
            table.append((other.name, other.load()))
            distances.append(float(np.linalg.norm(actual - table[-1][1])))
    order = sorted(range(len(table)), key=distances.__getitem__)  # of equal distances the first: the expectation
    first = order[0]
    second = order[1] if len(order) > 1 else first

    def prefers(other: int) -> float:
        noise = distances[first] / math.sqrt(actual.size)
        apart = float(np.linalg.norm(table[first][1] - table[other][1]))
        gap = distances[other] ** 2 - distances[first] ** 2
        return gap / (2 * noise * apart) if noise * apart > 0 else math.inf if gap > 0 else 0.0

    return Nearest(
        name=name,
        best=table[first][0],
        distance=distances[first] / scale,
        second=table[second][0] if second != first else "",
        second_distance=distances[second] / scale,
        z=prefers(second),
        expected_distance=distances[0] / scale,
        z_expected=prefers(0),
    )


def _turns_rows(W: Array, R: Rotation) -> bool:
    """Whether blockdiag(R) can multiply W from the left; a fold cannot."""
    import torch

    return isinstance(R, torch.Tensor) and W.shape[0] == R.shape[0] * 8


def _left(W: Array, R: Rotation) -> Array:
    """blockdiag(R) @ W for W (8 n, in)."""
    return rotated(W.T, R, transposed=True).T


def halves_to_pairs(values: Array, head_rows: int) -> Array:
    """Reorder each head's rows (r0..r[d/2-1], i0..i[d/2-1]) to (r0, i0, r1, i1, ..)."""
    heads = values.shape[0] // head_rows
    split = values.reshape(heads, 2, head_rows // 2, *values.shape[1:])  # (heads, half, d/2, ...)
    return np.swapaxes(split, 1, 2).reshape(values.shape)


def pairs_to_halves(values: Array, head_rows: int) -> Array:
    """The inverse of `halves_to_pairs`."""
    heads = values.shape[0] // head_rows
    split = values.reshape(heads, head_rows // 2, 2, *values.shape[1:])  # (heads, d/2, half, ...)
    return np.swapaxes(split, 1, 2).reshape(values.shape)
