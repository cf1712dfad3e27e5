"""Finds faulty rows, heads, columns and blocks in a tensor that looks healthy as a whole.

There are two kinds of evidence. *Codes* (`structure.rounding`): if most rows, or most columns, hold only the nearest
codes, the maker rounds to nearest, and codes that are not the nearest hold other weights. *Size*: a row's error,
divided by the error of llama.cpp's quantiser on the same row, is compared with this ratio in the other rows; the
maker's matrix and error feedback change all rows alike. A block is lost if the file holds zeros, or values further from
the reference than zeros, and llama.cpp's quantiser would keep the block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from verification.contract.finding import Code
from verification.gguf.reader import GGUFTensor
from verification.weight_parity.own_quantiser import Own, largest_group_scale, largest_row_errors, own_spread
from verification.weight_parity.structure.rounding import LAST_BIT, STORED_OTHERWISE, Rounding, rounding
from verification.weight_parity.structure.scale import SIGMA, group_scale

Array = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
MOST = 0.5  # largest share of strange rows or columns, of all and of the number that chance would hit
FEWEST = 10  # strange codes: with fewer, their places are no evidence
EXPLAINED = 0.1  # largest share of the strange codes that a scale may leave unexplained
LOST_SCALE = 0.1  # a smaller factor means that nearly nothing of the reference is left, so it is not a scale
MANY = 256  # largest number of groups of rows among which an exchange is searched
HALF = 0.5  # relative distance below which a group holds these weights: 0.35 for two bits, 1.4 for other weights
CANDIDATES = 8  # number of rows with the largest relative error, which are quantised again
# A group is faulty if its scale, a row if its log error ratio, differs by more standard deviations than these.
# `benchmarks.judge_null` measures healthy tensors under matrices of spread 0.5 to 2 and extends the tails to one false
# alarm in 1,000 files: rows 9.3, columns 18.6, heads 16.2, row errors 12.05
SCALE_Z = {"row": 10.0, "column": 19.0, "head": 17.0, "head's columns": 17.0}
ROW_Z = 12.1
LEAST_SPREAD = 0.02  # least spread of the log error ratios
BEYOND_ZEROS = 1.1  # error of a block, divided by the reference's norm; healthy blocks of one bit reached 0.83
LOST = 0.9  # error of a block, divided by the reference's norm: zeros give 1, noise may lower this
# Share of the reference in a column: zeros give 0, other weights +-1/sqrt(rows). With a matrix that spans three orders
# of magnitude, columns of IQ1_S to IQ3_XXS kept 0.30 and more, columns of Q2_K 0.8
LEFT = 0.15


@dataclass(frozen=True)
class Place:
    """A fault in one part of the tensor, in words."""

    expected: str
    found: str
    cause: str
    code: Code = ""


@dataclass(frozen=True)
class Heads:
    """Number of rows or columns of one attention head; 1 if the tensor has no heads along this axis."""

    rows: int = 1
    columns: int = 1


def by_codes(
    tensor: GGUFTensor, F: Array, W: Array, found: Rounding, heads: Heads, *, saved: float = 0.0
) -> Place | None:
    """Rows or columns with codes that are not the nearest, if most others have only nearest codes; (out, in) arrays."""
    rows = found.unexplained_rows if tensor.type in STORED_OTHERWISE else found.rows
    if not rows.any():
        return None
    columns = found.columns
    strange = [("row", 0, rows, heads.rows)]
    if tensor.type not in STORED_OTHERWISE:  # there, strange groups are known, not codes
        strange.append(("column", 1, columns, heads.columns))
    share = {name: _crowded(counts) for name, _, counts, _ in strange}
    for name, axis, counts, head in sorted(strange, key=lambda one: share[one[0]]):
        if share[name] > MOST:
            continue
        at = np.flatnonzero(counts)
        groups = np.unique(at // head)
        whole = head > 1 and len(at) > MOST * len(groups) * head
        what, shown = (f"{name}s of heads", groups) if whole else (f"{name}s", at)
        size = head if whole else 1
        part = [slice(None), slice(None)]
        part[axis] = slice(int(shown[0]) * size, (int(shown[0]) + 1) * size)
        if not axis and _exchanged(F, W, groups if whole else at, size):
            order = "the reference's rows in another order"
            text = f"{what} {', '.join(map(str, shown[:3]))} hold each other's weights"
            return Place("the reference's rows in their order", text, order, "row_order")
        factor = _factor(tensor, F, W, (part[0], part[1]), axis, saved=saved)
        text = f"{int(counts.sum())} other codes in {len(shown)} {what} ({', '.join(map(str, shown[:3]))})"
        noun = f"a head's {name}s" if whole else f"a {name}"
        cause = f"{noun} damaged" if factor is None else f"{noun} scaled"
        text += "" if factor is None else f", scaled by {factor:.4g}"
        return Place(f"the nearest codes to the reference's weights, as in the other {name}s", text, cause)
    return None


def _exchanged(F: Array, W: Array, groups: npt.NDArray[np.int64], size: int) -> bool:
    """Whether each of these groups of rows holds another group's weights, at less than half of those weights' norm."""
    if not 2 <= len(groups) <= MANY:
        return False
    rows = groups[:, None] * size + np.arange(size)  # (groups, size)
    if rows.max() >= len(W):
        return False
    found, wanted = F[rows].reshape(len(groups), -1), W[rows].reshape(len(groups), -1)
    norms = np.linalg.norm(wanted, axis=1)
    distances = np.array([np.linalg.norm(one - wanted, axis=1) for one in found]) / np.where(norms > 0, norms, np.inf)
    np.fill_diagonal(distances, np.inf)
    return bool((distances.min(axis=1) < HALF).all())


def _crowded(counts: npt.NDArray[np.int64]) -> float:
    """Number of rows (columns) with strange codes, divided by the number that codes at random places would hit.

    1 if there are fewer than `FEWEST` codes or more than half of the rows are hit. Ten codes at random places among 100
    rows hit only five rows once in 10,000 files.
    """
    total, size = int(counts.sum()), len(counts)
    found = int(np.count_nonzero(counts))
    if total < FEWEST or found > MOST * size:
        return 1.0
    return found / (size * -float(np.expm1(total * np.log1p(-1 / size))))


def _factor(
    tensor: GGUFTensor, F: Array, W: Array, part: tuple[slice, slice], axis: int, *, saved: float
) -> float | None:
    """The scale of one group of rows or columns that explains its codes; None if no scale does."""
    square = float(np.vdot(W[part], W[part]))
    factor = float(np.vdot(F[part], W[part])) / square if square else 1.0
    if not factor > LOST_SCALE:
        return None
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[tensor.type]]
    rows, columns = (range(*one.indices(length)) for one, length in zip(part, W.shape, strict=True))
    first, last = columns.start // block, -(-columns.stop // block)  # the blocks that hold the group
    raw = tensor.raw.reshape(len(W), -1, size)[rows.start : rows.stop, first:last]
    around = slice(rows.start, rows.stop), slice(first * block, last * block)
    held = GGUFTensor(tensor.name, W[around].shape, tensor.type, np.ascontiguousarray(raw).reshape(-1))
    inside = slice(0, len(rows)) if not axis else slice(columns.start - first * block, columns.stop - first * block)

    def strange(wanted: Array) -> int:
        found = rounding(held, F[around], wanted, saved=saved)
        assert found is not None  # the tensor has cells
        counts = found.unexplained_rows if tensor.type in STORED_OTHERWISE else (found.rows, found.columns)[axis]
        return int(counts[inside].sum())

    return factor if strange(W[around] * np.float32(factor)) <= EXPLAINED * strange(W[around]) else None


def by_scale(
    kind: str, F: Array, W: Array, sampled: list[Own], at: npt.NDArray[np.int64], heads: Heads
) -> Place | None:
    """A row, column or head whose scale differs from the others' by more than llama.cpp's quantiser causes.

    Args:
        kind: the tensor's type.
        F: the file's values (out, in); W: the reference's.
        sampled: the results of llama.cpp's quantiser on rows `at` (n,).
    """
    E = F - W
    options = [(0, 1, "row"), (1, 1, "column")]
    options += [(0, heads.rows, "head")] if heads.rows > 1 else []
    options += [(1, heads.columns, "head's columns")] if heads.columns > 1 else []
    found = [(group_scale(F, E, axis=axis, size=size), axis, size, name) for axis, size, name in options]
    found.sort(key=lambda one: -one[0].z)  # a whole head has a larger z than its rows
    for group, axis, size, name in found:
        if group.z <= (least := SCALE_Z[name]):
            continue
        if axis:
            most = largest_group_scale(sampled, W[at], axis=1, size=size)
        else:
            own = W[group.index * size : (group.index + 1) * size]
            pairs = zip(own_spread(kind, own), sampled, strict=True)
            most = max(abs(here.scale.value - beside.scale.value) for here, beside in pairs)
        if abs(group.value) > most + LAST_BIT + least * abs(group.value) / group.z:
            text = f"{name} {group.index} scaled by {1 + group.value:.4g} ({group.z:.0f} standard deviations)"
            one = "a head's columns" if axis and size > 1 else f"a {name}"
            if abs(group.value) > 1 - LOST_SCALE:
                return Place(f"weights in every {name}", f"{name} {group.index} is lost", f"{one} damaged")
            return Place(f"one scale in all {name if name.endswith('columns') else name + 's'}", text, f"{one} scaled")
    return None


def by_size(
    tensor: GGUFTensor, F: Array, W: Array, sampled: list[Own], at: npt.NDArray[np.int64], *, rows: bool
) -> Place | None:
    """Rows with a far larger error than the others, or lost columns, or lost blocks.

    Args:
        F: the file's values (out, in); W: the reference's.
        sampled: the results of llama.cpp's quantiser on rows `at` (n,).
        rows: False if the codes explain every row's error: then its size depends on the scales only.
    """
    apart = _rows(tensor.type, F, W, sampled, at) if rows else None
    return apart or _lost_columns(F, W, sampled, at) or _lost_blocks(tensor, F, W)


def _rows(kind: str, F: Array, W: Array, sampled: list[Own], at: npt.NDArray[np.int64]) -> Place | None:
    """Rows whose error, divided by that of llama.cpp's quantiser on the row, is far above that of the sampled rows."""
    errors, weights = (np.linalg.norm(x.astype(np.float64), axis=1) for x in (F - W, W))
    own = largest_row_errors(sampled, W[at])
    used = (own > 0) & (errors[at] > 0)
    if not used.any():
        return None
    usual = np.log(errors[at][used] / own[used])
    middle = float(np.median(usual))
    spread = max(SIGMA * float(np.median(np.abs(usual - middle))), LEAST_SPREAD)
    relative = np.where(weights > 0, errors / np.where(weights > 0, weights, 1), 0)
    some = np.argsort(relative)[-CANDIDATES:]
    again = largest_row_errors(own_spread(kind, W[some]), W[some])
    ratios = errors[some] / np.where(again > 0, again, np.inf)
    z = (np.log(np.maximum(ratios, 1e-30)) - middle) / spread
    if z.max() <= ROW_Z:
        return None
    worst = int(np.argmax(z))
    text = f"row {some[worst]}: {ratios[worst]:.3g} times that error, the others {np.exp(middle):.3g} times"
    return Place(f"weights within the error of {kind} in every row", text, "a row damaged")


def _lost_columns(F: Array, W: Array, sampled: list[Own], at: npt.NDArray[np.int64]) -> Place | None:
    """Columns that hold nothing of the reference: the share of W in F, <F, W> / <W, W>, is nearly zero.

    The size of the error is no evidence: in a lattice of two bits, the error of a column with low importance may exceed
    the column's norm, and still the column points towards the reference.
    """
    share, least = _share(F, W), min(float(_share(one.values, W[at]).min()) for one in sampled)
    bad = share < min(LEFT, least / 2)
    if not bad.any():
        return None
    text = f"{int(bad.sum())} columns are lost, the first is {int(np.argmax(bad))}"
    return Place("columns that hold the reference's", text, "a column damaged")


def _share(F: Array, W: Array) -> Float64:
    """<F, W> / <W, W> of each column (in,); 1 if W is zero."""
    of, norm = np.einsum("oi,oi->i", F, W, dtype=np.float64), np.einsum("oi,oi->i", W, W, dtype=np.float64)
    return np.where(norm > 0, of / np.where(norm > 0, norm, 1), 1.0)


def _lost_blocks(tensor: GGUFTensor, F: Array, W: Array) -> Place | None:
    """Blocks that hold zeros instead of weights, and blocks further from the reference than zeros."""
    block = GGML_QUANT_SIZES[GGMLQuantizationType[tensor.type]][0]
    if F.shape[1] % block:
        return None
    found, weights, errors = (np.linalg.norm(x.reshape(-1, block), axis=1) for x in (F, W, F - W))
    bad = np.flatnonzero((weights > 0) & ((found == 0) | (errors > BEYOND_ZEROS * weights)))
    for at in bad[np.argsort(-weights[bad])][:CANDIDATES]:
        row = W[at * block // W.shape[1]][None]
        place = slice(at * block % W.shape[1], at * block % W.shape[1] + block)
        kept = [one.values[0, place] for one in own_spread(tensor.type, row)]
        if kept and all(np.linalg.norm(one - row[0, place]) < LOST * weights[at] for one in kept):
            text = f"{'zeros' if found[at] == 0 else 'other weights'} in block {at}, one of {len(bad)}"
            in_row = np.count_nonzero(bad * block // W.shape[1] == at * block // W.shape[1])
            cause = "a row damaged" if in_row * block == W.shape[1] else "damaged block"
            return Place(f"weights within the error of {tensor.type} in every block", text, cause)
    return None
