"""Checks of one candidate's weights: inventory, a float file's roundings, a quantised file's proofs.

The leg `quantise` counts the tensors that are not proven (`tensors_differ`, information unless the policy bounds it)
and the tensors that are neither proven nor judged healthy (`unexplained`, which must be zero).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from verification.contract.finding import Finding, as_check, writable
from verification.engines.quantise import Importance, nominal_types
from verification.engines.reconversion import FloatFiles
from verification.gate.check import plain_check, zero_check
from verification.gate.report import BY_CODES, BY_OUTPUT, Check, TensorRow
from verification.gguf.cache import Memory
from verification.gguf.candidate import Candidate
from verification.gguf.reader import GGUFFile
from verification.weight_parity.compare import Examination, Sources
from verification.weight_parity.expected import Inventory, inventory, is_known
from verification.weight_parity.layer_output_error import OpenTensor, OutputError
from verification.weight_parity.recipe import recipe_differences
from verification.weight_parity.result import TensorResult

_IMATRIX_KEY = "quantize.imatrix.file"  # llama-quantize writes this key if it used a matrix
ROTATED = "rotation off"
NORMAL_95 = 1.96  # standard errors on either side of a mean


@dataclass(frozen=True)
class WeightResult:
    """Checks by leg, the rows of the report's tensor table, and notes for the reader."""

    contract: list[Check]
    convert: list[Check]
    quantise: list[Check]
    rows: list[TensorRow]
    results: list[TensorResult]
    open: dict[str, OpenTensor] = field(default_factory=dict)  # tensors that only the layer's output can decide
    notes: list[str] = field(default_factory=list)


def weight_checks(
    candidate: Candidate,
    conversions: FloatFiles,
    sources: Sources,
    *,
    importance: Importance | None = None,
    memory: Memory | None = None,
) -> WeightResult:
    """All checks and results of one candidate's tensors.

    Args:
        conversions: the reference as float GGUF files.
        sources: the reference with its base and rotations.
        importance: the importance matrix that the user says was used for the candidate, by tensor.
        memory: results of tensors that were compared with the same sources before.

    Raises:
        InputError: an importance matrix of another model.
    """
    label, file = candidate.label, candidate.file
    oracle = conversions.file(file.file_type if file.is_float else "F16")
    names = set() if oracle is None else set(oracle.tensors)
    found = inventory(sources.reference, file)
    examination = Examination(file, sources, found, conversions=conversions, importance=importance, memory=memory)
    results = [examination.with_error(result) for result in examination.run()]
    nominal = {row.name: row.nominal for row in nominal_types(file)}
    rows = [tensor_row(label, result, file, nominal[result.name]) for result in results]
    contract = [_inventory(file, found, names, results, label), _finite(results, label)]
    if is_known(file):
        title = "Attention tensors nearest to something else"
        contract.append(as_check("contract.hypotheses", title, hypothesis_findings(results), subject=label))
    if file.is_float:
        return WeightResult(contract, [_rounding(results, label)], [], rows, results)
    differences = recipe_differences(file)
    notes = [f"{label}: {_recipe_note(file, differences)}"] if differences else []
    quantise = quantise_checks(candidate, results, with_matrix=bool(importance))
    undecided = {}
    for result in results:
        wanted = examination.expected(result.name) if result.open and not result.findings else None
        if wanted is not None:
            module = found.source_of.get(result.name, "").removesuffix(".weight")
            tensor, by_codes = file.tensors[result.name], result.codes_nearest is False
            undecided[result.name] = OpenTensor(tensor, wanted, module, by_codes)
    return WeightResult(contract, [], quantise, rows, results, undecided, notes)


def hypothesis_findings(results: Sequence[TensorResult]) -> list[Finding]:
    """Findings that name a nearest wrong hypothesis, or a rotation that is left over."""
    found = []
    for result in results:
        causes = {match.best for match in result.nearest if match.is_fault} | {ROTATED}
        found += [finding for finding in result.findings if finding.cause in causes]
    return found


def _inventory(
    file: GGUFFile, found: Inventory, oracle: set[str], results: Sequence[TensorResult], label: str
) -> Check:
    """Tensors that are missing or unexplained; in a float file also tensors with a fault within one rounding."""
    # of a family that is not mapped by principle, gguf's map alone does not say what a converter writes
    mapped = found.missing if is_known(file) or not oracle else ()
    lost = sorted(set(mapped) | (oracle - set(file.tensors)))
    odd = [r.name for r in results if not r.compared and r.name not in oracle]
    if file.is_float:
        within = [r for r in results if r.compared and r.findings and (r.roundings is None or r.roundings <= 1)]
        odd += [r.name for r in within] + [r.name for r in results if not r.compared and r.name in oracle]
        odd += [r.name for r in results if r.roundings == math.inf and r.compared]
    words = [f"missing {name}" for name in lost] + [f"unexplained {name}" for name in dict.fromkeys(odd)]
    return zero_check(
        "contract.inventory",
        "Tensors missing or unexplained",
        len(words),
        subject=label,
        detail=", ".join(words[:3]),
        where=next(iter([*lost, *odd]), ""),
    )


def _finite(results: Sequence[TensorResult], label: str) -> Check:
    return zero_check(
        "contract.finite_weights",
        "Weights that are NaN or Inf",
        sum(result.non_finite for result in results),
        subject=label,
        detail=(first := next((result.name for result in results if result.non_finite), "")),
        where=first,
    )


def _rounding(results: Sequence[TensorResult], label: str) -> Check:
    """Worst rounding of a float file; infinite if a tensor is quantised or was not compared."""
    held = [r if r.roundings is not None else dataclasses.replace(r, roundings=math.inf) for r in results]
    worst = max(held, key=lambda r: r.roundings or 0.0, default=None)
    detail = f"{sum(r.compared for r in results)} tensors against the reference"
    if worst is not None and worst.roundings:
        detail += f"; worst {worst.name}, relative error {worst.rel_error or 0.0:.2g}"
    value = None if worst is None else worst.roundings
    return plain_check(
        "convert.rounding",
        "Worst weight, in roundings of its type",
        value,
        subject=label,
        detail=detail,
        code=next((finding.code for finding in worst.findings if finding.code), "") if worst else "",
        where=worst.name if worst else "",
    )


def quantise_checks(candidate: Candidate, results: Sequence[TensorResult], *, with_matrix: bool) -> list[Check]:
    """The checks of the leg `quantise` for one candidate."""
    proven = [result for result in results if result.drawer == "proven"]
    judged = [result for result in results if result.drawer == "judged"]
    unexplained = [result for result in results if result.drawer == "unexplained"]
    differ = [result for result in results if result.drawer != "proven"]
    ways = Counter(result.proof for result in proven if result.blocks)
    how = ", ".join(f"{count} {way}" for way, count in ways.most_common()) or "none of them quantised"
    parts = [f"{len(proven)} of {len(results)} tensors are proven by the reference re-quantised here: {how}"]
    if judged:
        parts.append(f"{len(judged)} judged healthy: {_summary(judged)}")
    if differ and not with_matrix and (named := candidate.file.metadata.get(_IMATRIX_KEY)) is not None:
        parts.append(
            f"The file says it was quantised with the importance matrix {named}: with --imatrix it can be proven"
        )
    faults: list[str] = []
    worst: TensorResult | None = None
    if unexplained:
        worst = max(unexplained, key=lambda r: (r.rel_error or 0.0) / (r.own_error or math.inf))
        faults = [sentence_of(worst)]
        if unexplained[1:]:
            others = [r.name for r in unexplained if r is not worst]
            faults.append(f"also {', '.join(others[:3])}{f' and {len(others) - 3} more' if others[3:] else ''}")
        faults.append(f"Other weights{', or another importance matrix,' if with_matrix else ''} made this file")
    return [
        plain_check(
            "quantise.tensors_differ",
            "Tensors whose bytes the reference does not give here",
            len(differ),
            subject=candidate.label,
            detail=". ".join(parts),
        ),
        zero_check(
            "quantise.unexplained",
            "Tensors neither proven nor judged healthy",
            len(unexplained),
            subject=candidate.label,
            detail=". ".join(faults),
            code=next((finding.code for finding in worst.findings if finding.code), "") if worst else "",
            where=worst.name if worst else "",
        ),
    ]


def output_checks(label: str, tensors: Mapping[str, OpenTensor], errors: Mapping[str, OutputError]) -> list[Check]:
    """Checks of the open tensors: the worst output error, and the mean error of codes that are not the nearest.

    A check is not evaluated if one of its tensors could not be measured.
    """
    left = [name for name in tensors if name not in errors]
    worst = max(errors, key=lambda name: errors[name].ratio, default="")
    missing = f"; not measured: {', '.join(left[:3])}" if left else ""
    named = f"; worst {worst}" if worst else ""
    found = [
        plain_check(
            "quantise.output_error",
            "Error of a layer's output, in the own quantiser's",
            None if left else errors[worst].ratio if worst else None,
            subject=label,
            detail=f"{len(tensors)} tensors that their weights cannot decide{named}{missing}",
            where=worst,
        )
    ]
    names = [name for name, one in tensors.items() if one.by_codes]
    if not names:
        return found
    known = [(one.codes, one.standard_error) for name in names if (one := errors.get(name)) and one.codes is not None]
    mean = sum(value for value, _ in known) / len(known) if known else math.nan
    margin = NORMAL_95 * math.sqrt(sum(error**2 for _, error in known)) / max(len(known), 1)
    whole = len(known) == len(names)
    found.append(
        plain_check(
            "quantise.codes_error",
            "Squared error of the layers' outputs, in that of the nearest codes",
            mean if whole else None,
            interval=(mean - margin, mean + margin) if whole else None,
            subject=label,
            detail=f"{len(names)} tensors whose codes are not the nearest to the reference{missing}",
        )
    )
    return found


def sentence_of(result: TensorResult) -> str:
    """ "blk.1.attn_output.weight (Q4_K): expected .., found .. (cause)"; the first finding of a tensor."""
    what = result.findings[0] if result.findings else None
    if what is None:
        return f"{result.name} ({result.type}): {result.non_finite} weights are NaN or Inf"
    cause = f" ({what.cause})" if what.cause else ""
    return f"{what.where} ({result.type}): expected {what.expected}, found {what.found}{cause}"


def tensor_row(label: str, result: TensorResult, file: GGUFFile, nominal: str) -> TensorRow:
    """The report's row for one tensor."""
    tensor = file.tensors[result.name]
    parts = result.name.split(".")
    return TensorRow(
        candidate=label,
        name=result.name,
        shape=list(tensor.shape),
        nominal_type=nominal,
        actual_type=tensor.type,
        rel_error=result.rel_error,
        max_abs_error=result.max_abs_error,
        bytes_equal_oracle=result.equal if result.compared else None,
        layer=int(parts[1]) if parts[0] == "blk" and parts[1].isdigit() else None,
        drawer=result.drawer,
        why=result.proof or (_by_output(result) if result.open else result.explanation),
        own_error=result.own_error,
        blocks=result.blocks,
        blocks_differ=result.blocks_differ,
        found=writable(sentence_of(result)) if result.drawer == "unexplained" else "",
        rows=list(result.profile.rows) if result.profile else [],
        columns=list(result.profile.columns) if result.profile else [],
    )


def _by_output(result: TensorResult) -> str:
    return BY_CODES if result.codes_nearest is False else BY_OUTPUT


def _summary(judged: Sequence[TensorResult]) -> str:
    ways = Counter(result.explanation or "the error of its type" for result in judged)
    text = ", ".join(f"{count} {way}" for way, count in ways.most_common())
    ratios = [r.rel_error / r.own_error for r in judged if r.rel_error is not None and r.own_error]
    return text + (f"; errors {min(ratios):.3g} to {max(ratios):.3g} times the own quantiser's" if ratios else "")


def _recipe_note(file: GGUFFile, differences: Sequence[Finding]) -> str:
    shown = ", ".join(f"{f.where} {f.found} for {f.expected}" for f in differences[:4])
    more = f" and {len(differences) - 4} more" if differences[4:] else ""
    return f"{len(differences)} tensors have other types than llama.cpp's {file.file_type} gives: {shown}{more}"
