"""From messages to token ids with a loss mask, and the check that a chat template leaves a row intact.

    full   = template(messages)                                  text and ids
    prompt = template(messages[:-1], add_generation_prompt)      must be a prefix of `full`, as text and as ids
    labels = -100 over prompt | ids of the answer up to and including its end-of-turn token | -100 over the rest

Anything behind the end-of-turn token (ChatML's newline, Phi-3's `<|endoftext|>`) stays in the ids and out of the loss.
No generation markers are needed in the template. The end-of-turn token is the first special token that the template
writes behind the answer's text; it is never looked up by name, and `pad == eos` cannot mask it away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.think_form import Message, RowError
from so8t_core.errors import InputError

IGNORED = -100  # torch's ignore_index of cross entropy


@dataclass(frozen=True)
class Rendering:
    """A checked rendering; the answer is `input_ids[prompt_length:answer_end]`, its last id the end-of-turn token."""

    text: str
    input_ids: list[int]
    prompt_length: int
    answer_end: int


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Text and id of every special token of the tokenizer (those a chat template may write as control tokens)."""
    found = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    found.update(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return found


def render_row(tokenizer: Any, messages: Sequence[Message], *, specials: dict[str, int] | None = None) -> Rendering:
    """Render a conversation that ends with the assistant's turn and check the round trip; see the module's text.

    Args:
        specials: `special_tokens(tokenizer)`, when the caller already has it.
    Raises:
        RowError: the template refuses or alters a message, a message spells a special token, the prompt is not a
            prefix, or no end-of-turn token follows the answer.
        InputError: the tokenizer has no chat template.
    """
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise InputError("the tokenizer has no chat template; use a chat model or add chat_template.jinja beside it")
    if not messages or messages[-1]["role"] != "assistant":
        raise RowError("roles out of order", "the last message must be the assistant's")
    specials = special_tokens(tokenizer) if specials is None else specials
    for message in messages:
        if spelled := next((token for token in specials if token in message["content"]), None):
            raise RowError("special token in a message", f"the {message['role']} message contains {spelled!r}")
    chat = [dict(message) for message in messages]
    try:
        text: str = tokenizer.apply_chat_template(chat, tokenize=False)
        prompt: str = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
        ids = _template_ids(tokenizer, chat, False)
        prompt_ids = _template_ids(tokenizer, chat[:-1], True)
    except TemplateError as error:
        raise RowError("chat template refuses the row", str(error)) from None

    tail = _check_text(text, prompt, messages)
    if ids[: len(prompt_ids)] != prompt_ids:
        raise RowError("prompt is not a prefix of the row", "the token ids differ although the text does not")
    closing = set(specials.values())
    end_of_turn = next((i for i in tokenizer(tail, add_special_tokens=False)["input_ids"] if i in closing), None)
    answer = ids[len(prompt_ids) :]
    if end_of_turn is None or end_of_turn not in answer:
        raise RowError("no end-of-turn token", f"the template writes {tail[:30]!r} behind the answer")
    length = answer.index(end_of_turn)
    if length == 0:
        raise RowError("all tokens masked", "the assistant's turn has no token of its own")
    return Rendering(text, ids, len(prompt_ids), len(prompt_ids) + length + 1)


def encode_row(tokenizer: Any, messages: Sequence[Message], max_tokens: int | None = None) -> dict[str, list[int]]:
    """`{"input_ids", "labels"}` of equal length; labels are -100 outside the last assistant turn.

    Raises:
        RowError (an InputError): everything `render_row` raises, or more than `max_tokens` tokens.
    """
    row = render_row(tokenizer, messages)
    check_length(row, max_tokens)
    labels = [IGNORED] * len(row.input_ids)
    labels[row.prompt_length : row.answer_end] = row.input_ids[row.prompt_length : row.answer_end]
    if all(label == IGNORED for label in labels):
        raise RowError("all tokens masked", "the loss would look fine and train nothing")
    return {"input_ids": row.input_ids, "labels": labels}


def check_length(row: Rendering, max_tokens: int | None) -> None:
    """Raise `RowError` if the row is longer than `max_tokens`; rows are never cut, a cut row has no end."""
    if max_tokens is not None and len(row.input_ids) > max_tokens:
        raise RowError("too long", f"{len(row.input_ids)} tokens, allowed are {max_tokens}; raise data.max_tokens")


def _template_ids(tokenizer: Any, chat: list[Message], generation: bool) -> list[int]:
    encoded = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=generation)
    return [int(i) for i in encoded["input_ids"]]


def _check_text(text: str, prompt: str, messages: Sequence[Message]) -> str:
    """What the template writes behind the answer; raises `RowError` if a message or the prefix is altered."""
    position = 0
    for message in messages:
        found = text.find(message["content"], position)
        if found < 0:
            raise RowError("chat template alters a message", f"the {message['role']} message is not in its text")
        position = found + len(message["content"])
    if not text.startswith(prompt):
        raise RowError("prompt is not a prefix of the row", "the generation prompt renders differently")
    rest = text[len(prompt) :]
    answer = messages[-1]["content"]
    start = rest.find(answer)
    if start < 0 or rest[:start].strip():  # some templates write one space before the answer
        raise RowError("chat template alters a message", "the answer does not follow the generation prompt")
    return rest[start + len(answer) :]
