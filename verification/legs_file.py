"""One candidate file without inference: contract, weights against the checkpoint, bytes against the oracle.

The oracle is the verifier's own conversion of the reference, quantised with this machine's build: a healthy file made
the same way equals it byte for byte, so whatever differs is explained by name or refused.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verification import tokens
from verification.checks import plain_check, zero_check
from verification.gguf_file import GGUFFile
from verification.llama_engine import LlamaModel
from verification.quantise import nominal_types
from verification.schema import Check, TensorRow
from verification.tensors import Checkpoint, Comparison, compare, inventory, tensor_row


@dataclass(frozen=True)
class Candidate:
    """A file under test and the name it has in the report."""

    label: str
    file: GGUFFile


def contract_checks(
    candidate: Candidate, oracle: GGUFFile, checkpoint: Checkpoint, tokenizer: Any, directory: Path
) -> list[Check]:
    """Everything that is equal or wrong: ids, specials, template, stop set, metadata."""
    label, file = candidate.label, candidate.file
    findings: list[tuple[str, str, tokens.Finding]] = []
    with LlamaModel(file.path, vocab_only=True) as model:
        findings.append(("token_ids", "Texts with other token ids", tokens.token_ids(tokenizer, model, tokens.PLAIN)))
        if chats := tokens.render_chats(tokenizer):
            title = "Rendered chats with other token ids"
            findings.append(("chat_token_ids", title, tokens.token_ids(tokenizer, model, chats)))
        findings += [
            ("added_specials", "BOS and EOS added by one side only", tokens.added_specials(tokenizer, model)),
            ("chat_template", "Chat template differs", tokens.chat_template(tokenizer, model)),
            ("stop_set", "Stop tokens that llama.cpp does not know", tokens.stop_set(directory, tokenizer, model)),
        ]
    findings += [
        ("special_ids", "Special ids that differ", tokens.special_ids(tokenizer, file)),
        ("metadata", "Metadata that contradicts config.json", tokens.metadata(checkpoint.config, file, len(tokenizer))),
        ("oracle_metadata", "Metadata that differs from the oracle", tokens.differs_from_oracle(file, oracle)),
    ]
    checks = [
        zero_check(f"contract.{name}", title, count, subject=label, detail=detail)
        for name, title, (count, detail) in findings
    ]
    return [*checks, _fallbacks(candidate)]


def _fallbacks(candidate: Candidate) -> Check:
    found = [row for row in nominal_types(candidate.file) if row.is_fallback]
    kinds = sorted({f"{row.nominal} -> {row.actual}" for row in found})
    detail = ""
    if found:
        rows = sorted({row.row for row in found})
        detail = (
            f"{', '.join(kinds)}: rows of {', '.join(map(str, rows))} are not multiples of 256; first {found[0].name}"
        )
    return zero_check(
        "contract.fallback_types", "Tensors in a fallback type", len(found), subject=candidate.label, detail=detail
    )


@dataclass(frozen=True)
class WeightResult:
    """Checks by leg, and the rows of the report's tensor table."""

    contract: list[Check]
    convert: list[Check]
    rows: list[TensorRow]


def weight_checks(candidate: Candidate, oracle: GGUFFile, checkpoint: Checkpoint) -> WeightResult:
    """Inventory, and the roundings of a float file's tensors; a quantised file's bytes are the leg `quantise`.

    Args:
        oracle: the reference converted and quantised here, in the candidate's own file type.
    """
    label, file = candidate.label, candidate.file
    found = inventory(checkpoint, file)
    results = compare(checkpoint, file, found, oracle)
    nominal = {row.name: row.nominal for row in nominal_types(file)}
    rows = [tensor_row(label, result, file, nominal[result.name]) for result in results]
    lost = sorted(set(found.missing) | (set(oracle.tensors) - set(file.tensors)))
    unexplained = [result.name for result in results if not result.explained]
    if file.is_float:
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
    convert = [_rounding(results, label)] if file.is_float else []
    return WeightResult(contract, convert, rows)


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
