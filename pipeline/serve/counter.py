"""The tokenizer's interface for the server: token ids, counts, cuts, and the refusal of control tokens.

A client that could write `<|im_end|>` into its message could end its own turn and begin the model's, a hidden prefill.
So a text that tokenises to a control token is refused; ordinary text keeps the ids that it had in training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from pipeline.data.think_form import Message
from pipeline.serve.request_error import invalid


class Counter(ABC):
    """One vocabulary; safe to call from several threads."""

    @abstractmethod
    def ids(self, text: str) -> list[int]:
        """Token ids of a text, with those of control tokens that it spells out."""

    @abstractmethod
    def steers(self, token: int) -> bool:
        """Whether a token is a control token, such as the beginning or the end of a turn."""

    @abstractmethod
    def count(self, text: str) -> int:
        """The number of tokens of a text without control tokens."""

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
