"""Tensors of a candidate as checks: against the checkpoint, and against the oracle's bytes.

The leg `quantise`: a quantised file against the reference re-quantised here, byte by byte, then block by block.

Counted are the tensors that neither equal the oracle's bytes nor hold their type's block bounds (`block_bounds`), so a
file from another build or machine passes with its differences explained, and one from other weights does not. Where
nearly all other tensors are equal, the same build made the file and explains nothing: one flipped bit counts.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass

from verification.contract.finding import as_check
from verification.engines.quantise import nominal_types
from verification.engines.reconversion import Twin, same_bytes
from verification.gate.check import plain_check, zero_check
from verification.gate.report import Check, TensorRow
from verification.gguf.cache import Memory
from verification.gguf.candidate import Candidate
from verification.gguf.reader import FLOAT_TYPES, GGUFFile
from verification.reference.checkpoint import Checkpoint
from verification.weight_parity.block_bounds import Held, hold
from verification.weight_parity.compare import Examination, Sources
from verification.weight_parity.expected import Comparison, compare, inventory, is_known, tensor_row
from verification.weight_parity.neighbours import SAME_MAKER

_IMATRIX_KEY = "quantize.imatrix.file"  # llama-quantize writes it, among others, when it was given a matrix


def quantise_checks(candidate: Candidate, twin: Twin) -> list[Check]:
    """The leg's checks for one candidate; none for a float file."""
    if candidate.file.is_float:
        return []
    file = candidate.file
    differing = [name for name in file.tensors if not same_bytes(file, twin.file, name)]
    foreign = [name for name in differing if not _comparable(file, twin, name)]
    held = [
        hold(file.tensors[name], twin.file.tensors[name], twin.source.tensors[name], imatrix=twin.imatrix)
        for name in differing
        if name not in foreign
    ]
    beyond = [tensor for tensor in held if not tensor.within or _same_maker(file, tensor, set(differing))]
    equal = len(file.tensors) - len(differing)
    parts = [f"{equal} of {len(file.tensors)} tensors equal the reference re-quantised here {twin.made}, byte for byte"]
    if foreign:
        parts.append(f"{_other_form(file, twin, foreign[0])}{f' and {len(foreign) - 1} more' if foreign[1:] else ''}")
    if beyond:
        worst = max(beyond, key=lambda t: (t.beyond, t.differ / t.blocks))
        parts.append(f"worst {worst}")
    if within := [tensor for tensor in held if tensor not in beyond]:
        parts.append(f"explained by another build or machine: {_summary(within)}")
    if foreign or beyond:
        parts.append(_advice(file, twin))
    return [
        plain_check(
            "quantise.tensors_differ",
            "Tensors that the re-quantised reference does not explain",
            len(foreign) + len(beyond),
            subject=candidate.label,
            detail=". ".join(parts),
        )
    ]


def _same_maker(file: GGUFFile, tensor: Held, differing: set[str]) -> bool:
    """Whether the tensor's neighbours say that the same quantiser made them: then another build explains nothing.

    Another build differs in all larger tensors of a type. Neighbours are the tensors of the same type, or all quantised
    ones where it has fewer than three.
    """
    quantised = [t for t in file.tensors.values() if t.name != tensor.name and t.type not in FLOAT_TYPES]
    alike = [t for t in quantised if t.type == tensor.type]
    alike = alike if len(alike) >= 3 else quantised
    return len(alike) >= 3 and sum(t.name not in differing for t in alike) >= SAME_MAKER * len(alike)


def _comparable(file: GGUFFile, twin: Twin, name: str) -> bool:
    mine, other, source = file.tensors[name], twin.file.tensors.get(name), twin.source.tensors.get(name)
    return (
        other is not None
        and source is not None
        and (mine.type, mine.shape, mine.shape) == (other.type, other.shape, source.shape)
    )


def _other_form(file: GGUFFile, twin: Twin, name: str) -> str:
    mine, other = file.tensors[name], twin.file.tensors.get(name)
    if other is None:
        return f"{name} is not in the reference"
    return f"{name} is {mine.type} {list(mine.shape)}, the reference re-quantised here {other.type} {list(other.shape)}"


def _summary(tensors: list[Held]) -> str:
    differ, blocks = Counter[str](), Counter[str]()
    for tensor in tensors:
        differ[tensor.type] += tensor.differ
        blocks[tensor.type] += tensor.blocks
    kinds = ", ".join(f"{kind} {differ[kind]} of {blocks[kind]} blocks" for kind in sorted(differ))
    bits = sum(tensor.last_bit for tensor in tensors)
    return (
        f"{len(tensors)} tensors ({kinds}; {bits} of them in the scale's last bit only), largest difference "
        f"{max(t.largest for t in tensors):.2g} of a block's rms, error at most "
        f"{max(t.worst_ratio for t in tensors):.3g} times the oracle's"
    )


def _advice(file: GGUFFile, twin: Twin) -> str:
    named = file.metadata.get(_IMATRIX_KEY)
    if named is not None and not twin.imatrix:
        return f"The file says it was quantised with the importance matrix {named}: give it with --imatrix"
    if twin.imatrix:
        return "Other weights, another importance matrix, or options of llama-quantize made this file"
    return "Other weights, an importance matrix (--imatrix), or options of llama-quantize made this file"


@dataclass(frozen=True)
class WeightResult:
    """Checks by leg, and the rows of the report's tensor table."""

    contract: list[Check]
    convert: list[Check]
    rows: list[TensorRow]


def weight_checks(
    candidate: Candidate,
    oracle: GGUFFile,
    checkpoint: Checkpoint,
    *,
    sources: Sources | None = None,
    memory: Memory | None = None,
) -> WeightResult:
    """Inventory, a float file's roundings, and the nearest hypothesis of every attention tensor.

    A quantised file's bytes are the leg `quantise`.

    Args:
        oracle: the reference converted and quantised here, in the candidate's own file type.
        sources: the reference with its base and rotations, for the hypotheses that need them.
        memory: tensors that were examined before, against the same sources.
    """
    label, file = candidate.label, candidate.file
    found = inventory(checkpoint, file)
    results = compare(checkpoint, file, found, oracle, memory=memory)
    nominal = {row.name: row.nominal for row in nominal_types(file)}
    rows = [tensor_row(label, result, file, nominal[result.name]) for result in results]
    lost = sorted(set(found.missing) | (set(oracle.tensors) - set(file.tensors)))
    unexplained = [result.name for result in results if not result.explained]
    if file.is_float:
        unexplained += _rounded_otherwise(results, set(unexplained))
        unexplained_total = len(unexplained)
    else:  # a quantised tensor without a known mapping is settled by the leg `quantise`, byte by byte
        unexplained = [name for name in unexplained if name not in oracle.tensors]
        unexplained_total = len(unexplained)
    odd = [f"missing {name}" for name in lost] + [f"unexplained {name}" for name in unexplained]
    contract = [
        zero_check(
            "contract.inventory",
            "Tensors missing or unexplained",
            len(lost) + unexplained_total,
            subject=label,
            detail=", ".join(odd[:3]),
        ),
        zero_check(
            "contract.finite_weights",
            "Weights that are NaN or Inf",
            sum(result.non_finite for result in results),
            subject=label,
            detail=next((result.name for result in results if result.non_finite), ""),
        ),
    ]
    if is_known(file):
        named = Examination(file, sources or Sources(checkpoint), found, memory=memory).attention(oracle)
        findings = [finding for result in named for finding in result.findings]
        title = "Attention tensors nearest to something else"
        contract.append(as_check("contract.hypotheses", title, findings, subject=label))
    convert = [_rounding(results, label)] if file.is_float else []
    return WeightResult(contract, convert, rows)


def _rounded_otherwise(results: list[Comparison], known: set[str]) -> list[str]:
    """Tensors within one rounding that are not the oracle's bytes, in a file whose other tensors are.

    Another converter may round otherwise everywhere; a single tensor of other bytes was changed.
    """
    odd = [r.name for r in results if r.bytes_equal is False and r.roundings and r.name not in known]
    return odd if len(odd) <= (1 - SAME_MAKER) * len(results) else []


def _rounding(results: list[Comparison], label: str) -> Check:
    """Worst rounding; infinite where a tensor has neither roundings (a quantised type) nor the oracle's bytes."""
    results = [
        dataclasses.replace(r, roundings=math.inf) if r.roundings is None and not r.bytes_equal else r for r in results
    ]
    measured = [result for result in results if result.roundings is not None]
    by_oracle = sum(result.roundings is None and bool(result.bytes_equal) for result in results)
    worst = max(measured, key=lambda r: r.roundings or 0.0, default=None)
    detail = f"{len(measured)} tensors against the checkpoint, {by_oracle} by the oracle"
    if worst is not None and worst.roundings:
        detail += f"; worst {worst.name}, relative error {worst.rel_error or 0.0:.2g}"
    value = worst.roundings if worst is not None else (0.0 if by_oracle == len(results) else None)
    return plain_check(
        "convert.rounding", "Worst weight, in roundings of its type", value, subject=label, detail=detail
    )
