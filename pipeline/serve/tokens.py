"""A GGUF's tokenizer for the server; see `pipeline.serve.counter`."""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp

from pipeline.serve.counter import Counter
from so8t_core.errors import InputError
from verification.engines.llama_model import LlamaModel
from verification.engines.sandbox import Vocabulary
from verification.gguf.reader import read_gguf


class Tokens(Counter):
    """The vocabulary of a file that llama.cpp has loaded."""

    def __init__(self, model: LlamaModel) -> None:
        self.model = model

    @classmethod
    def load(cls, gguf: Path) -> Tokens:
        """Load the vocabulary alone, without weights.

        Raises:
            InputError: llama.cpp cannot load it; a child process tries first, because a damaged file can crash it.
        """
        path = read_gguf(gguf).path
        with Vocabulary(path) as vocabulary:
            if vocabulary.refused:
                raise InputError(f"llama.cpp does not load {gguf}: {vocabulary.refused}")
        return cls(LlamaModel(path, vocab_only=True))

    def ids(self, text: str) -> list[int]:
        """See `Counter`."""
        return self.model.tokenize(text)

    def steers(self, token: int) -> bool:
        """See `Counter`."""
        return self.is_control(token) or self.model.is_end(token)

    def count(self, text: str) -> int:
        """See `Counter`."""
        return len(self.model.tokenize(text, parse_special=False))

    def cut(self, text: str, limit: int) -> str:
        """See `Counter`."""
        data = text.encode("utf-8")
        ids = self.model.tokenize(text, parse_special=False)
        if len(ids) <= limit:
            return text
        pieces = [self.piece(token) for token in ids]
        lead = sum(map(len, pieces)) - len(data)  # SentencePiece puts a space in front
        return data[: max(sum(map(len, pieces[:limit])) - lead, 0)].decode("utf-8", errors="ignore")

    def piece(self, token: int) -> bytes:
        """The bytes of a token, control tokens spelled out."""
        buffer = ctypes.create_string_buffer(256)
        length = llama_cpp.llama_token_to_piece(self.model.vocab, token, buffer, len(buffer), 0, True)
        if length < 0:
            buffer = ctypes.create_string_buffer(-length)
            length = llama_cpp.llama_token_to_piece(self.model.vocab, token, buffer, len(buffer), 0, True)
        return buffer.raw[: max(length, 0)]

    def is_control(self, token: int) -> bool:
        """Whether a token is a control token, such as the beginning or the end of a turn."""
        return bool(llama_cpp.llama_vocab_is_control(self.model.vocab, token))
