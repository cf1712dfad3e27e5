"""Judges a quantised tensor that is not proven: is its error rounding, or does the tensor hold other weights?

Codes: if the maker rounds to nearest, as llama.cpp does with any importance matrix, every code is the nearest to the
reference on the file's own scales (`structure.rounding`). Such a tensor can differ in its scales only.
Size: the relative error may be as large as that of llama.cpp's quantiser on *this* tensor with several matrices. An
error up to 2 times that of llama.cpp's quantiser may come from a quantiser that chooses which way to round (GPTQ,
AutoRound: an error uniform over a whole step instead of half a step, sqrt(1/3) / sqrt(1/12) = 2) in order to lower the
error of the layer's output. Such a tensor is *open* until the output's error is known. No quantiser explains a larger
error. `places` looks for faulty parts of the tensor, `structure` for structure in the error. Each estimate is compared
with its standard error and with the same estimate for llama.cpp's quantiser on the same rows, because matrices and
searches bias it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from verification.contract.file_structure import F16_MAX
from verification.contract.finding import Code, Finding
from verification.gguf.reader import GGUFTensor
from verification.weight_parity.neighbours import AGAIN
from verification.weight_parity.own_quantiser import SAMPLED, SPREADS, Own, log_normal, own_spread, own_values
from verification.weight_parity.places import EXPLAINED, Heads, Place, by_codes, by_scale, by_size
from verification.weight_parity.structure.direction import Direction, direction
from verification.weight_parity.structure.low_rank import LowRank, low_rank
from verification.weight_parity.structure.rounding import STORED_OTHERWISE, Rounding, rounding
from verification.weight_parity.structure.scale import Scale, scale
from verification.weight_parity.structure.shift import Shift, shift

Array = npt.NDArray[np.float32]
CHOSEN = 2.0  # error of a quantiser that may round up or down, divided by that of rounding to nearest
CERTAIN = 6.0  # standard errors: P(|z| > 6) over 300 tensors and 4 estimators is 2e-6
# largest leading singular value, divided by that of llama.cpp's quantiser: weights on a grid snap back in both
GRID = 1.1
# error of weights on a grid, divided by that of the same weights in another order; equal within 5 % without a grid
OFF_GRID = 0.5
UNEXPLAINED = 1e-3  # share of groups whose codes no scale gives; a rounding quantiser leaves none
# number of weights that share a scale: errors of different groups are independent
UNIT = {"Q2_K": 16, "Q3_K": 16, "Q6_K": 16, "NVFP4": 16, "IQ1_S": 32, "IQ1_M": 16, "IQ2_XS": 16, "IQ2_S": 16}


@dataclass(frozen=True)
class Judgement:
    """The size and structure of one tensor's error."""

    ratio: float  # error, divided by that of llama.cpp's quantiser
    allowed: float  # largest ratio without error feedback
    scale: Scale
    shift: Shift
    low_rank: LowRank | None
    direction: Direction | None
    findings: tuple[Finding, ...]
    open: str  # why only the layer's output can decide; "" if the weights decide
    nearest: bool | None = None  # whether every code is the nearest on the file's own scales; None: codes have no cells

    @property
    def explanation(self) -> str:
        if self.nearest:
            return "every code is the nearest to the reference on the file's own scales"
        return f"by size and structure of its error, {self.ratio:.3g} times the own quantiser's"


def judge(
    tensor: GGUFTensor,
    values: Array,
    wanted: Array,
    *,
    own: Array | None = None,
    base: Array | None = None,
    heads: Heads = Heads(),  # noqa: B008 (frozen)
    saved: float = 0.0,
) -> Judgement:
    """Judge a quantised tensor by its error.

    Args:
        values: F, the tensor's dequantised values; `wanted` W has the same shape.
        own: the dequantised values of llama.cpp's quantiser, same shape; None quantises the sampled rows only.
        base: the base's weight, for the known direction.
        saved: half a rounding of the type that the reference is saved in, relative.
    """
    F, W = (x.reshape(-1, x.shape[-1]) for x in (values, wanted))
    E = F - W
    at = np.unique(np.linspace(0, len(W) - 1, min(len(W), SAMPLED)).astype(np.int64))
    spread = own_spread(tensor.type, W[at])
    block = UNIT.get(tensor.type, 32)
    error = float(np.linalg.norm(E)) / (float(np.linalg.norm(W)) or 1.0)
    ratio, allowed = _size(E, W, at, spread, own)
    whole, moved = scale(F, E), shift(W, E)
    along = None if base is None else _along(tensor, F, W, W - base.reshape(W.shape), at, block)
    codes = rounding(tensor, F, W, saved=saved)
    nearest = codes is not None and not codes.count
    findings: list[Finding] = _clipped(tensor, F, W)
    spectrum = None
    off_grid = 0.0  # not measured
    # `along` excludes the part of the change that llama.cpp's quantiser loses too
    if (
        along is not None
        and along.detected
        and not findings
        and _left_of(ratio, along, E, W, base) <= max(CHOSEN, allowed)
    ):
        findings.append(_finding(tensor, "the change from the base once", along.cause, along.cause, "merge"))
    if codes is not None and codes.count and not findings:
        findings += _placed(tensor, by_codes(tensor, F, W, codes, heads, saved=saved))
    if not nearest or tensor.type == "Q8_0":  # Q8_0: the codes' tolerance is many standard errors
        spectrum = low_rank(F, E, block=block)
        if spread and not findings:
            findings += _placed(tensor, by_scale(tensor.type, F, W, spread, at, heads))
        if not findings:
            findings += _structure(tensor, F, W, E, whole, moved, spread, spectrum, block)
    if codes is not None and codes.count and not findings:
        findings += _scaled(tensor, F, W, codes, whole, saved=saved)
    elif nearest and spread and not findings:
        off_grid = _off_grid(tensor.type, W[at])
        if spread[0].error < OFF_GRID * off_grid:  # dequantised weights, whose errors lie far inside their cells
            findings += _placed(tensor, by_scale(tensor.type, F, W, spread, at, heads))
    if spread and not findings:
        explained = codes is not None and not codes.unexplained and (nearest or tensor.type in STORED_OTHERWISE)
        findings += _placed(tensor, by_size(tensor, F, W, spread, at, rows=not explained))
    if ratio > max(CHOSEN, allowed) and not findings:
        plain = f"relative error near {spread[0].error if spread else 0:.2g}, as {tensor.type} gives for the reference"
        findings.append(Finding(tensor.name, plain, f"{error:.2g}", AGAIN))
    why = ""
    if not findings:
        why = _open(tensor, F, W, codes, spectrum, saved=saved)
        if not why and ratio > allowed and not _misses_grid(tensor.type, ratio, spread, off_grid):
            why = f"error {ratio:.3g} times the own quantiser's, {allowed:.3g} without error feedback"
    return Judgement(
        ratio, allowed, whole, moved, spectrum, along, tuple(findings), why, None if codes is None else nearest
    )


def _misses_grid(kind: str, ratio: float, spread: Sequence[Own], off_grid: float) -> bool:
    """Whether nearest codes with more error than those of llama.cpp's quantiser have no more than off a grid.

    On a grid the search for a block's scale finds the grid or misses it. A build that contracts a * b + c misses it
    more often: its Q5_K tensors of dequantised weights have up to 1.33 times the error. Q8_0 has no search.
    """
    return kind != "Q8_0" and bool(off_grid) and ratio * spread[0].error <= off_grid


def _off_grid(kind: str, W: Array) -> float:
    """The relative error of llama.cpp's quantiser on the same weights, each row in another order."""
    mixed = own_values(kind, shuffled := np.random.default_rng(0).permuted(W, axis=1))
    return 0.0 if mixed is None else _relative(mixed - shuffled, shuffled)


def _relative(E: Array, W: Array) -> float:
    return float(np.linalg.norm(E)) / (float(np.linalg.norm(W)) or 1.0)


def _size(
    E: Array, W: Array, at: npt.NDArray[np.int64], spread: Sequence[Own], own: Array | None
) -> tuple[float, float]:
    """(the error divided by that of llama.cpp's quantiser, the largest such ratio that a matrix explains)."""
    here = float(np.linalg.norm(E[at])) / (float(np.linalg.norm(W[at])) or 1.0)
    plain = spread[0].error if spread else here
    ratio = here / plain if plain else (1.0 if not here else np.inf)
    if own is not None and (whole := float(np.linalg.norm(own.reshape(W.shape) - W))):
        ratio = max(ratio, float(np.linalg.norm(E)) / whole)  # the other rows may differ from the sampled ones
    reached = max((one.error for one in spread), default=0.0)
    if not plain:
        return ratio, 1.0
    # the spread over the rows bounds how much another matrix of the same width, or the other rows, may add
    rows = np.linalg.norm(spread[-1].values - W[at], axis=1) if spread else np.ones(1)
    return ratio, reached / plain * (1 + CERTAIN * float(rows.std() / (rows.mean() or 1.0)) / float(np.sqrt(len(rows))))


def _structure(
    tensor: GGUFTensor,
    F: Array,
    W: Array,
    E: Array,
    whole: Scale,
    moved: Shift,
    spread: Sequence[Own],
    spectrum: LowRank | None,
    block: int,
) -> list[Finding]:
    """A scale, a shift or a low-rank part of the whole tensor that exceeds the values for llama.cpp's quantiser."""
    findings: list[Finding] = []
    if spread:
        low, high = (pick(one.scale.value for one in spread) for pick in (min, max))
        high = max(high, max(one.scale.relative for one in spread) ** 2, whole.relative**2)
        margin = (high - low) + CERTAIN * max(one.scale.standard_error for one in spread)
        if not low - margin <= whole.value <= high + margin:
            words = f"scaled by {1 / (1 - whole.value):.5g}" if whole.value < 0.9 else "scaled"
            text = f"weights {words} ({low - margin:.1g} to {high + margin:.1g} by a quantiser)"
            findings.append(_finding(tensor, "weights of the reference's scale", text, words))
        most = max(abs(one.shift.value) for one in spread)
        limit = 3 * most + CERTAIN * max(one.shift.standard_error for one in spread)
        if abs(moved.value) > limit:
            text = f"{moved.value:.2g} of the weights' root mean square added to all (at most {limit:.1g})"
            findings.append(_finding(tensor, "weights that are not shifted", text, "shifted"))
    if spectrum is not None and spectrum.detected and not findings and not _loses(tensor, W, spectrum, block):
        text = (
            f"a leading singular value {spectrum.leading:.3g} times that of rounding (at most {spectrum.threshold:.3g})"
        )
        cause = "a low-rank part too much or missing"
        findings.append(_finding(tensor, "an error without a low-rank part", text, cause))
    return findings


def _scaled(tensor: GGUFTensor, F: Array, W: Array, codes: Rounding, whole: Scale, *, saved: float) -> list[Finding]:
    """One scale of the whole tensor that makes its codes the nearest."""
    if tensor.type in STORED_OTHERWISE or not whole.value < 0.9:
        return []
    factor = 1 / (1 - whole.value)
    again = rounding(tensor, F, W * np.float32(factor), saved=saved)
    if again is None or again.count > EXPLAINED * codes.count:
        return []
    text = f"the nearest codes to weights scaled by {factor:.5g}"
    return [_finding(tensor, "the nearest codes to the reference's weights", text, f"scaled by {factor:.5g}")]


def _open(
    tensor: GGUFTensor, F: Array, W: Array, codes: Rounding | None, spectrum: LowRank | None, *, saved: float
) -> str:
    """Why the layer's output must decide on codes that are not the nearest; "" if rounding explains the codes."""
    if codes is None:
        if spectrum is not None and spectrum.coloured and spectrum.leading > spectrum.threshold:
            return "the error's spectrum is coloured, as by error feedback"
        return ""
    if not codes.count or (tensor.type in STORED_OTHERWISE and codes.unexplained <= UNEXPLAINED):
        return ""
    if _from_eight_bits(tensor, F, W, saved=saved):
        return ""
    return f"{codes.share:.2g} of the codes are not the nearest to the reference: error feedback, or other weights"


def _clipped(tensor: GGUFTensor, F: Array, W: Array) -> list[Finding]:
    """A weight at float16's end, but not in the reference; even the coarsest type keeps half of a block's largest."""
    largest, wanted = float(np.abs(F).max(initial=0.0)), float(np.abs(W).max(initial=0.0))
    if not largest > F16_MAX / 2 > wanted:
        return []
    cause = "a weight clipped at float16's end"
    return [_finding(tensor, f"weights up to {wanted:.3g}", f"{largest:.3g}", cause, "f16_overflow")]


def _left_of(ratio: float, along: Direction, E: Array, W: Array, base: Array | None) -> float:
    """The error divided by that of llama.cpp's quantiser, without the part along the change from the base.

    Weights of another layer lack the change too, but the rest of their error is larger than rounding.
    """
    assert base is not None  # `along` was measured against it
    square = float(np.vdot(E, E))
    change = along.value**2 * float(np.vdot(W - base.reshape(W.shape), W - base.reshape(W.shape)))
    return ratio * float(np.sqrt(max(1 - change / square, 0.0))) if square else 0.0


def _from_eight_bits(tensor: GGUFTensor, F: Array, W: Array, *, saved: float) -> bool:
    """Whether the codes are the nearest to the weights of a Q8_0 file of the reference: that file was requantised."""
    if W.shape[1] % 32:
        return False
    raw = tensor.raw.reshape(len(W), -1)
    for rows in (slice(0, SAMPLED), slice(SAMPLED, None)):  # the first rows decide nearly always
        if not len(W[rows]):
            continue
        eight = own_values("Q8_0", W[rows])
        part = GGUFTensor(tensor.name, W[rows].shape, tensor.type, raw[rows].reshape(-1))
        again = None if eight is None else rounding(part, F[rows], eight, saved=saved)
        strange = again is None or (again.unexplained if tensor.type in STORED_OTHERWISE else again.count)
        if strange:
            return False
    return True


def _placed(tensor: GGUFTensor, place: Place | None) -> list[Finding]:
    return [] if place is None else [_finding(tensor, place.expected, place.found, place.cause, place.code)]


def _loses(tensor: GGUFTensor, W: Array, spectrum: LowRank, block: int) -> bool:
    """Whether llama.cpp's quantiser leaves a low-rank part too: a small merge into weights on a grid snaps back."""
    plain = own_values(tensor.type, W)
    own = None if plain is None else low_rank(plain, plain - W, block=block)
    return own is not None and spectrum.leading <= GRID * own.leading


def _along(
    tensor: GGUFTensor, F: Array, W: Array, change: Array, at: npt.NDArray[np.int64], block: int
) -> Direction | None:
    """The known direction in the error, minus the same for llama.cpp's quantiser.

    Weights on the grid of an older quantisation snap back to that grid, and a change smaller than a step is lost. The
    loss depends little on the matrix; this dependence is measured on the sampled rows and added to the standard error.
    """
    found = direction(F, F - W, change, block=block)
    plain = own_values(tensor.type, W)
    if found is None or plain is None:
        return found
    mine = direction(plain, plain - W, change, block=block)
    assert mine is not None  # the same change
    values = []
    for number, spread in enumerate(SPREADS[: 0 if tensor.type == "Q8_0" else None], 1):
        other = own_values(tensor.type, W[at], log_normal(W.shape[1], spread, number))
        less = None if other is None else direction(other, other - W[at], change[at], block=block)
        values += [] if less is None else [less.value]
    spread_of = float(np.ptp(values)) if len(values) > 1 else 0.0
    return Direction(
        found.value - mine.value,
        float(np.hypot(np.hypot(found.standard_error, mine.standard_error), spread_of / CERTAIN)),
    )


def _finding(tensor: GGUFTensor, expected: str, found: str, cause: str, code: Code = "") -> Finding:
    return Finding(tensor.name, expected, found, AGAIN, cause, code)
