"""One candidate file without inference: the contract that it has to keep with its checkpoint.

The oracle is the verifier's own conversion of the reference: whatever key differs from it is explained or refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from verification.contract import chat, file_structure, metadata, tokens
from verification.contract.effects import written_otherwise
from verification.contract.finding import Finding, as_check, writable
from verification.engines.child import ChildDied
from verification.engines.quantise import nominal_types
from verification.engines.sandbox import Vocabulary
from verification.gate.check import zero_check
from verification.gate.report import Check
from verification.gguf.cache import Memory, key_digest
from verification.gguf.candidate import Candidate
from verification.gguf.reader import GGUFFile
from verification.reference.checkpoint import Checkpoint


def contract_checks(
    candidate: Candidate,
    oracle: GGUFFile,
    checkpoint: Checkpoint,
    tokenizer: Any,
    directory: Path,
    *,
    memory: Memory | None = None,
) -> list[Check]:
    """The checks of ids, special tokens, template, stop set and metadata, each of which is equal or wrong."""
    label, file = candidate.label, candidate.file
    found = dict(vocabulary_findings(tokenizer, file, directory, memory))
    found["metadata"] = metadata.against_config(checkpoint.config, file, tokenizer_size=len(tokenizer))
    found["oracle_metadata"], harmless = written_otherwise(metadata.against_oracle(file, oracle), file, oracle)
    found["layout"] = file_structure.layout(file)
    found["counts"] = file_structure.counts(file)
    found["vocabulary"] = file_structure.vocabulary(file)
    found["file_type"] = file_structure.promised_types(file)
    checks = [as_check(f"contract.{name}", TITLES[name], findings, subject=label) for name, findings in found.items()]
    if harmless:
        keys = ", ".join(finding.where for finding in harmless[:3])
        note = f"{len(harmless)} keys are written otherwise, and llama.cpp does the same with both: {keys}"
        checks = [_noted(check, note) if check.name == "contract.oracle_metadata" else check for check in checks]
    if unread := metadata.unread_differences(file, oracle):
        keys = ", ".join(finding.where for finding in unread[:3])
        note = f"{len(unread)} keys differ that llama.cpp does not read: {keys}"
        checks = [_noted(check, note) if check.name == "contract.oracle_metadata" else check for check in checks]
    return [*checks, _fallbacks(candidate)]


def _noted(check: Check, note: str) -> Check:
    """A check whose detail also carries a note."""
    return check.model_copy(update={"detail": "; ".join(filter(None, (check.detail, writable(note))))})


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
    tokenizer: Any, file: GGUFFile, directory: Path, memory: Memory | None = None, model: Vocabulary | None = None
) -> dict[str, list[Finding]]:
    """`token_findings` of a file; they depend on its keys alone.

    Args:
        model: the file's vocabulary in llama.cpp, where it is open already.
    """

    def make() -> dict[str, list[Finding]]:
        if model is not None:
            return token_findings(tokenizer, model, file, directory)
        with Vocabulary(file.path) as opened:
            return token_findings(tokenizer, opened, file, directory)

    return make() if memory is None else memory.recall(make, "tokens", key_digest(file))


def token_findings(tokenizer: Any, model: tokens.Tokens, file: GGUFFile, directory: Path) -> dict[str, list[Finding]]:
    """Everything about the tokenizer and the chat template, by check; see `TITLES`.

    A leading Unicode space is left out of the chats' ids where the reference drops it and llama.cpp keeps it: a
    difference of the engine that no file can mend (the data is stripped instead). Where llama.cpp ends while it
    tokenises, that is a finding, and what came after it is missing.
    """
    found: dict[str, list[Finding]] = {}
    stored = model.chat_template()
    template = None if stored is None else chat.FileTemplate(stored, model)
    try:
        found["token_ids"] = tokens.token_ids(tokenizer, model, tokens.corpus(tokenizer))
        found |= _chats(tokenizer, model, template)
        found |= {
            "added_specials": tokens.added_specials(tokenizer, model),
            "chat_template": chat.template_text(tokenizer, model),
            "end_of_turn": [] if template is None else chat.end_of_turn(model, template),
            "stop_set": tokens.stop_set(directory, tokenizer, model),
            "special_ids": tokens.special_ids(tokenizer, file),
        }
    except ChildDied as error:
        found["token_ids"] = [*found.get("token_ids", []), aborts(str(error))]
    finally:
        if template is not None:
            template.close()
    return found


def aborts(reason: str) -> Finding:
    """The finding that llama.cpp ended while it tokenised."""
    action = "convert again; a server that opens this file can be ended by a request"
    return Finding("llama.cpp", "texts tokenised", reason, action, "llama.cpp ends while it tokenises")


def _chats(tokenizer: Any, model: tokens.Tokens, template: chat.FileTemplate | None) -> dict[str, list[Finding]]:
    """Rendered chats and their ids; none compared where the file's template is no Jinja."""
    if template is not None and (error := template.error()):
        return {"chat_render": [Finding("tokenizer.chat_template", "a Jinja template", error)]}
    chats = chat.render_both(tokenizer, model, template)
    found = {"chat_render": chat.rendered_text(chats)}
    if chat.strips_unicode_space(tokenizer):
        chats = [one for one in chats if not one.starts_with_unicode_space]
    if chats:
        found["chat_token_ids"] = chat.rendered_ids(tokenizer, model, chats)
    return found


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
