"""Questions about text that a tokenizer answers for the server, wherever the tokenizer comes from.

A client that could write `<|im_end|>` into its message could close its own turn and begin the model's: a prefill by
the back door. Texts that tokenise to a control token are therefore refused; ordinary text keeps the very ids that
training gave it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from pipeline.data.think_form import Message
from pipeline.serve.request_error import invalid


class Counter(ABC):
    """One vocabulary; safe to call from several threads."""

    @abstractmethod
    def ids(self, text: str) -> list[int]:
        """Token ids of a text, control tokens that it spells out included."""

    @abstractmethod
    def steers(self, token: int) -> bool:
        """Whether a token is no text: beginning and end of turns and the like."""

    @abstractmethod
    def count(self, text: str) -> int:
        """Tokens of a text in which nothing steers."""

    @abstractmethod
    def cut(self, text: str, limit: int) -> str:
        """The longest prefix of whole characters within the first `limit` tokens."""

    def refuse_control(self, messages: list[Message]) -> int:
        """The number of tokens of all texts together.

        Raises:
            Refusal: a text holds a control token.
        """
        total = 0
        for index, message in enumerate(messages):
            ids = self.ids(message["content"])
            total += len(ids)
            if any(map(self.steers, ids)):
                raise invalid(
                    f"message {index} ({message['role']}) holds a control token of the model, such as an end of turn",
                    param="messages",
                    code="control_token",
                )
        return total
