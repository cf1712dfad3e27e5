"""The JSON header of a `reference.so8t`, with strict types and bounded sizes.

docs/reference_file.md specifies every field. A field that is missing, unknown, of another type or beyond its bound is
refused before anything is computed.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_VOCAB, MAX_TOKENS, MAX_PASSAGES, MAX_LENGTH, MAX_TENSORS = 1 << 20, 1 << 22, 4096, 1 << 20, 20_000
MAX_TEXT = 1 << 20  # characters; the longest published templates have 25,000
TOP, SAMPLES, SKETCH = 256, 8, 32  # values that `so8t reference` writes; a reader accepts up to four times as much

_COUNTS = ("_length", "_count", "_count_kv", "vocab_size", "_dimension")  # keys from which other values are computed

Text = Annotated[str, Field(max_length=MAX_TEXT)]
Name = Annotated[str, Field(max_length=200)]
Token = Annotated[int, Field(ge=0, lt=MAX_VOCAB)]
Ids = Annotated[list[Token], Field(max_length=1 << 16)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Scalar = str | bool | int | float
Value = Scalar | Annotated[list[Scalar], Field(max_length=64)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class PassageRecord(_Strict):
    """A sequence of tokens whose positions `first` .. length - 2 are stored."""

    length: int = Field(ge=2, le=MAX_LENGTH)
    first: int = Field(ge=0)

    @property
    def rows(self) -> int:
        return self.length - 1 - self.first


class Place(_Strict):
    """A passage as one run mode scores it: from `first` on, which is at or after the passage's `first`."""

    passage: int = Field(ge=0)
    first: int = Field(ge=0)


class Mode(_Strict):
    """One way of running a file; the fields of `run_modes.Cell`."""

    name: str = Field(pattern="^[a-z0-9_]{1,40}$")
    title: Name
    setting: Name
    passages: Name = ""
    n_ctx: int = Field(0, ge=0, le=MAX_LENGTH)
    n_ubatch: int | None = Field(None, ge=1, le=MAX_LENGTH)
    singly: int = Field(0, ge=0, le=MAX_LENGTH)
    note: Text = ""
    why: Text = ""


class TextRecord(_Strict):
    """A text and its ids without and with BOS and EOS."""

    text: Text
    bare: Ids
    special: Ids


class TokenizerRecord(_Strict):
    """All data of the reference's tokenizer that a GGUF file must match."""

    size: int = Field(ge=1, le=MAX_VOCAB)
    texts: list[TextRecord] = Field(max_length=256)
    special_ids: dict[Name, Token | None] = Field(max_length=16)
    chat_template: Text | None
    stops: list[Token] = Field(max_length=1024)
    strips_unicode_space: bool


class ChatRecord(_Strict):
    """A chat, the variables of its template, and the reference's rendering and ids."""

    name: Name
    messages: list[dict[str, Any]] = Field(max_length=64)
    tools: list[dict[str, Any]] | None = Field(None, max_length=16)
    enable_thinking: bool | None = None
    prompt: bool
    text: Text  # the rendering, or the words for a refusal
    ids: Ids | None  # None if there is no text, or if ids differ by design


class TensorRecord(_Strict):
    """One tensor of the reference as upstream's converter names and shapes it."""

    name: str = Field(min_length=1, max_length=63)
    shape: list[Annotated[int, Field(ge=1, le=1 << 32)]] = Field(min_length=1, max_length=4)
    finite: bool  # false: the tensor holds NaN or Inf, and its statistics are zeros


class Header(_Strict):
    """The header; docs/reference_file.md specifies the fields."""

    name: Name  # name of the checkpoint
    sha256: Digest  # digest of the checkpoint's directory, as in a report
    versions: dict[Name, Name] = Field(max_length=32)
    vocab: int = Field(ge=2, le=MAX_VOCAB)
    top: int = Field(ge=1, le=4 * TOP)
    samples: int = Field(ge=2, le=4 * SAMPLES)
    sketch: int = Field(ge=1, le=4 * SKETCH)
    n_ctx: int = Field(ge=8, le=MAX_LENGTH)  # tokens in a chunk of the corpus
    text_sha256: Digest  # digest of the corpus' ids, as in a report
    passages: list[PassageRecord] = Field(min_length=1, max_length=MAX_PASSAGES)
    groups: dict[Name, list[Place]] = Field(max_length=64)  # "corpus" and the run modes' sets of passages
    modes: list[Mode] = Field(max_length=64)
    architecture: str = Field(pattern="^[A-Za-z0-9_-]{1,63}$")
    metadata: dict[Text, Value] = Field(max_length=4096)  # from upstream's conversion; long values as digests
    expected: dict[Name, Scalar] = Field(max_length=256)  # values from config.json, by GGUF key without family
    tokenizer: TokenizerRecord
    chats: list[ChatRecord] = Field(max_length=256)
    tensors: list[TensorRecord] = Field(min_length=1, max_length=MAX_TENSORS)

    @property
    def tokens(self) -> int:
        return sum(passage.length for passage in self.passages)

    @property
    def rows(self) -> int:
        return sum(passage.rows for passage in self.passages)

    @model_validator(mode="after")
    def _consistent(self) -> Header:
        if self.top > self.vocab:
            raise ValueError(f"top = {self.top} of a vocabulary of {self.vocab}")
        if any(passage.rows < 1 for passage in self.passages):
            raise ValueError("a passage without a scored position")
        if self.tokens > MAX_TOKENS:
            raise ValueError(f"{self.tokens} tokens, at most {MAX_TOKENS} are read")
        for name, places in self.groups.items():
            for place in places:
                if place.passage >= len(self.passages):
                    raise ValueError(f"group {name!r} names passage {place.passage} of {len(self.passages)}")
                whole = self.passages[place.passage]
                if not whole.first <= place.first < whole.length - 1:
                    raise ValueError(f"group {name!r} scores a passage from {place.first}, stored from {whole.first}")
        corpus = self.groups.get("corpus", [])
        if len(corpus) < 2 or any(self.passages[place.passage].length != self.n_ctx for place in corpus):
            raise ValueError(f"the group 'corpus' needs at least 2 chunks of n_ctx = {self.n_ctx} tokens")
        for mode in self.modes:
            if not mode.why and not self.groups.get(mode.passages):
                raise ValueError(f"mode {mode.name!r} has no passages {mode.passages!r}")
            lengths = [self.passages[place.passage].length for place in self.groups.get(mode.passages, [])]
            if not mode.why and (0 < mode.n_ctx < max(lengths) or mode.singly > min(lengths)):
                raise ValueError(f"mode {mode.name!r} does not fit its passages")
        if not any(one.text == "a" for one in self.tokenizer.texts):
            raise ValueError("the tokenizer's texts lack 'a', by which BOS and EOS are known")
        for key, value in self.metadata.items():
            if key.endswith(_COUNTS) and not all(
                type(n) is int for n in (value if isinstance(value, list) else [value])
            ):
                raise ValueError(f"metadata {key!r} is no whole number")
        names = [tensor.name for tensor in self.tensors]
        if len(set(names)) < len(names) or len({mode.name for mode in self.modes}) < len(self.modes):
            raise ValueError("a tensor or a run mode stands twice")
        if any(isinstance(value, float) and not math.isfinite(value) for value in self.expected.values()):
            raise ValueError("a number that is not finite")
        return self
