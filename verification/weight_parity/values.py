"""One tensor's values against the expected ones, within what its type allows.

Float types: within one rounding. Quantised types: the bytes that llama.cpp's quantiser gives for the expected values;
where they differ (importance matrix, other build), the error may be 1.5 times the own quantiser's (measured: 1.06 with
a random importance matrix) and no weight may be off by more than half the largest of its block (a step of a 4-bit type
is at most an eighth of it). In a file whose other tensors are byte-equal, no other maker explains a difference.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from verification.contract.file_structure import F16_MAX
from verification.contract.finding import Finding
from verification.engines.quantise import quantised_bytes
from verification.gguf.reader import FLOAT_TYPES, GGUFTensor
from verification.weight_parity import expected
from verification.weight_parity.neighbours import AGAIN, DAMAGED, Examined

Array = npt.NDArray[np.float32]
Compared = tuple[Examined, Array | None, Array | None]
WORSE_THAN_OWN = 1.5  # relative error of a tensor, in its own quantiser's
OF_BLOCK = {True: 0.5, False: 1.0}  # largest error in a block, in its largest weight; key: at least 4 bits a weight


def compared(tensor: GGUFTensor, wanted: Array, *, computed: bool) -> Compared:
    """What was found, the tensor's values and the own quantiser's (None where they had not to be computed).

    `wanted`: the expected values, in the tensor's shape; `computed`: by a formula (RoPE factors), not stored anywhere.
    """
    return _float(tensor, wanted, computed=computed) if tensor.type in FLOAT_TYPES else _quant(tensor, wanted)


def _float(tensor: GGUFTensor, wanted: Array, *, computed: bool) -> Compared:
    """A tensor in a float type."""
    raw = quantised_bytes(wanted, tensor.type)
    if raw is not None and np.array_equal(raw, tensor.raw) and bool(np.isfinite(wanted).all()):
        values = tensor.values()
        if np.isfinite(values).all():
            flushed = int(np.count_nonzero(wanted) - np.count_nonzero(values))
            exact = Examined(tensor.name, tensor.type, compared=True, equal=True, size=wanted.size, flushed=flushed)
            return exact, values, None
    values = tensor.values()
    with np.errstate(invalid="ignore"):
        difference = np.nan_to_num(np.abs(values - wanted), nan=np.inf, posinf=np.inf)
    worst = expected.roundings(difference, wanted, tensor.type, computed=computed)
    norm = float(np.linalg.norm(wanted)) or 1.0
    error = float(np.linalg.norm(difference)) / norm
    overflow = int(np.count_nonzero(np.abs(wanted) > F16_MAX)) if tensor.type == "F16" else 0
    flushed = int(np.count_nonzero((values == 0) & (wanted != 0)))
    findings = []
    if worst is not None and not worst <= 1:
        at = np.unravel_index(int(np.argmax(difference)), difference.shape)
        place = ", ".join(map(str, at))
        findings.append(
            Finding(tensor.name, f"{wanted[at]:.6g} at [{place}] within one rounding of {tensor.type}",
                    f"{values[at]:.6g}, relative error of the tensor {error:.2g}", AGAIN,
                    "F16 overflow" if overflow else "")
        )  # fmt: skip
    result = Examined(
        tensor.name, tensor.type, compared=True, equal=not findings, rel_error=error, roundings=worst,
        size=wanted.size, clipped=overflow, flushed=flushed, findings=tuple(findings),
    )  # fmt: skip
    return result, values, None


def _quant(tensor: GGUFTensor, wanted: Array) -> Compared:
    """A tensor in a quantised type."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[tensor.type]]
    blocks = tensor.raw.size // block_bytes
    own = None
    # llama-quantize starts from a float file: usually F16, or the values themselves (F32, BF16 of a bfloat16 reference)
    with np.errstate(over="ignore"):
        half = wanted.astype(np.float16).astype(np.float32)
    for start in (half, wanted):
        raw = quantised_bytes(start, tensor.type)
        if raw is None:
            break
        differ = int(np.count_nonzero((raw != tensor.raw).reshape(blocks, -1).any(axis=1)))
        if differ == 0 and np.isfinite(start).all():
            return Examined(tensor.name, tensor.type, compared=True, equal=True, blocks=blocks), None, None
        own = raw if own is None else own
    values = tensor.values()
    if not np.isfinite(values).all():  # counted and named by the finite check
        return Examined(tensor.name, tensor.type, compared=True, blocks=blocks, blocks_differ=blocks), values, None
    norm = float(np.linalg.norm(wanted)) or 1.0
    error = float(np.linalg.norm(values - wanted)) / norm
    findings = []
    own_values, own_error, differ, damaged = None, None, blocks, 0
    if own is not None:
        own_values = dataclasses.replace(tensor, raw=own).values()
        own_error = float(np.linalg.norm(own_values - wanted)) / norm
        unequal = (own != tensor.raw).reshape(blocks, -1).any(axis=1)
        mine = ((values - wanted) ** 2).reshape(blocks, -1).sum(axis=1)
        theirs = ((own_values - wanted) ** 2).reshape(blocks, -1).sum(axis=1)
        differ = int(np.count_nonzero(unequal))
        damaged = int(np.count_nonzero(unequal & (mine > DAMAGED * theirs)))
        if error > WORSE_THAN_OWN * own_error:
            findings.append(
                Finding(tensor.name, f"relative error near {own_error:.2g}, as {tensor.type} gives for the reference",
                        f"{error:.2g}", AGAIN)
            )  # fmt: skip
    within = np.abs(values - wanted).reshape(blocks, block).max(axis=1)
    largest = np.abs(wanted).reshape(blocks, block).max(axis=1)
    share = OF_BLOCK[8 * block_bytes / block >= 4]
    outside = within > share * largest
    if outside.any() and not findings:
        at = int(np.argmax(within / np.maximum(largest, 1e-30)))
        findings.append(
            Finding(tensor.name, f"weights within {share * largest[at]:.3g} of the reference in block {at}",
                    f"{within[at]:.3g} off", AGAIN, "damaged block")
        )  # fmt: skip
    result = Examined(
        tensor.name, tensor.type, compared=True, rel_error=error, own_error=own_error, blocks=blocks,
        blocks_differ=differ, blocks_damaged=damaged, findings=tuple(findings),
    )  # fmt: skip
    return result, values, own_values
