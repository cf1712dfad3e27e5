"""Judges a tensor by the other tensors of its file.

Bytes that differ from this build's own are explained by another quantiser, machine or importance matrix only where the
file's other tensors differ as well. In a file whose tensors are nearly all byte-equal, no other maker explains a
difference: worse blocks are damage, and a tensor of other bytes holds other weights.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Collection

from verification.contract.finding import Finding
from verification.weight_parity.result import TensorResult
from verification.weight_parity.structure.direction import together

SAME_MAKER = 0.9  # share of equal blocks, of the median tensor, from which a file comes from the same quantiser
ROUNDED = "within one rounding of its type"  # proof of a float tensor that is not rounded to nearest everywhere
AGAIN = "convert and quantise the reference again"
_OTHER, _EDITED = "slightly other weights", "flipped bits or edited weights"
# causes that `explain` may sharpen
_DAMAGED = ("damaged block", "a row damaged", "a column damaged", "a head's rows damaged", "a head's columns damaged")
VAGUE = ("", *_DAMAGED, _OTHER, _EDITED)


def held_together(results: list[TensorResult], computed: Collection[str]) -> list[TensorResult]:
    """The results of one file, each judged beside the others.

    Args:
        computed: tensors calculated here with another library's functions: not to the last bit the converter's.
    """
    # tensor by tensor: a large embedding, which no matrix covers, says nothing about the maker of the others
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
    if exact >= SAME_MAKER * (floats - 1):  # one rounding is not enough where all others are exactly rounded
        results = [_other_rounding(r) if _is_rounded_otherwise(r) and r.name not in computed else r for r in results]
    return results


def merged_together(results: list[TensorResult]) -> list[TensorResult]:
    """The results of one file; a change from the base that is missing or doubled in all tensors together is named.

    A change too small to be seen in one tensor adds up over the layers.
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
    """Whether a tensor's own blocks are nearly all the own quantiser's."""
    return 1 - result.blocks_differ / result.blocks >= SAME_MAKER


def _damage(result: TensorResult) -> TensorResult:
    """In a file that otherwise equals the own quantiser's, blocks that fit worse than its own are damage."""
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
    """Whether other bytes can only mean other weights: no other quantiser, machine or importance matrix explains them.

    It must be the odd one out: nine in ten tensors of its type are proven, or of all quantised ones where it has
    fewer than three of its type. Another build or machine differs in all larger tensors of a type, so in such a
    file one flipped bit counts.
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
    """In a file whose maker rounds to nearest, codes that are not the nearest hold other weights."""
    finding = Finding(
        result.name, "the nearest codes to the reference, as in its neighbours", result.open, AGAIN, _OTHER
    )
    return dataclasses.replace(result, findings=(finding,))


def _is_rounded_otherwise(result: TensorResult) -> bool:
    """Within one rounding of a float type, but not the nearest number."""
    return bool(result.roundings) and result.proof == ROUNDED and not result.findings


def _other_rounding(result: TensorResult) -> TensorResult:
    text = f"weights up to {result.roundings:.3g} roundings off"
    finding = Finding(result.name, "the nearest numbers of its type, as in its neighbours", text, AGAIN, _EDITED)
    return dataclasses.replace(result, findings=(finding,))
