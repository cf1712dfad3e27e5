"""A GGUF's tokenizer for the server: counts and cuts text, and refuses control tokens in what clients write.

A client that could write `<|im_end|>` into its message could close its own turn and begin the model's: a prefill by
the back door. Texts that tokenise to a control token are therefore refused; ordinary text keeps the very ids that
training gave it.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp

from pipeline.data.think_form import Message
from pipeline.serve.request_error import invalid
from verification.engines.llama_model import LlamaModel
from verification.gguf.reader import read_gguf


class Tokens:
    """Questions about text, answered by one vocabulary; safe to call from several threads.

    Raises:
        InputError: llama.cpp cannot load the file.
    """

    def __init__(self, model: LlamaModel) -> None:
        self.model = model

    @classmethod
    def load(cls, gguf: Path) -> Tokens:
        """The vocabulary alone, without weights."""
        return cls(LlamaModel(read_gguf(gguf).path, vocab_only=True))

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.model.tokenize(text, parse_special=False))

    def cut(self, text: str, limit: int) -> str:
        """The longest prefix of whole characters within the first `limit` tokens."""
        data = text.encode("utf-8")
        ids = self.model.tokenize(text, parse_special=False)
        if len(ids) <= limit:
            return text
        pieces = [self.piece(token) for token in ids]
        lead = sum(map(len, pieces)) - len(data)  # a space that SentencePiece puts in front
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
        """A token that steers and is no text: beginning and end of turns and the like."""
        return bool(llama_cpp.llama_vocab_is_control(self.model.vocab, token))

    def refuse_control(self, messages: list[Message]) -> int:
        """The number of tokens of all texts together.

        Raises:
            Refusal: a text holds a control token.
        """
        total = 0
        for index, message in enumerate(messages):
            ids = self.model.tokenize(message["content"])
            total += len(ids)
            if any(self.is_control(token) or self.model.is_end(token) for token in ids):
                raise invalid(
                    f"message {index} ({message['role']}) holds a control token of the model, such as an end of turn",
                    param="messages",
                    code="control_token",
                )
        return total
