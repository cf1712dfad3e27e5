"""The outcome of one tensor, and what its neighbours say of it.

Bytes that differ from this build's own are explained by another quantiser, machine or importance matrix only where the
file's other tensors differ as well. In a file whose tensors are nearly all byte-equal, no other maker explains a
difference: worse blocks are damage, and a tensor of other bytes holds other weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass

from verification.contract.finding import Finding
from verification.weight_parity.hypotheses import Nearest
from verification.weight_parity.residual_rotation import Residual

DAMAGED = 1.2  # squared error of a block, in its own quantiser's
SINGLE_BLOCKS = 1e-3  # share of a tensor's blocks that the last bit of another machine's arithmetic may change
SAME_MAKER = 0.9  # share of equal blocks from which the file is taken to come from the same quantiser
AGAIN = "convert and quantise the reference again"
_OTHER, _EDITED = "slightly other weights", "flipped bits or edited weights"
VAGUE = ("", "damaged block", _OTHER, _EDITED)  # causes that `causes` may sharpen


@dataclass(frozen=True)
class Examined:
    """One tensor's outcome."""

    name: str
    type: str
    compared: bool  # with the reference's values
    equal: bool = False  # every weight is what the type's own rounding or quantiser gives
    rel_error: float | None = None
    own_error: float | None = None  # of the type's own quantiser on the same values
    roundings: float | None = None  # worst weight, float types
    blocks: int = 0
    blocks_differ: int = 0
    blocks_damaged: int = 0
    size: int = 0
    clipped: int = 0  # weights beyond F16's range
    flushed: int = 0  # weights that became zero
    nearest: tuple[Nearest, ...] = ()
    residual: Residual | None = None
    findings: tuple[Finding, ...] = ()


def held_together(results: list[Examined], computed: Collection[str]) -> list[Examined]:
    """The results of one file, each held against the others.

    Args:
        computed: tensors calculated here with another library's functions: not to the last bit the converter's.
    """
    blocks = sum(r.blocks for r in results)
    same_maker = blocks > 0 and 1 - sum(r.blocks_differ for r in results) / blocks >= SAME_MAKER
    results = [_damage(r) if same_maker and r.blocks_damaged else r for r in results]
    results = [_other_weights(r) if _stands_out(r, results) else r for r in results]
    exact = sum(r.compared and r.equal and r.roundings is None and not r.blocks for r in results)
    floats = sum(r.compared and not r.blocks for r in results)
    if exact >= SAME_MAKER * (floats - 1):  # one rounding is not enough where all others are exactly rounded
        results = [_other_rounding(r) if _is_rounded_otherwise(r) and r.name not in computed else r for r in results]
    return results


def _damage(result: Examined) -> Examined:
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


def _stands_out(result: Examined, results: list[Examined]) -> bool:
    """Whether other bytes can only mean other weights: no other quantiser, machine or importance matrix explains them.

    Q8_0 knows no importance matrix and is the same on every machine. Of another type the tensor must be the odd one
    out: nine in ten tensors of its type equal, and more than single blocks of its own differ.
    """
    if result.equal or result.findings or not result.blocks_differ or result.own_error is None:
        return False
    if result.type == "Q8_0":
        return True
    alike = [r for r in results if r.type == result.type and r.name != result.name and r.blocks]
    equal = sum(r.equal for r in alike)
    odd = len(alike) >= 3 and equal >= SAME_MAKER * len(alike)
    return odd and result.blocks_differ > max(1.0, SINGLE_BLOCKS * result.blocks)


def _other_weights(result: Examined) -> Examined:
    left = result.residual
    rotated = f"; rotation left over {left.rms:.1g} rad" if left is not None else ""
    text = f"{result.blocks_differ} of {result.blocks} blocks differ{rotated}"
    finding = Finding(
        result.name, "the bytes that the quantiser gives for the reference, as in its neighbours", text, AGAIN,
        _OTHER,
    )  # fmt: skip
    return dataclasses.replace(result, findings=(finding,))


def _is_rounded_otherwise(result: Examined) -> bool:
    """Within one rounding of a float type, but not the nearest number."""
    return bool(result.roundings) and not result.blocks and not result.findings


def _other_rounding(result: Examined) -> Examined:
    text = f"weights up to {result.roundings:.3g} roundings off"
    finding = Finding(result.name, "the nearest numbers of its type, as in its neighbours", text, AGAIN, _EDITED)
    return dataclasses.replace(result, equal=False, findings=(finding,))
