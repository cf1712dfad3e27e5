"""Judges a tensor by the other tensors of its file.

Another quantiser, machine or importance matrix explains different bytes only if the file's other tensors differ too. If
nearly all tensors of a file have the bytes that this build gives, a difference is a fault: worse blocks are damage, and
a tensor of other bytes holds other weights.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Collection

from verification.contract.finding import Finding
from verification.weight_parity.result import TensorResult
from verification.weight_parity.structure.direction import together

SAME_MAKER = 0.9  # least share of equal blocks in the median tensor of a file from the same quantiser
ROUNDED = "within one rounding of its type"  # proof of a float tensor with weights not rounded to nearest
AGAIN = "convert and quantise the reference again"
_OTHER, _EDITED = "slightly other weights", "flipped bits or edited weights"
# causes that `explain` may replace by a more exact one
_DAMAGED = ("damaged block", "a row damaged", "a column damaged", "a head's rows damaged", "a head's columns damaged")
VAGUE = ("", *_DAMAGED, _OTHER, _EDITED)


def held_together(results: list[TensorResult], computed: Collection[str]) -> list[TensorResult]:
    """The results of one file, each tensor judged by comparison with the others.

    Args:
        computed: tensors calculated here with another library's functions: the last bit may differ from the
            converter's.
    """
    # the median over tensors: a large embedding, which no matrix covers, says nothing about the maker of the others
    equal = [1 - r.blocks_differ / r.blocks for r in results if r.blocks]
    same_maker = bool(equal) and statistics.median(equal) >= SAME_MAKER
    results = [_damage(r) if same_maker and r.blocks_damaged and _nearly_equal(r) else r for r in results]
    results = [_other_weights(r) if _stands_out(r, results) else r for r in results]
    asked = [r for r in results if r.codes_nearest is not None]
    rounds = sum(bool(r.codes_nearest) for r in asked) >= SAME_MAKER * len(asked)
    strange = {r.name for r in asked if rounds and not r.codes_nearest and r.open and not r.findings}
    results = [_other_codes(r) if r.name in strange else r for r in results]
    exact = sum(r.equal and r.proof != ROUNDED and not r.blocks for r in results)
    floats = sum(r.compared and not r.blocks for r in results)
    if exact >= SAME_MAKER * (floats - 1):  # within one rounding is not enough if all others are exact
        results = [_other_rounding(r) if _is_rounded_otherwise(r) and r.name not in computed else r for r in results]
    return results


def merged_together(results: list[TensorResult]) -> list[TensorResult]:
    """The results of one file, with findings if the change from the base is missing or doubled in all tensors.

    Evidence of a change that is too small to see in one tensor adds up over the layers.
    """
    along = [r.along for r in results if r.along is not None]
    whole = together(along)
    if whole is None or not whole.detected or any(one.detected for one in along):
        return results
    text = f"{whole.cause} (+- {whole.standard_error:.2g}, {len(along)} tensors together)"
    return [
        dataclasses.replace(
            r, findings=(Finding(r.name, "the change from the base once", text, AGAIN, whole.cause, "merge"),)
        )
        if r.along is not None and not r.findings
        else r
        for r in results
    ]


def _nearly_equal(result: TensorResult) -> bool:
    """Whether nearly all blocks of a tensor equal those of llama.cpp's quantiser."""
    return 1 - result.blocks_differ / result.blocks >= SAME_MAKER


def _damage(result: TensorResult) -> TensorResult:
    """Add a finding: in a file from llama.cpp's quantiser, blocks with a larger error than its blocks are damage."""
    if result.findings:
        return result
    text = f"{result.blocks_damaged} worse blocks of {result.blocks}"
    finding = Finding(
        result.name,
        "the blocks that the quantiser gives for the reference",
        text,
        AGAIN,
        _EDITED,
    )
    return dataclasses.replace(result, findings=(finding,))


def _stands_out(result: TensorResult, results: list[TensorResult]) -> bool:
    """Whether a tensor's different bytes must be other weights, because its neighbours are proven.

    Nine in ten other tensors of its type must be proven; with fewer than three others of its type, nine in ten of all
    other quantised tensors. Another quantiser, machine or importance matrix would change all larger tensors of a type.
    So in such a file one flipped bit is a fault.
    """
    if result.equal or result.findings or not result.blocks_differ or result.own_error is None:
        return False
    quantised = [r for r in results if r.name != result.name and r.blocks]
    alike = [r for r in quantised if r.type == result.type]
    alike = alike if len(alike) >= 3 else quantised
    return len(alike) >= 3 and sum(r.equal for r in alike) >= SAME_MAKER * len(alike)


def _other_weights(result: TensorResult) -> TensorResult:
    left = result.residual
    rotated = f"; rotation left over {left.rms:.1g} rad" if left is not None else ""
    text = f"{result.blocks_differ} of {result.blocks} blocks differ{rotated}"
    finding = Finding(
        result.name,
        "the bytes that the quantiser gives for the reference, as in its neighbours",
        text,
        AGAIN,
        _OTHER,
    )
    return dataclasses.replace(result, findings=(finding,))


def _other_codes(result: TensorResult) -> TensorResult:
    """Add a finding: in a file whose maker rounds to nearest, codes that are not the nearest hold other weights."""
    finding = Finding(
        result.name, "the nearest codes to the reference, as in its neighbours", result.open, AGAIN, _OTHER
    )
    return dataclasses.replace(result, findings=(finding,))


def _is_rounded_otherwise(result: TensorResult) -> bool:
    """Whether a tensor is within one rounding of its float type, but not at the nearest numbers."""
    return bool(result.roundings) and result.proof == ROUNDED and not result.findings


def _other_rounding(result: TensorResult) -> TensorResult:
    text = f"weights up to {result.roundings:.3g} roundings off"
    finding = Finding(result.name, "the nearest numbers of its type, as in its neighbours", text, AGAIN, _EDITED)
    return dataclasses.replace(result, findings=(finding,))
