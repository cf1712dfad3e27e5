"""The diagnosis: one sentence on the kind and place of a fault, from all findings of the gate.

One fault fails several checks; the diagnosis takes the check nearest to the cause. The order is: a file that cannot be
read, numbers out of range, keys, missing or unexplained tensors, tensors with other contents, types, layout, tokens and
template, logits. llama.cpp's refusal comes last, because it follows from another fault. If most matrices differ and no
finding names a cause, the file was made from other weights or in another way.
"""

from __future__ import annotations

from dataclasses import dataclass

from verification.commands.lint_result import LintCheck, LintFinding
from verification.fault_catalogue.fault import Kind
from verification.fault_catalogue.file_gate import Judgement, differing_matrices

_ORDER = (
    "finite_weights",
    "saturated_weights",
    "oracle_metadata",
    "metadata",
    "special_ids",
    "added_specials",
    "vocabulary",
    "counts",
    "inventory",
    "hypotheses",
    "weights",
    "file_type",
    "layout",
    "chat_template",
    "chat_render",
    "stop_set",
    "end_of_turn",
    "chat_token_ids",
    "token_ids",
    "loads",
)
_SHAPES = ("block_count", "head_count", "context_length", "_length", "vocab_size", "token_embd")


@dataclass(frozen=True)
class Diagnosis:
    """The kind, place and description of a fault."""

    kind: Kind
    where: str
    words: str


def diagnose(judgement: Judgement) -> Diagnosis | None:
    """The fault's kind, place and sentence; None for a file that passed."""
    if judgement.unreadable:
        words = judgement.unreadable
        return Diagnosis("shape" if judgement.other_vocabulary else "file", words, words)
    linted = judgement.linted
    assert linted is not None
    found = {check.name: check for check in linted.checks if check.findings}
    failed = [name for name in _ORDER if name in found and found[name].status == "fail"]
    keys = [name for name in failed if name not in ("weights", "hypotheses", "loads")]
    differ, total = differing_matrices(judgement)
    if not keys and total and differ > 0.5 * total:
        words = f"{differ} of {total} matrices are not what this build makes of the reference: other weights, "
        return Diagnosis("other source", f"{differ} of {total} tensors", words + "an importance matrix or another road")
    if failed:
        finding = _clearest(found[failed[0]])
        return Diagnosis(kind_of(failed[0], finding), finding.where, _sentence(finding))
    for check in judgement.failed:
        leg = check.name.split(".")[0]
        if check.where:
            place = {"where": check.where, "expected": "", "found": check.detail, "code": check.code}
            kind = kind_of(check.name.removeprefix("contract."), LintFinding.model_validate(place))
            return Diagnosis(kind, check.where, check.detail)
        if leg in ("convert", "quality") and check.name.endswith("kld"):
            noted = {c.name: c.findings[0] for c in linted.checks if c.status == "note"}
            if "flushed_weights" in noted:
                finding = noted["flushed_weights"]
                return Diagnosis("number range", finding.where, _sentence(finding))
            if "sliding_window" in noted:
                finding = noted["sliding_window"]
                return Diagnosis("window and soft-cap", finding.where, _sentence(finding))
            return Diagnosis("running", check.name, f"mean KLD {check.value} beyond {check.bound}")
        return Diagnosis("types" if "type" in check.name else "weights", check.detail, f"{check.title}: {check.detail}")
    return None


def _clearest(check: LintCheck) -> LintFinding:
    """The first finding with a cause, or the first finding."""
    return next((finding for finding in check.findings if finding.cause), check.findings[0])


def _sentence(finding: LintFinding) -> str:
    named = f" ({finding.cause})" if finding.cause else ""
    return f"{finding.where}: expected {finding.expected}, found {finding.found}{named}"


def kind_of(check: str, finding: LintFinding) -> Kind:
    """The class of one finding."""
    if check in ("finite_weights", "saturated_weights"):
        return "number range"
    if check in ("chat_template", "chat_render"):
        return "chat template"
    if check in ("stop_set", "end_of_turn", "special_ids", "added_specials"):
        return "BOS and stop"
    if check in ("chat_token_ids", "token_ids"):
        return "tokenizer"
    if check == "file_type":
        return "types"
    if check in ("layout", "loads"):
        return "file"
    where = finding.where.lower()
    is_tensor = where.endswith((".weight", ".bias", "rows)"))
    return _kind_of_tensor(check, where, finding) if is_tensor else _kind_of_key(where)


def _kind_of_key(where: str) -> Kind:
    table: list[tuple[tuple[str, ...], Kind]] = [
        (("chat_template",), "chat template"),
        (("_token_id", "add_bos", "add_eos", "add_sep"), "BOS and stop"),
        (("tokenizer.",), "tokenizer"),
        (("general.alignment",), "file"),
        (("general.file_type",), "types"),
        (("softcapping", "sliding_window"), "window and soft-cap"),
        (("rope.unknown", "general."), "engine settings"),
        ((".rope.",), "rope"),
        (("epsilon",), "norm"),
        (_SHAPES, "shape"),
        (("blk.",), "file"),
    ]
    return next((kind for words, kind in table if any(word in where for word in words)), "engine settings")


def _kind_of_tensor(check: str, where: str, finding: LintFinding) -> Kind:
    code = finding.code
    if where.startswith("rope_") and check != "inventory":
        return "rope"
    if check == "inventory":
        if where.startswith("rope_") and finding.code != "unexplained_tensor":
            return "rope"
        return "embedding and head" if where.startswith("output.") else "weights" if "bias" in where else "file"
    if code == "flipped_bit":
        return "file"
    if code == "f16_overflow":
        return "number range"
    if "_norm" in where:
        return "norm"
    if where.startswith(("output.weight", "token_embd")):
        return "embedding and head" if check != "metadata" else "shape"
    if code in ("rotation", "merge"):
        return "adapter"
    if code == "head_rows" or "attn_qkv" in where:
        return "attention layout"
    if code == "row_order" and ("attn_q" in where or "attn_k" in where):
        return "attention layout"
    if ".attn_output." in where:
        return "adapter"
    return "weights"
