"""A quantised tensor whose bytes nothing proves: is what differs rounding, or other weights?

Size: the relative error may be what the own quantiser reaches on *this* tensor at this type under several importance
matrices (none, log-normal ones), and 1.1 times that. Up to 2 times the own error a quantiser that chooses which way to
round may leave (GPTQ, AutoRound: an error uniform over a whole step instead of half a step, sqrt(1/3) / sqrt(1/12) = 2)
in order to lower the error of the layer's output, so such a tensor is *open* until the output's error is known. Beyond,
no quantiser explains it. The same holds of every row, so that damage in a few rows does not drown in the rest: a row's
error may be `CHOSEN` times the largest that the own quantiser reaches on a row under these matrices, in its own without
one; and no column may be lost. `structure` looks for structure in the error; each estimate is compared with its
standard error and with the own quantiser's on the same rows, because matrices and searches bias it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from verification.contract.finding import Code, Finding
from verification.engines.quantise import WRITTEN, quantised_bytes
from verification.gguf.reader import GGUFTensor
from verification.weight_parity.neighbours import AGAIN
from verification.weight_parity.structure.direction import Direction, direction
from verification.weight_parity.structure.low_rank import LowRank, low_rank
from verification.weight_parity.structure.scale import GROUP_Z, Scale, group_scale, scale
from verification.weight_parity.structure.shift import Shift, shift

Array = npt.NDArray[np.float32]
MARGIN = 1.1  # on the largest error under the matrices tried: others exist
CHOSEN = 2.0  # error of a quantiser that rounds up or down at will, in the nearest rounding's
SAMPLED = 64  # rows that are quantised under other matrices
SPREADS = (1.0, 1.0, 1.5)  # of the log-normal matrices; real ones have about 1
CERTAIN = 6.0  # standard errors: P(|z| > 6) over 300 tensors and 4 estimators is 2e-6
# A column is lost where it is not nearer to the reference's than zeros are (1, less what noise may take away), and the
# own quantiser keeps half of it. Neither is derived. Healthy, eight types and three matrices of weights (256 rows): no
# alarm of rows or columns under log-normal matrices of spread 1 and 1.5 (48 trials), two under spread 2 (24 trials)
LOST, KEPT = 0.9, 0.5
# weights that share a scale: the unit in which errors are independent
UNIT = {"Q2_K": 16, "Q3_K": 16, "Q6_K": 16, "NVFP4": 16, "IQ1_S": 32, "IQ1_M": 16, "IQ2_XS": 16, "IQ2_S": 16}


@dataclass(frozen=True)
class Judgement:
    """What the error of one tensor looks like."""

    ratio: float  # error in the own quantiser's
    allowed: float  # of that ratio
    scale: Scale
    shift: Shift
    low_rank: LowRank | None
    direction: Direction | None
    findings: tuple[Finding, ...]
    open: str  # why only the layer's output can decide; "" where it need not

    @property
    def explanation(self) -> str:
        return f"by size and structure of its error, {self.ratio:.3g} times the own quantiser's"


@dataclass(frozen=True)
class _Own:
    """The own quantiser on a few rows under one matrix."""

    error: float
    scale: Scale
    shift: Shift
    rows: float  # largest scale of a row, less the median
    columns: float
    row_errors: npt.NDArray[np.float64]  # (rows,): norms of the error


def judge(
    tensor: GGUFTensor,
    values: Array,
    wanted: Array,
    *,
    own: Array | None = None,
    base: Array | None = None,
    head: int = 1,
) -> Judgement:
    """Judge a quantised tensor by its error.

    Args:
        values: F, what the tensor dequantises to; `wanted` W, of its shape.
        own: what the own quantiser's bytes mean, of its shape; None quantises W without a matrix.
        base: the base's weight, for the known direction.
        head: rows a head (q, k, v), for scales of heads.
    """
    F, W = (x.reshape(-1, x.shape[-1]) for x in (values, wanted))
    E = F - W
    at = np.unique(np.linspace(0, len(W) - 1, min(len(W), SAMPLED)).astype(np.int64))
    spread = _own_spread(tensor.type, W[at])
    mine = _own_values(tensor.type, W, None) if own is None else own.reshape(W.shape)
    block = UNIT.get(tensor.type, 32)
    norm = float(np.linalg.norm(W)) or 1.0
    error = float(np.linalg.norm(E)) / norm
    reached = max((one.error for one in spread), default=0.0)
    plain = spread[0].error if spread else error
    here = float(np.linalg.norm(E[at])) / (float(np.linalg.norm(W[at])) or 1.0)
    ratio = here / plain if plain else (1.0 if not here else np.inf)
    if mine is not None and (whole_own := float(np.linalg.norm(mine - W))):
        ratio = max(ratio, float(np.linalg.norm(E)) / whole_own)  # the sampled rows do not stand for the others
    allowed = MARGIN * reached / plain if plain else 1.0
    found = [scale(F, E), shift(W, E)]
    spectrum = low_rank(F, E, block=block)
    along = None if base is None else _along(tensor, F, W, W - base.reshape(W.shape), at, block)
    findings: list[Finding] = []
    whole, moved = found[0], found[1]
    assert isinstance(whole, Scale)
    assert isinstance(moved, Shift)
    if along is not None and along.detected:  # less what the own quantiser loses of the change itself
        findings.append(_finding(tensor, "the change from the base once", along.cause, along.cause, "merge"))
    if spread:
        findings += _scales(tensor, F, E, whole, spread, head)
        most = max(abs(one.shift.value) for one in spread)
        limit = 3 * most + CERTAIN * max(one.shift.standard_error for one in spread)
        if abs(moved.value) > limit:
            text = f"{moved.value:.2g} of the weights' root mean square added to all (at most {limit:.1g})"
            findings.append(_finding(tensor, "weights that are not shifted", text, "shifted"))
    if spectrum is not None and spectrum.detected and not findings and not _loses(tensor, W, spectrum, block):
        text = (
            f"a leading singular value {spectrum.leading:.3g} times that of rounding (at most {spectrum.threshold:.3g})"
        )
        findings.append(
            _finding(tensor, "an error without a low-rank part", text, "a low-rank part too much or missing")
        )
    if spread and not findings:
        findings += _parts(tensor, W, E, None if mine is None else mine - W, at, spread)
    if ratio > max(CHOSEN, allowed) and not findings:
        findings.append(
            Finding(
                tensor.name,
                f"relative error near {plain:.2g}, as {tensor.type} gives for the reference",
                f"{error:.2g}",
                AGAIN,
            )
        )
    why = ""
    if not findings and ratio > allowed:
        why = f"error {ratio:.3g} times the own quantiser's, {allowed:.3g} without error feedback"
    elif not findings and spectrum is not None and spectrum.coloured and spectrum.leading > spectrum.threshold:
        why = "the error's spectrum is coloured, as by error feedback"
    return Judgement(ratio, allowed, whole, moved, spectrum, along, tuple(findings), why)


def _scales(tensor: GGUFTensor, F: Array, E: Array, whole: Scale, own: Sequence[_Own], head: int) -> list[Finding]:
    """Rows, heads and columns that stand out of the tensor, then the tensor itself."""
    options = [(0, 1, "row"), (1, 1, "column")] + ([(0, head, "head")] if head > 1 else [])
    for axis, size, name in options:
        group = group_scale(F, E, axis=axis, size=size)
        most = max(one.columns if axis else one.rows for one in own)
        if group.z > GROUP_Z and abs(group.value) > 3 * most:
            text = f"{name} {group.index} scaled by {1 + group.value:.4g} ({group.z:.0f} standard errors)"
            return [_finding(tensor, f"one scale in all {name}s", text, f"a {name} scaled")]
    low, high = (pick(one.scale.value for one in own) for pick in (min, max))
    high = max(high, max(one.scale.relative for one in own) ** 2, whole.relative**2)
    margin = (high - low) + CERTAIN * max(one.scale.standard_error for one in own)
    if not low - margin <= whole.value <= high + margin:
        words = f"scaled by {1 / (1 - whole.value):.5g}" if whole.value < 0.9 else "scaled"
        text = f"weights {words} ({low - margin:.1g} to {high + margin:.1g} by a quantiser)"
        return [_finding(tensor, "weights of the reference's scale", text, words)]
    return []


def _parts(
    tensor: GGUFTensor, W: Array, E: Array, own: Array | None, at: npt.NDArray[np.int64], spread: Sequence[_Own]
) -> list[Finding]:
    """Rows whose error no quantiser explains, and columns that are lost.

    Args:
        own: the own quantiser's error on W (rows, in); None where it needs a matrix.
        at: the sampled rows, on which `spread` was measured.
    """
    reached = max(one.error for one in spread)  # where the own error is small by luck, as on a grid
    for axis, name in ((1, "row"), (0, "column")):
        weights, errors = (np.linalg.norm(x.astype(np.float64), axis=axis) for x in (W, E))
        least = reached * weights
        expected = least if own is None else np.maximum(np.linalg.norm(own.astype(np.float64), axis=axis), least)
        expected = np.where(expected > 0, expected, np.inf)  # zeros: held by their block
        ratios = errors / expected
        if axis:
            most = CHOSEN * max(float((one.row_errors / expected[at]).max()) for one in spread)
            bad = ratios > max(most, CHOSEN)
        else:
            bad = (errors >= LOST * weights) & (expected <= KEPT * weights)
        if bad.any():
            worst = int(np.argmax(np.where(bad, ratios, 0)))
            text = f"{int(bad.sum())} {name}s with other ones; {name} {worst}: {ratios[worst]:.3g} times that error"
            wanted = f"weights within the error of {tensor.type} in every {name}"
            return [_finding(tensor, wanted, text, f"a {name} damaged")]
    return []


def _loses(tensor: GGUFTensor, W: Array, spectrum: LowRank, block: int) -> bool:
    """Whether the own quantiser leaves as much of a low-rank part: a small merge into weights on a grid snaps back."""
    plain = _own_values(tensor.type, W, None)
    own = None if plain is None else low_rank(plain, plain - W, block=block)
    return own is not None and spectrum.leading <= MARGIN * own.leading


def _along(
    tensor: GGUFTensor, F: Array, W: Array, change: Array, at: npt.NDArray[np.int64], block: int
) -> Direction | None:
    """The known direction, less what the own quantiser leaves of it.

    Weights on the grid of an older quantisation snap back to it, and with them a change smaller than a step. What is
    lost so depends little on the matrix; how much is measured on the sampled rows and added to the error.
    """
    found = direction(F, F - W, change, block=block)
    plain = _own_values(tensor.type, W, None)
    if found is None or plain is None:
        return found
    mine = direction(plain, plain - W, change, block=block)
    assert mine is not None  # the same change
    values = []
    for number, spread in enumerate(SPREADS[: 0 if tensor.type == "Q8_0" else None], 1):
        other = _own_values(tensor.type, W[at], _matrix(W.shape[1], spread, number))
        less = None if other is None else direction(other, other - W[at], change[at], block=block)
        values += [] if less is None else [less.value]
    spread_of = float(np.ptp(values)) if len(values) > 1 else 0.0
    return Direction(
        found.value - mine.value,
        float(np.hypot(np.hypot(found.standard_error, mine.standard_error), spread_of / CERTAIN)),
    )


def _matrix(width: int, spread: float, seed: int) -> Array:
    """A log-normal importance matrix."""
    rng = np.random.default_rng(seed)
    return np.exp(np.float32(spread) * rng.standard_normal(width)).astype(np.float32)


def _own_values(kind: str, W: Array, matrix: Array | None) -> Array | None:
    """What the own quantiser makes of W; None for a type that it does not write, or not without a matrix."""
    raw = quantised_bytes(W, kind, matrix) if kind in WRITTEN and np.isfinite(W).all() else None
    return None if raw is None else GGUFTensor("", W.shape, kind, raw).values()


def _finding(tensor: GGUFTensor, expected: str, found: str, cause: str, code: Code = "") -> Finding:
    return Finding(tensor.name, expected, found, AGAIN, cause, code)


def _own_spread(kind: str, W: Array) -> list[_Own]:
    """The own quantiser on rows W (rows, in), without a matrix first; empty for a type it does not write."""
    found = []
    for number, spread in enumerate((0.0, *SPREADS)):
        matrix = _matrix(W.shape[1], spread, number) if spread else None
        F = _own_values(kind, W, matrix)
        if F is None:
            continue  # a type that is always made with a matrix, or that is not written here
        E = F - W
        norm = float(np.linalg.norm(W)) or 1.0
        rows, columns = (abs(group_scale(F, E, axis=axis).value) for axis in (0, 1))
        errors = np.linalg.norm(E.astype(np.float64), axis=1)
        found.append(_Own(float(np.linalg.norm(E)) / norm, scale(F, E), shift(W, E), rows, columns, errors))
        if kind == "Q8_0":  # the one type that no matrix changes
            break
    return found
