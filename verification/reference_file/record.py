"""The records of a checkpoint in a reference file, besides its logits: tokenizer, chats, metadata, tensors.

The records hold the data that `verification.contract` compares: ids of the adversarial texts, renderings of chats (with
tools, and with `enable_thinking` on or off), the stop set, the keys of upstream's conversion and of config.json, and
names, shapes and statistics of the tensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from verification.contract import chat, metadata, tokens
from verification.engines.chat_template import ChatTemplate, Outcome
from verification.gguf.reader import GGUFFile
from verification.reference_file.header import SKETCH, ChatRecord, TensorRecord, TextRecord, TokenizerRecord, Value
from verification.reference_file.sketch import finite, projections

_LONG = 64  # items of a list, or 64ths of a text's characters; longer values are kept as digests
_SPECIAL = ("bos", "eos", "unk", "pad")


def words(outcome: Outcome) -> str:
    """A rendering's text, or fixed words for a refusal or a failure, because engines word failures differently."""
    return {"text": outcome.text, "refused": chat.REFUSED}.get(outcome.kind, "(the template fails)")


def is_text(rendered: str) -> bool:
    """Whether a rendering is a text, neither a refusal nor a failure."""
    return rendered not in (chat.REFUSED, "(the template fails)")


def tokenizer_record(tokenizer: Any, stops: set[int]) -> TokenizerRecord:
    """The record of a Hugging Face tokenizer; `stops` are the ids at which the reference ends a generation."""

    def ids(text: str, special: bool) -> list[int]:
        return [int(i) for i in tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]]

    texts = dict.fromkeys([*tokens.corpus(tokenizer), "a"])  # "a" shows whether BOS and EOS are added
    template = tokenizer.chat_template
    return TokenizerRecord(
        size=len(tokenizer),
        texts=[TextRecord(text=text, bare=ids(text, False), special=ids(text, True)) for text in texts],
        special_ids={name: getattr(tokenizer, f"{name}_token_id") for name in _SPECIAL},
        chat_template=template if isinstance(template, str) and template else None,
        stops=sorted(stops),
        strips_unicode_space=chat.strips_unicode_space(tokenizer),
    )


def chat_records(tokenizer: Any) -> list[ChatRecord]:
    """Every chat with the reference's rendering and ids; empty if there is no template."""
    if not tokenizer.chat_template:
        return []
    names = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    asked = chat.asked_chats()
    with ChatTemplate(tokenizer.get_chat_template()) as template:
        texts = [words(one) for one in template.render(*({**names, "documents": None, **a.variables()} for a in asked))]
    skips = chat.strips_unicode_space(tokenizer)  # llama.cpp keeps such a space: a difference of engines, not of files

    def ids(one: chat.Asked, text: str) -> list[int] | None:
        if not is_text(text) or (skips and one.name.startswith("leading U+3000")):
            return None
        return [int(i) for i in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]

    return [
        ChatRecord(**dataclasses.asdict(one), text=text, ids=ids(one, text))
        for one, text in zip(asked, texts, strict=True)
    ]


def metadata_record(file: GGUFFile) -> dict[str, Value]:
    """The keys of a GGUF file that can change its results; long values as digests."""
    kept = {key: value for key, value in file.metadata.items() if not metadata.is_harmless(key)}
    size = f"{file.architecture}.vocab_size"
    if size not in kept and isinstance(kept.get("tokenizer.ggml.tokens"), list):
        kept[size] = len(kept["tokenizer.ggml.tokens"])  # llama.cpp's default; a digest would hide it
    return {key: _short(value) for key, value in kept.items()}


def _short(value: Any) -> Value:
    long = (isinstance(value, list) and len(value) > _LONG) or (isinstance(value, str) and len(value) > 64 * _LONG)
    if not long and not _odd(value):
        return value  # type: ignore[no-any-return]
    digest = hashlib.sha256(json.dumps(value, ensure_ascii=True).encode()).hexdigest()
    return f"sha256 {digest} of {len(value) if hasattr(value, '__len__') else 1} items"


def _odd(value: Any) -> bool:
    """Whether a value holds numbers that JSON does not have, or bytes that are not UTF-8."""
    items = value if isinstance(value, list) else [value]
    return any(
        (isinstance(item, float) and not np.isfinite(item))
        or (isinstance(item, str) and item.encode("utf-8", "replace") != item.encode("utf-8", "surrogatepass"))
        for item in items
    )


def expected_record(config: Mapping[str, Any], architecture: str) -> dict[str, str | bool | int | float]:
    """The values that config.json requires, by GGUF key without its family; only numbers and texts."""
    asked = metadata.expected_metadata(dict(config), architecture)
    return {key: value for key, value in asked.items() if isinstance(value, str | bool | int | float)}


def tensor_records(
    file: GGUFFile, tell: Callable[[int, int], None] = lambda done, total: None
) -> tuple[list[TensorRecord], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The records of the tensors in the reference's conversion, their norms (M,) and projections (M, SKETCH)."""
    records, norms, sketches = [], [], []
    for number, tensor in enumerate(file.tensors.values()):
        tell(number, len(file.tensors))
        norm, sketch = projections(tensor, SKETCH)
        good = finite([norm, *sketch.tolist()])
        records.append(TensorRecord(name=tensor.name, shape=list(tensor.shape), finite=good))
        norms.append(norm if good else 0.0)
        sketches.append(sketch if good else np.zeros(SKETCH))
    return records, np.asarray(norms, dtype="<f4"), np.asarray(sketches, dtype="<f4")


def stops_of(directory: Path, tokenizer: Any) -> set[int]:
    """Ids at which the reference ends a generation."""
    return {int(token) for token in tokens.wanted_stops(directory, tokenizer)}
