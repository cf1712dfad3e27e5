"""Compares one tensor with its expected values: proves it by bytes or values, or measures it for the judge.

Float types are proven within one rounding. A quantised type is proven if llama.cpp's quantiser gives the same bytes for
the expected values at the *file's own type*, from a float form that a quantiser may start from (F16, BF16, F32), with
the importance matrix if one is given; or if the reference itself was dequantised from the file's values. A tensor that
is not proven is compared with the result of llama.cpp's quantiser, for `judge` and `neighbours`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from verification.contract.file_structure import F16_MAX
from verification.contract.finding import Finding
from verification.engines.quantise import quantised_bytes
from verification.gguf.reader import FLOAT_TYPES, GGUFTensor
from verification.weight_parity import expected
from verification.weight_parity.block_bounds import LAST_BIT, hold
from verification.weight_parity.last_bits import damaged_blocks
from verification.weight_parity.neighbours import AGAIN, ROUNDED, SAME_MAKER
from verification.weight_parity.result import TensorResult

Array = npt.NDArray[np.float32]
Raw = npt.NDArray[np.uint8]
SAMPLE = 16  # rows that are quantised first: if their bytes differ, the whole tensor differs
MIXED_UP = 1e-3  # share of weights that may round differently, because dequantisers differ in the last bit


@dataclass(frozen=True)
class Start:
    """A float form of the reference's tensor, as a float GGUF holds it; the quantiser starts from it."""

    name: str  # "F16"
    values: Array


@dataclass(frozen=True)
class Wanted:
    """The expected values of a tensor, and how they were made."""

    values: Array  # before the file's rounding, in the tensor's shape
    starts: Callable[[], Iterator[Start]]
    importance: Array | None = None  # given matrix, (channels,) or (experts * channels,)
    saved_in: str = "F32"  # the type of the reference: F32, F16, BF16
    computed: bool = False  # computed by a formula (RoPE factors), not stored in the checkpoint


@dataclass(frozen=True)
class Measured:
    """A tensor's result, with intermediate values (None if they were not needed)."""

    result: TensorResult
    values: Array | None = None  # the file's dequantised values
    own: Array | None = None  # the dequantised values of llama.cpp's quantiser
    own_raw: Raw | None = None
    start: Start | None = None  # the float form that `own` was quantised from


def compared(tensor: GGUFTensor, wanted: Wanted) -> Measured:
    """Prove a tensor, or measure it."""
    return _float(tensor, wanted) if tensor.type in FLOAT_TYPES else _quant(tensor, wanted)


def _float(tensor: GGUFTensor, wanted: Wanted) -> Measured:
    """A tensor in a float type."""
    target = wanted.values
    raw = quantised_bytes(target, tensor.type)
    if raw is not None and np.array_equal(raw, tensor.raw) and bool(np.isfinite(target).all()):
        values = tensor.values()
        if np.isfinite(values).all():
            flushed = int(np.count_nonzero(target) - np.count_nonzero(values))
            error = _error(values, target)
            exact = TensorResult(
                tensor.name,
                tensor.type,
                compared=True,
                proof=f"as {tensor.type}",
                rel_error=error[0],
                max_abs_error=error[1],
                roundings=expected.roundings(error[2], target, tensor.type),
                size=target.size,
                flushed=flushed,
            )
            return Measured(exact, values)
    values = tensor.values()
    bad = int(values.size - np.count_nonzero(np.isfinite(values)))
    with np.errstate(invalid="ignore"):
        difference = np.nan_to_num(np.abs(values - target), nan=np.inf, posinf=np.inf)
    worst = expected.roundings(difference, target, tensor.type, computed=wanted.computed)
    error_size = norm(difference) / (norm(target) or 1.0)
    overflow = int(np.count_nonzero(np.abs(target) > F16_MAX)) if tensor.type == "F16" else 0
    flushed = int(np.count_nonzero((values == 0) & (target != 0)))
    findings = []
    if worst is not None and not worst <= 1:
        at = np.unravel_index(int(np.argmax(difference)), difference.shape)
        place = ", ".join(map(str, at))
        findings.append(
            Finding(
                tensor.name,
                f"{target[at]:.6g} at [{place}] within one rounding of {tensor.type}",
                f"{values[at]:.6g}, relative error of the tensor {error_size:.2g}",
                AGAIN,
                *(("F16 overflow", "f16_overflow") if overflow else ()),
            )
        )
    result = TensorResult(
        tensor.name,
        tensor.type,
        compared=True,
        rel_error=error_size,
        max_abs_error=float(difference.max(initial=0.0)),
        roundings=worst,
        size=target.size,
        clipped=overflow,
        flushed=flushed,
        non_finite=bad,
        proof="" if findings else ROUNDED,
        findings=tuple(findings),
    )
    return Measured(result, values)


def _quant(tensor: GGUFTensor, wanted: Wanted) -> Measured:
    """A tensor in a quantised type."""
    block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[tensor.type]][1]
    blocks = tensor.raw.size // block_bytes
    nearest: Start | None = None
    fewest = 2.0
    for start in wanted.starts():
        share = _sample_differs(tensor, start, wanted.importance)
        if share == 0 and _same(tensor, start, wanted.importance):
            return Measured(_proven(tensor, wanted, start, blocks), start=start)
        if share is not None and share < fewest:
            nearest, fewest = start, share
    values = tensor.values()
    bad = int(values.size - np.count_nonzero(np.isfinite(values)))
    bare = TensorResult(
        tensor.name, tensor.type, compared=True, blocks=blocks, blocks_differ=blocks, size=values.size, non_finite=bad
    )
    if bad:  # the check of finite weights counts and names these
        return Measured(bare, values)
    if lost := int(wanted.values.size - np.count_nonzero(np.isfinite(wanted.values))):  # these cannot be compared
        numbers = Finding(
            tensor.name,
            "a reference whose weights are numbers",
            f"{lost} of them are NaN or Inf",
            "give the checkpoint that the file was made of",
        )
        return Measured(dataclasses.replace(bare, findings=(numbers,)), values)
    error, largest, _ = _error(values, wanted.values)
    bare = dataclasses.replace(bare, rel_error=error, max_abs_error=largest)
    if _dequantised(values, wanted):
        proof = "the reference is what this tensor dequantises to"
        return Measured(dataclasses.replace(bare, proof=proof, blocks_differ=0), values)
    findings = []
    if wanted.importance is not None and nearest is not None and _same(tensor, nearest, None):
        findings.append(
            Finding(
                tensor.name,
                "the bytes that the importance matrix gives",
                "the bytes without a matrix",
                "give the matrix that the file was made with",
                "another importance matrix",
            )
        )
    own_raw = None if nearest is None else quantised_bytes(nearest.values, tensor.type, wanted.importance)
    own_values, own_error, differ, damaged = None, None, blocks, 0
    if own_raw is not None:
        own_values = dataclasses.replace(tensor, raw=own_raw).values()
        own_error = _error(own_values, wanted.values)[0]
        unequal = (own_raw != tensor.raw).reshape(blocks, -1).any(axis=1)
        differ = int(np.count_nonzero(unequal))
        assert nearest is not None
        if 0 < differ <= (1 - SAME_MAKER) * blocks:  # elsewhere other blocks are another maker's, not damage
            damaged = _damaged(tensor, values, wanted, nearest, own_values, unequal)
        held = hold(tensor, own_raw, nearest.values, imatrix=wanted.importance is not None)
        if held.within and not findings:
            bare = dataclasses.replace(bare, explanation="by another build or machine")
    result = dataclasses.replace(
        bare, own_error=own_error, blocks_differ=differ, blocks_damaged=damaged, findings=tuple(findings)
    )
    return Measured(result, values, own_values, own_raw, nearest)


def _damaged(
    tensor: GGUFTensor, values: Array, wanted: Wanted, start: Start, own: Array, unequal: npt.NDArray[np.bool_]
) -> int:
    """Damaged blocks of a tensor of any number of axes; `unequal` (blocks,): its bytes are not the own quantiser's."""
    asked = unequal & _beyond_last_bit(values.reshape(len(unequal), -1), own.reshape(len(unequal), -1))
    shape = (-1, wanted.values.shape[-1])
    matrices = None if wanted.importance is None else wanted.importance.reshape(shape)
    file, twin, begin, target = (array.reshape(shape) for array in (values, own, start.values, wanted.values))
    return damaged_blocks(tensor, file, twin, begin, target, asked, matrices)


def _beyond_last_bit(values: Array, own: Array) -> npt.NDArray[np.bool_]:
    """Blocks (blocks, values) that differ by more than a float16 scale's last bit, which another processor may move."""
    moved: npt.NDArray[np.bool_] = np.abs(values - own).max(axis=1) > 2 * LAST_BIT * np.abs(own).max(axis=1)
    return moved


def _sample_differs(tensor: GGUFTensor, start: Start, importance: Array | None) -> float | None:
    """Share of a few rows' bytes that differ from the quantiser's; None if the quantiser cannot make the type."""
    experts = len(start.values) if start.values.ndim == 3 else 1
    if experts > 1:  # compare the first expert only
        first = GGUFTensor(tensor.name, tensor.shape[1:], tensor.type, tensor.raw.reshape(experts, -1)[0])
        matrix = None if importance is None else importance[: start.values.shape[-1]]
        return _sample_differs(first, Start(start.name, start.values[0]), matrix)
    rows = len(start.values) if start.values.ndim == 2 else 0
    at = np.unique(np.linspace(0, rows - 1, SAMPLE).astype(np.int64)) if rows > 4 * SAMPLE else None
    if at is None:
        raw = quantised_bytes(start.values, tensor.type, importance, name=tensor.name)
        return None if raw is None else float(np.mean(raw != tensor.raw))
    raw = quantised_bytes(start.values[at], tensor.type, importance, name=tensor.name)
    return None if raw is None else float(np.mean(raw != tensor.raw.reshape(rows, -1)[at].reshape(-1)))


def _same(tensor: GGUFTensor, start: Start, importance: Array | None) -> bool:
    """Whether the quantiser gives the tensor's bytes."""
    raw = quantised_bytes(start.values, tensor.type, importance)
    return raw is not None and bool(np.array_equal(raw, tensor.raw)) and bool(np.isfinite(start.values).all())


def _proven(tensor: GGUFTensor, wanted: Wanted, start: Start, blocks: int) -> TensorResult:
    proof = f"from {start.name}" + ("" if wanted.importance is None else " with the imatrix")
    return TensorResult(tensor.name, tensor.type, compared=True, proof=proof, blocks=blocks, size=wanted.values.size)


def _dequantised(values: Array, wanted: Wanted) -> bool:
    """Whether the reference's weights are the file's values, rounded to the type that the reference is saved in.

    Rounding to nearest is exact, so nearly every weight must be equal; a scale that is wrong by 1e-3 changes a quarter
    of the bfloat16 numbers. Two dequantisers may differ in float32's last bit, which changes single roundings.
    """
    saved = quantised_bytes(values, wanted.saved_in)
    if saved is None or values.size == 0:
        return False
    tensor = GGUFTensor("", values.shape, wanted.saved_in, saved)
    rounded = tensor.values()
    if wanted.saved_in == "F32":  # no rounding: compare up to float32's last bits
        return bool((np.abs(rounded - wanted.values) <= 2.0**-22 * np.abs(wanted.values)).all())
    other = rounded != wanted.values
    if np.count_nonzero(other) > MIXED_UP * values.size:
        return False
    worst = expected.roundings(np.abs(rounded - wanted.values)[other], wanted.values[other], wanted.saved_in)
    return worst is not None and worst <= 2.0  # the neighbouring number


def distance(values: Array, wanted: Array) -> tuple[float, float]:
    """(relative error, largest error) of `values` against `wanted`, both of one shape."""
    relative, largest, _ = _error(values, wanted)
    return relative, largest


def _error(values: Array, wanted: Array) -> tuple[float, float, Array]:
    """(relative error, largest error, every |difference|)."""
    difference = np.abs(values - wanted)
    whole, size = norm(wanted), norm(difference)
    return (size / whole if whole else size), float(difference.max(initial=0.0)), difference


def norm(values: Array) -> float:
    """Root of the sum of squares of an array of any shape, in float64 where float32 overflows.

    Gemma 4's RoPE factors of channels that are not rotated are 1e30.
    """
    with np.errstate(over="ignore"):
        found = float(np.linalg.norm(values))
    return found if np.isfinite(found) else float(np.linalg.norm(values.astype(np.float64)))
