"""One question, one reply: Alpaca, prompt and response, question and answer (GSM8K), in their many spellings."""

from __future__ import annotations

from typing import Any

from pipeline.data.formats.fields import prompt_of, stated_answer, system_of, text
from pipeline.data.formats.registry import Conversation, Format, Target, ask, register


@register
class Alpaca(Format):
    """`instruction` and `output`, with an optional `input` under the instruction."""

    name = "instruction/output (optional input, system)"
    keys = ("instruction", "output")

    def read(self, row: dict[str, Any]) -> Conversation:
        """See `Format.read`."""
        target = Target(text(row, "output"), stated=stated_answer(row))
        return Conversation(ask(prompt_of(row, "instruction")), target, system_of(row))


class _Pair(Format):
    """A format of two keys: one for the question, one for the reply."""

    def read(self, row: dict[str, Any]) -> Conversation:
        """See `Format.read`."""
        question, reply = self.keys
        target = Target(text(row, reply), stated=stated_answer(row, but=reply))
        return Conversation(ask(prompt_of(row, question)), target, system_of(row))


def _pair(question: str, reply: str) -> None:
    register(
        type(f"{question.title()}{reply.title()}", (_Pair,), {"name": f"{question}/{reply}", "keys": (question, reply)})
    )


_PAIRS = """
prompt/response prompt/completion prompt/output instruction/response question/response query/response
prompt/chosen question/chosen instruction/chosen problem/response input/output
question/answer problem/answer prompt/answer query/answer
"""
for _keys in _PAIRS.split():
    _pair(*_keys.split("/"))
