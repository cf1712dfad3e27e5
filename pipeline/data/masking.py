"""Turn messages into token ids with a loss mask: the served prompt is masked, the model's reply is trained.

    prompt = template(messages[:-1], add_generation_prompt)      the served text; masked
    target = the last turn behind it, up to and including its end-of-turn token; trained
    labels = -100 over prompt | ids of the target | -100 over the template's text behind the target

The target is taken from template(messages). Some templates add an empty <think></think> that no generation prompt has,
or cut a <think> that the generation prompt opened. Then the turn is put behind the served prompt, so that these tags
belong to the prompt or to nothing and are never trained. In the base's own form (`reasoning_content`) the target is the
base's thinking, closed, and the answer. Any other difference is refused. The end-of-turn token is the first special
token that the template writes behind the answer, even if it is also `pad`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.render import DATED, as_parts, render, without_system, writes_the_date
from pipeline.data.think_form import Message, RowError
from so8t_core.errors import InputError

IGNORED = -100  # torch's ignore_index of cross entropy
FOLDED = "system text folded into the first question (the chat template refuses the role)"
PARTS = "content rendered as parts (the chat template wants them)"
SCAFFOLD = "empty thinking block of the chat template left out"
OPENED = "target follows a thinking block that the generation prompt opens"

_NAMES = ("think", "thinking", "thought", "reasoning", "seed:think")
TAGS = (
    *((f"<{name}>", f"</{name}>") for name in _NAMES),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|channel>thought", "<channel|>"),
)
_PROBE = "so8tprobeanswer"
_BLOCK = re.compile(rf"(?:\s|{'|'.join(re.escape(tag) for pair in TAGS for tag in pair)})*\Z")


@dataclass(frozen=True)
class Rendering:
    """A checked rendering; the target is `input_ids[prompt_length:answer_end]`, its last id the end-of-turn token."""

    text: str
    input_ids: list[int]
    prompt_length: int
    answer_end: int
    notes: tuple[str, ...] = ()


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Text and id of every special token of the tokenizer; a chat template may write these as control tokens."""
    found = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    found.update(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return found


def render_row(
    tokenizer: Any, messages: Sequence[Message], *, specials: dict[str, int] | None = None, tools: Sequence[Any] = ()
) -> Rendering:
    """Render a conversation that ends with the assistant's turn and check the round trip; see the module's text.

    Args:
        specials: `special_tokens(tokenizer)`, if the caller has it already.
        tools: the tools that the row may call.
    Raises:
        RowError: the template refuses or alters a message, a message spells a special token, the prompt is not a
            prefix, or no end-of-turn token follows the answer.
        InputError: the tokenizer has no chat template, or lacks a thinking form where the base's form is asked for.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("the tokenizer has no chat template; use a chat model or add chat_template.jinja beside it")
    if not messages or messages[-1]["role"] != "assistant":
        raise RowError("roles out of order", "the last message must be the assistant's")
    specials = special_tokens(tokenizer) if specials is None else specials
    for message in messages:
        for text in (message["content"], message.get("reasoning_content", "")):
            if spelled := next((token for token in specials if token in text), None):
                said = f"the {message['role']} message contains {spelled!r}"
                raise RowError("special token in a message", said, shown=spelled)
    turn = _place(tokenizer, messages, tools)
    ids = _ids(tokenizer, turn.prompt + turn.target + turn.tail)
    prompt_ids = _ids(tokenizer, turn.prompt)
    if ids[: len(prompt_ids)] != prompt_ids:
        raise RowError("prompt is not a prefix of the row", "the token ids differ although the text does not")
    closing = set(specials.values())
    behind = _ids(tokenizer, turn.tail)
    end_of_turn = next((token for token in behind if token in closing), None)
    places = [at for at in range(len(prompt_ids), len(ids)) if ids[at] == end_of_turn]
    if end_of_turn is None or len(places) < behind.count(end_of_turn):
        raise RowError("no end-of-turn token", f"the template writes {turn.tail[:30]!r} behind the answer")
    end = places[-behind.count(end_of_turn)]
    if end == len(prompt_ids):
        raise RowError("all tokens masked", "the assistant's turn has no token of its own")
    notes = (*turn.notes, DATED) if writes_the_date(tokenizer) else turn.notes
    return Rendering(turn.prompt + turn.target + turn.tail, ids, len(prompt_ids), end + 1, notes)


def prompt_text(tokenizer: Any, messages: Sequence[Message], *, tools: Sequence[Any] = ()) -> str:
    """The served text before the last message of a row, which training masks.

    Raises:
        RowError, InputError: see `render_row`.
    """
    return _place(tokenizer, messages, tools).prompt


def encode_row(
    tokenizer: Any, messages: Sequence[Message], max_tokens: int | None = None, *, tools: Sequence[Any] = ()
) -> dict[str, list[int]]:
    """`{"input_ids", "labels"}` of equal length; labels are -100 outside the last assistant turn.

    Raises:
        RowError (an InputError): everything `render_row` raises, or more than `max_tokens` tokens.
    """
    row = render_row(tokenizer, messages, tools=tools)
    check_length(row, max_tokens)
    labels = [IGNORED] * len(row.input_ids)
    labels[row.prompt_length : row.answer_end] = row.input_ids[row.prompt_length : row.answer_end]
    if all(label == IGNORED for label in labels):
        raise RowError("all tokens masked", "the loss would look fine and train nothing")
    return {"input_ids": row.input_ids, "labels": labels}


def check_length(row: Rendering, max_tokens: int | None) -> None:
    """Raise `RowError` if the row is longer than `max_tokens`; rows are never cut, because a cut row has no end."""
    if max_tokens is not None and len(row.input_ids) > max_tokens:
        raise RowError("too long", f"{len(row.input_ids)} tokens, allowed are {max_tokens}; raise data.max_tokens")


def thinking_tags(tokenizer: Any) -> tuple[str, str]:
    """The opening and the closing thinking tag in the model's template.

    Raises:
        InputError: the template has no known thinking tags.
    """
    template = str(tokenizer.chat_template)
    for opened, closed in TAGS:
        if closed in template or opened in template:
            return opened, closed
    raise InputError("data.think_form: base, but the chat template has no thinking form of its own; use so8t")


def opens_thinking(prompt: str) -> bool:
    """Whether a generation prompt ends inside a thinking block."""
    return any(prompt.rstrip().endswith(opened) for opened, _ in TAGS)


@dataclass(frozen=True)
class _Turn:
    """The pieces of a row's text: the served prompt, the model's reply, and the template's text behind it."""

    prompt: str
    target: str
    tail: str
    notes: tuple[str, ...] = ()


def _ids(tokenizer: Any, text: str) -> list[int]:
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _place(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any]) -> _Turn:
    """The row's pieces: with content as text, then as parts, then with the system text folded in.

    Raises:
        RowError: no way works; the error is that of the first way.
    """
    ways = [(list(messages), False, ()), (list(messages), True, (PARTS,))]
    if messages[0]["role"] == "system":
        ways.append((without_system(messages), False, (FOLDED,)))
    first: RowError | None = None
    for chat, parts, notes in ways:
        if FOLDED in notes and first is not None and first.reason != "chat template refuses the row":
            break  # the template takes the system role: folding would hide another fault
        try:
            turn = _turn_of(tokenizer, chat, tools, parts=parts)
        except RowError as error:
            first = first or error
        else:
            return _Turn(turn.prompt, turn.target, turn.tail, (*notes, *turn.notes))
    assert first is not None
    raise first


def _turn_of(tokenizer: Any, chat: Sequence[Message], tools: Sequence[Any], *, parts: bool) -> _Turn:
    """The pieces of one way of rendering."""
    shown = as_parts(chat) if parts else list(chat)
    prompt = render(tokenizer, shown[:-1], prompt=True, tools=tools)
    target = chat[-1]
    history = prompt + target["content"]
    _require_messages(history, chat)
    if "reasoning_content" in target:
        return _base_turn(tokenizer, shown, prompt, target, tools, parts=parts)
    full = render(tokenizer, shown, prompt=False, tools=tools)
    head, tail = _around(full, target["content"], prompt)
    lead = head[len(prompt) :]
    # Some templates write a space before the answer, some a channel's name between control tokens; so does the model.
    if head.startswith(prompt) and (not lead.strip() or _only_control(lead, tokenizer)):
        return _Turn(prompt, lead + target["content"], tail, (OPENED,) if opens_thinking(prompt) else ())
    _require_scaffold_only(prompt, head)
    return _Turn(prompt, target["content"], tail, (OPENED,) if opens_thinking(prompt) else (SCAFFOLD,))


def _base_turn(
    tokenizer: Any, shown: list[Message], prompt: str, target: Message, tools: Sequence[Any], *, parts: bool
) -> _Turn:
    """The base's own thinking form: as the template writes it, or if it cuts thinking, as the model writes it."""
    steps, answer = target["reasoning_content"], target["content"]
    full = render(tokenizer, shown, prompt=False, tools=tools)
    # A short answer ("42") may also stand in the steps and in the template's text, so a probe finds its place.
    probe = {**shown[-1], "content": as_parts([{"content": _PROBE}])[0]["content"] if parts else _PROBE}
    head, tail = _around(render(tokenizer, [*shown[:-1], probe], prompt=False, tools=tools), _PROBE, prompt)
    if full != head + answer + tail:
        raise RowError("chat template alters a message", "the answer is not in its text as it is")
    said = head[len(prompt) :] if head.startswith(prompt) else ""
    if steps in said:
        return _Turn(prompt, said + answer, tail)
    opened, closed = thinking_tags(tokenizer)
    _require_scaffold_only(prompt, head)
    lead = "" if prompt.endswith("\n") else "\n"
    start = lead if opens_thinking(prompt) else f"{opened}\n"
    return _Turn(prompt, f"{start}{steps}\n{closed}\n\n{answer}", tail)


def _only_control(text: str, tokenizer: Any) -> bool:
    """Whether a text is control tokens with at most one word between two of them."""
    tokens = "|".join(re.escape(token) for token in special_tokens(tokenizer))
    return bool(tokens) and re.fullmatch(rf"(?:{tokens})(?:\w{{0,20}}(?:{tokens}))*", text) is not None


def _around(full: str, answer: str, prompt: str) -> tuple[str, str]:
    """The text before and behind the answer in the whole chat.

    Raises:
        RowError: the answer is not in the chat's text.
    """
    at = full.find(answer, len(prompt)) if full.startswith(prompt) else full.rfind(answer)
    if at < 0:
        raise RowError("chat template alters a message", "the answer is not in its text")
    return full[:at], full[at + len(answer) :]


def _require_scaffold_only(prompt: str, head: str) -> None:
    """Raise `RowError` unless `prompt` and `head` differ only by thinking tags and spaces at their ends."""
    bare = [_BLOCK.sub("", text) for text in (prompt, head)]
    if bare[0] == bare[1]:
        return
    if head.startswith(bare[0]):
        raise RowError("chat template alters a message", "the answer does not follow the generation prompt")
    raise RowError("prompt is not a prefix of the row", "the generation prompt renders differently")


def _require_messages(text: str, chat: Sequence[Message]) -> None:
    """Raise `RowError` unless the text has every message and every called tool, in order."""
    position = 0
    for message in chat:
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in text:
                raise RowError("chat template has no tools", "a tool's name is not in its text")
        found = text.find(message["content"], position)
        if found < 0:
            reason = "has no tools" if message["role"] == "tool" else "alters a message"
            raise RowError(f"chat template {reason}", f"the {message['role']} message is not in its text")
        position = found + len(message["content"])
