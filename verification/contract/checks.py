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

from verification.contract import chat, file_structure, metadata, tokens
from verification.contract.finding import Finding, as_check
from verification.engines.llama_model import LlamaModel
from verification.engines.quantise import nominal_types
from verification.gate.check import plain_check, zero_check
from verification.gate.report import Check, TensorRow
from verification.gguf.cache import Memory, key_digest
from verification.gguf.reader import GGUFFile
from verification.weight_parity.compare import Examination, Sources
from verification.weight_parity.expected import Checkpoint, Comparison, compare, inventory, is_known, tensor_row
from verification.weight_parity.neighbours import SAME_MAKER


@dataclass(frozen=True)
class Candidate:
    """A file under test and the name it has in the report."""

    label: str
    file: GGUFFile


def contract_checks(
    candidate: Candidate,
    oracle: GGUFFile,
    checkpoint: Checkpoint,
    tokenizer: Any,
    directory: Path,
    *,
    memory: Memory | None = None,
) -> list[Check]:
    """Everything that is equal or wrong: ids, specials, template, stop set, metadata."""
    label, file = candidate.label, candidate.file
    found = dict(vocabulary_findings(tokenizer, file, directory, memory))
    found["metadata"] = metadata.against_config(checkpoint.config, file, tokenizer_size=len(tokenizer))
    found["oracle_metadata"] = metadata.against_oracle(file, oracle)
    found["layout"] = file_structure.layout(file)
    found["counts"] = file_structure.counts(file)
    found["vocabulary"] = file_structure.vocabulary(file)
    found["file_type"] = file_structure.promised_types(file)
    checks = [as_check(f"contract.{name}", TITLES[name], findings, subject=label) for name, findings in found.items()]
    return [*checks, _fallbacks(candidate)]


TITLES = {
    "token_ids": "Texts with other token ids",
    "chat_render": "Chats rendered otherwise by llama-cpp-python's Jinja",
    "chat_token_ids": "Rendered chats with other token ids",
    "added_specials": "BOS and EOS added by one side only",
    "chat_template": "Chat template differs",
    "end_of_turn": "Ends of an answer at which llama.cpp goes on",
    "stop_set": "Stop tokens that llama.cpp does not know",
    "special_ids": "Special ids that differ",
    "metadata": "Metadata that contradicts config.json",
    "oracle_metadata": "Metadata that differs from the oracle",
    "layout": "Tensor data out of place",
    "counts": "Metadata against the file's own tensors",
    "vocabulary": "Token lists and special ids",
    "file_type": "File type against the tensors' types",
}


def vocabulary_findings(
    tokenizer: Any, file: GGUFFile, directory: Path, memory: Memory | None = None
) -> dict[str, list[Finding]]:
    """`token_findings` of a file; they depend on its keys alone."""

    def make() -> dict[str, list[Finding]]:
        with LlamaModel(file.path, vocab_only=True) as model:
            return token_findings(tokenizer, model, file, directory)

    return make() if memory is None else memory.recall(make, "tokens", key_digest(file))


def token_findings(tokenizer: Any, model: LlamaModel, file: GGUFFile, directory: Path) -> dict[str, list[Finding]]:
    """Everything about the tokenizer and the chat template, by check; see `TITLES`.

    A leading Unicode space is left out of the chats' ids where the reference drops it and llama.cpp keeps it: a
    difference of the engine that no file can mend (the data is stripped instead).
    """
    found = {"token_ids": tokens.token_ids(tokenizer, model, tokens.corpus(tokenizer))}
    try:
        chats = list(chat.render_both(tokenizer, model))
        found["chat_render"] = chat.rendered_text(chats)
        if chat.strips_unicode_space(tokenizer):
            chats = [chat for chat in chats if not chat.starts_with_unicode_space]
        if chats:
            found["chat_token_ids"] = chat.rendered_ids(tokenizer, model, chats)
    except ValueError as error:
        found["chat_render"] = [Finding("tokenizer.chat_template", "a Jinja template", str(error))]
    return found | {
        "added_specials": tokens.added_specials(tokenizer, model),
        "chat_template": chat.template_text(tokenizer, model),
        "end_of_turn": chat.end_of_turn(model),
        "stop_set": tokens.stop_set(directory, tokenizer, model),
        "special_ids": tokens.special_ids(tokenizer, file),
    }


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
