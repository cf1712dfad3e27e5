"""Contract checks of one candidate against a reference file, without inference and without the reference's weights.

The checks have the names of those in `contract.checks`, but use the recorded tokenizer, chats and keys. Two checks are
added: the inventory by recorded names and shapes, and the tensors' recorded statistics (`sketch`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from verification.contract import chat, file_structure, metadata, tokens
from verification.contract.checks import TITLES, aborts
from verification.contract.finding import Finding, as_check, show
from verification.engines.chat_template import ChatTemplate, llama_cpp_variables
from verification.engines.child import ChildDied
from verification.engines.quantise import nominal_types
from verification.engines.sandbox import Vocabulary
from verification.gate.report import Check, TensorRow
from verification.gguf.candidate import Candidate
from verification.gguf.reader import GGUFFile
from verification.reference.families import KNOWN
from verification.reference_file.format import ReferenceFile
from verification.reference_file.header import ChatRecord, Header, TokenizerRecord
from verification.reference_file.record import is_text, metadata_record, words
from verification.reference_file.sketch import largest_error, projections, relative_error

_TITLES = TITLES | {
    "fallback_types": "Tensors in a fallback type",
    "finite_weights": "Weights that are NaN or Inf",
    "inventory": "Tensors missing or unexplained",
    "tensor_statistics": "Tensors whose norm or projections are not the reference's",
}
_AGAIN = "convert the reference again"


class RecordedTokenizer:
    """The recorded part of the reference's tokenizer: it knows only the ids of the recorded texts."""

    def __init__(self, record: TokenizerRecord) -> None:
        self._ids = {
            (one.text, special): ids
            for one in record.texts
            for special, ids in ((False, one.bare), (True, one.special))
        }
        self.chat_template = record.chat_template
        for name in ("bos", "eos", "unk", "pad"):
            setattr(self, f"{name}_token_id", record.special_ids.get(name))

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool = False) -> dict[str, list[int]]:
        """The recorded ids of a recorded text."""
        return {"input_ids": self._ids[text, add_special_tokens]}


def contract_of(candidate: Candidate, reference: ReferenceFile) -> tuple[list[Check], list[TensorRow]]:
    """The checks of one candidate, and a row for each of its tensors."""
    file = candidate.file
    found, errors = static_findings(file, reference)
    found = {**_tokens(reference.header, file), **found}
    rows = [
        TensorRow(
            candidate=candidate.label,
            name=row.name,
            shape=list(file.tensors[row.name].shape),
            nominal_type=row.nominal,
            actual_type=row.actual,
            rel_error=errors.get(row.name),
        )
        for row in nominal_types(file)
    ]
    label = candidate.label
    checks = [as_check(f"contract.{name}", _TITLES[name], findings, subject=label) for name, findings in found.items()]
    return checks, rows


def static_findings(file: GGUFFile, reference: ReferenceFile) -> tuple[dict[str, list[Finding]], dict[str, float]]:
    """Findings without llama.cpp by check (keys, layout, tensors), and every tensor's estimated relative error."""
    header = reference.header
    found = {"metadata": _against_config(header, file)}
    recorded = dataclasses.replace(file, metadata=dict(header.metadata))
    own = dataclasses.replace(file, metadata=metadata_record(file))
    found["oracle_metadata"] = metadata.against_oracle(own, recorded)
    found["layout"] = file_structure.layout(file)
    found["counts"] = file_structure.counts(file)
    found["vocabulary"] = file_structure.vocabulary(file)
    found["file_type"] = file_structure.promised_types(file)
    found["fallback_types"] = file_structure.fallbacks(file)
    found["finite_weights"], _ = file_structure.weights(file)
    found["inventory"] = _inventory(header, file)
    found["tensor_statistics"], errors = _statistics(reference, file)
    return found, errors


def _tokens(header: Header, file: GGUFFile) -> dict[str, list[Finding]]:
    """Findings on ids, template, chats and stops, from llama.cpp in a child process; see `checks.token_findings`."""
    record, found = header.tokenizer, dict[str, list[Finding]]()
    tokenizer = RecordedTokenizer(record)
    with Vocabulary(file.path) as model:
        try:
            found["token_ids"] = tokens.token_ids(tokenizer, model, [one.text for one in record.texts])
            found |= _chats(header, model)
            found["added_specials"] = tokens.added_specials(tokenizer, model)
            found["chat_template"] = chat.template_text(tokenizer, model)
            found["end_of_turn"] = chat.end_of_turn(model)
            found["stop_set"] = _stops(record, model)
            found["special_ids"] = tokens.special_ids(tokenizer, file)
        except ChildDied as error:
            found["token_ids"] = [*found.get("token_ids", []), aborts(str(error))]
    return found


def _chats(header: Header, model: Vocabulary) -> dict[str, list[Finding]]:
    stored = model.chat_template()
    if stored is None or not header.chats:
        return {}
    with ChatTemplate(stored) as template:
        if error := template.error():
            return {"chat_render": [Finding("tokenizer.chat_template", "a Jinja template", error)]}
        texts = [words(one) for one in template.render(*(_variables(one, model) for one in header.chats))]
    pairs = [chat.Rendered(one.name, one.text, text) for one, text in zip(header.chats, texts, strict=True)]
    ids = [
        tokens.first_difference(f"of chat '{one.name}'", one.ids, actual)
        for one, text in zip(header.chats, texts, strict=True)
        if one.ids is not None and is_text(text) and (actual := model.tokenize(text, add_special=False)) != one.ids
    ]
    return {"chat_render": chat.rendered_text(pairs), "chat_token_ids": ids}


def _variables(one: ChatRecord, model: Vocabulary) -> dict[str, Any]:
    """The variables that llama-cpp-python passes to a file's template, with recorded tools and `enable_thinking`."""
    plain = llama_cpp_variables(
        one.messages, bos=model.token_text(model.bos), eos=model.token_text(model.eos), prompt=one.prompt
    )
    switch = {} if one.enable_thinking is None else {"enable_thinking": one.enable_thinking}
    return {**plain, "tools": one.tools, **switch}


def _stops(record: TokenizerRecord, model: Vocabulary) -> list[Finding]:
    action = "convert again, or name the token in tokenizer.ggml.eot_token_id"
    return [
        Finding(f"token {token} {model.token_text(token)!r}", "an end of generation", "llama.cpp goes on", action)
        for token in record.stops
        if not model.is_end(token)
    ]


def _against_config(header: Header, file: GGUFFile) -> list[Finding]:
    """Keys that contradict the recorded config.json; see `metadata.against_config`."""
    found = []
    for key, wanted in header.expected.items():
        actual = metadata.value_or_default(file, key)
        by_layer = isinstance(actual, list) and file.architecture not in KNOWN
        if not by_layer and not metadata.same(wanted, actual):
            found.append(Finding(f"{file.architecture}.{key}", show(wanted), show(actual), _AGAIN))
    return found


def _inventory(header: Header, file: GGUFFile) -> list[Finding]:
    """Tensors that are missing, additional or of another shape; a tied head may be written out."""
    wanted = {tensor.name: tuple(tensor.shape) for tensor in header.tensors}
    if "output.weight" in file.tensors and "output.weight" not in wanted and "token_embd.weight" in wanted:
        wanted["output.weight"] = wanted["token_embd.weight"]
    found = [
        Finding(name, "a tensor of the reference", "missing", _AGAIN) for name in wanted.keys() - file.tensors.keys()
    ]
    for name, tensor in file.tensors.items():
        if name not in wanted:
            found.append(Finding(name, "no such tensor", "in the file", _AGAIN, code="unexplained_tensor"))
        elif tensor.shape != wanted[name]:
            found.append(Finding(name, f"shape {list(wanted[name])}", f"{list(tensor.shape)}", _AGAIN))
    return sorted(found, key=lambda finding: finding.where)


def _statistics(reference: ReferenceFile, file: GGUFFile) -> tuple[list[Finding], dict[str, float]]:
    """Tensors whose projections show other weights, and every tensor's estimated relative error."""
    header = reference.header
    place = {tensor.name: number for number, tensor in enumerate(header.tensors)}
    if "output.weight" not in place and "token_embd.weight" in place:
        place["output.weight"] = place["token_embd.weight"]
    found, errors = [], {}
    for name, tensor in file.tensors.items():
        number = place.get(name)
        if number is None or tuple(header.tensors[number].shape) != tensor.shape or not header.tensors[number].finite:
            continue
        _, sketch = projections(tensor, header.sketch)
        error = relative_error(sketch, float(reference.norms[number]), reference.sketches[number])
        if math.isfinite(error):
            errors[name] = error
        if not error <= largest_error(tensor.type):
            bound = f"within {largest_error(tensor.type):.2g} of the reference ({tensor.type})"
            found.append(Finding(name, bound, f"{error:.3g} away, by {header.sketch} projections", _AGAIN))
    return found, errors
