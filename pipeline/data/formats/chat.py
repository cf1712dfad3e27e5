"""Conversations: OpenAI's `messages`, ShareGPT's `conversations`, TRL's `prompt` and `completion` as lists."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any

from pipeline.data.formats.fields import (
    REASONING,
    optional,
    present,
    require_ended,
    stated_answer,
    system_of,
    value_text,
)
from pipeline.data.formats.registry import Conversation, Format, Target, Turn, register
from pipeline.data.think_form import BrokenLine, RowError, strip_message

_SPELLINGS = """
user human
assistant gpt model chatgpt bot
system developer
tool function ipython observation function_response tool_response
tool_call function_call
"""
ROLES = {name: line.split()[0] for line in _SPELLINGS.strip().splitlines() for name in line.split()}
_REASONING = ("reasoning_content", "reasoning", "thinking", "thought", "thinking_blocks", "reasoning_details")
_REPLIES = ("completion", "response", "output", "chosen", "answer")
_THOUGHT = ("thinking", "reasoning", "reasoning.text", "reasoning.summary", "summary_text", "reasoning_text")
_NO_TEXT = "not text"


@register
class Messages(Format):
    """`messages`: role and content, with `reasoning_content`, `reasoning` or `thinking`, parts, tool calls.

    Where the last message is the user's, fields of the row hold reasoning and answer.
    """

    name = "messages"
    keys = ("messages",)

    def read(self, row: dict[str, Any]) -> Conversation:
        """See `Format.read`."""
        messages, reply = row["messages"], _reply_key(row)
        asks = isinstance(messages, list) and messages and isinstance(messages[-1], dict)
        if not asks or reply is None or messages[-1].get("role") != "user":
            return conversation(messages, "messages", row)
        thinking = present(row, REASONING)
        said = {"role": "assistant", "content": value_text(row, reply)}
        said |= {"reasoning_content": row[thinking]} if thinking else {}
        return conversation([*messages, said], "messages", row, but=reply)


@register
class ShareGPT(Format):
    """`conversations` (or `conversation`): `from` and `value`, or role and content; human, gpt, system, tools."""

    name = "sharegpt"
    keys = ("conversations",)

    def accepts(self, row: dict[str, Any]) -> bool:
        """Whether the row has either spelling of the key."""
        return any(isinstance(row.get(key), list) for key in ("conversations", "conversation"))

    def read(self, row: dict[str, Any]) -> Conversation:
        """See `Format.read`."""
        key = "conversations" if isinstance(row.get("conversations"), list) else "conversation"
        return conversation(row[key], key, row)


@register
class PromptCompletion(Format):
    """`prompt` (`input`) as a list of messages, and `completion` (`response`, `output`, `chosen`) as one or a text."""

    name = "prompt/completion messages"
    keys = ("prompt", "completion")

    def accepts(self, row: dict[str, Any]) -> bool:
        """Whether the prompt is a list and a reply is present."""
        return _prompt_key(row) is not None and _reply_key(row) is not None

    def read(self, row: dict[str, Any]) -> Conversation:
        """See `Format.read`."""
        prompt, name = str(_prompt_key(row)), str(_reply_key(row))
        reply, asked = row[name], row[prompt]
        said = reply if isinstance(reply, list) else [{"role": "assistant", "content": value_text(row, name)}]
        whole = said if said[: len(asked)] == asked else [*asked, *said]  # some replies repeat the question
        return conversation(whole, prompt, row, but=name)


@register
class Preference(Format):
    """`chosen` is the whole conversation; `rejected` is not read."""

    name = "chosen messages"
    keys = ("chosen", "rejected")

    def accepts(self, row: dict[str, Any]) -> bool:
        """Whether `chosen` is a list."""
        return isinstance(row.get("chosen"), list)

    def read(self, row: dict[str, Any]) -> Conversation:
        """See `Format.read`."""
        return conversation(row["chosen"], "chosen", row)


def _prompt_key(row: dict[str, Any]) -> str | None:
    return next((key for key in ("prompt", "input") if isinstance(row.get(key), list)), None)


def _reply_key(row: dict[str, Any]) -> str | None:
    return next((key for key in _REPLIES if isinstance(row.get(key), str | list | int | float)), None)


def conversation(messages: Any, key: str, row: dict[str, Any], *, but: str = "") -> Conversation:
    """A list of messages as a conversation.

    Args:
        but: the field of the row that holds the reply; it does not count as a stated answer.

    Raises:
        BrokenLine: wrong types.
        RowError: an unknown role, a late system message, content that is no text, or no assistant turn at the end.
    """
    if isinstance(messages, str):  # tables often keep the list as JSON text
        with contextlib.suppress(ValueError, RecursionError):
            messages = json.loads(messages)
    if not isinstance(messages, list) or not messages:
        raise BrokenLine("wrong type", f"`{key}` must be a non-empty list")
    turns = [_turn(message, f"{key}[{number}]") for number, message in enumerate(messages)]
    systems = [turn for turn in turns if turn["role"] == "system"]
    leading = 0
    while leading < len(turns) and turns[leading]["role"] == "system":
        leading += 1
    if any(strip_message(turn["content"]) for turn in systems[leading:]):
        raise RowError("late system message", "a system message stands behind the first turn")
    texts = [strip_message(turn["content"]) for turn in systems[:leading]]
    own = system_of(row)
    if own is not None and strip_message(own) not in texts:
        texts.append(strip_message(own))
    turns = [turn for turn in turns if turn["role"] != "system"]
    if not turns or turns[-1]["role"] != "assistant":
        raise RowError("roles out of order", "the last message must be the assistant's")
    last = turns.pop()
    if last.get("tool_calls"):
        raise RowError("tool calls", "the last message calls a tool and holds no answer")
    require_ended(messages[-1])
    if last.pop("weight", 1) == 0:
        raise RowError("not for training", "the last message has weight 0")
    for turn in turns:
        turn.pop("weight", None)
    stated = [stated_answer(row, but=but), *(stated_answer(info) for info in _notes_on(messages))]
    target = Target(last["content"], last.get("reasoning_content"), next(filter(None, stated), None))
    joined = "\n\n".join(filter(None, texts))
    return Conversation(turns, target, joined or None, tools_of(row))


def _notes_on(messages: list[Any]) -> list[dict[str, Any]]:
    """The `info` of the last question and of its reply."""
    return [message["info"] for message in messages[-2:] if isinstance(message.get("info"), dict)]


def tools_of(row: dict[str, Any]) -> list[Any]:
    """The row's tools: a list, or JSON text of one."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            return []
    return tools if isinstance(tools, list) else []


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, dict):
        raise BrokenLine("wrong type", f"`{where}` must be an object, got {type(message).__name__}")
    role = message.get("role", message.get("from"))
    if not isinstance(role, str):
        raise BrokenLine("wrong type", f"`{where}.role` must be a string, got {type(role).__name__}")
    known = ROLES.get(role.strip().lower())
    if known is None:
        raise RowError("unknown role", f"`{where}`: {role[:40]!r}")
    key = "content" if "content" in message else "value"
    content, thinking = _content(message.get(key), f"{where}.{key}")
    turn: Turn = {"role": known, "content": content}
    fields = [_reasoning_text(message, key, where) for key in _REASONING]
    if known == "system" and thinking:
        turn["content"], thinking = f"[THINK]{thinking}[/THINK]\n{content}", ""  # an example of how to think
    said = list(dict.fromkeys(strip_message(part) for part in [*fields, thinking] if part and strip_message(part)))
    if len(said) > 1:
        raise RowError("two thinking forms", f"`{where}` holds two different texts of reasoning")
    if said:
        turn["reasoning_content"] = said[0]
    calls = message.get("tool_calls") or message.get("function_call")
    if known == "tool_call":
        calls, turn["role"], turn["content"] = [_parsed(content)], "assistant", ""
    if calls:
        turn["tool_calls"] = [_call(call) for call in (calls if isinstance(calls, list) else [calls])]
    for name in ("name", "tool_call_id"):
        if known == "tool" and isinstance(message.get(name), str):
            turn[name] = message[name]
    if message.get("weight") == 0 or message.get("train") is False:
        turn["weight"] = 0
    return turn


def _reasoning_text(message: dict[str, Any], key: str, where: str) -> str | None:
    value = message.get(key)
    if isinstance(value, dict):  # {"content": ..., "type": ...} of some exports
        value = value.get("content", value.get("text"))
    if isinstance(value, list):
        said, thought = _content([_as_thought(part) for part in value], f"{where}.{key}")
        return thought or said
    return optional({key: value}, key)


def _as_thought(part: Any) -> Any:
    """One part of a list of reasoning, as thinking: some parts hold only text, some are encrypted by their maker."""
    if not isinstance(part, dict) or part.get("type") in ("redacted_thinking", "reasoning.encrypted"):
        return part if isinstance(part, str) else ""
    return {**part, "type": "thinking"}


def _content(value: Any, where: str) -> tuple[str, str]:
    """(text, thinking) of a message's content: a string, null, or a list of parts.

    Raises:
        BrokenLine: another type.
        RowError: a part that is no text (an image, a sound, a file).
    """
    if value is None:
        return "", ""
    if isinstance(value, str):
        return value, ""
    if not isinstance(value, list):
        raise BrokenLine("wrong type", f"`{where}` must be a string or a list of parts, got {type(value).__name__}")
    said: list[str] = []
    thought: list[str] = []
    for number, part in enumerate(value):
        if isinstance(part, str):
            said.append(part)
            continue
        if not isinstance(part, dict):
            raise BrokenLine("wrong type", f"`{where}[{number}]` must be an object, got {type(part).__name__}")
        kind = part.get("type", "text")
        if kind in _THOUGHT:
            keys = ("thinking", "reasoning", "text", "content", "summary")
            thought.append(_part_text(part, keys, f"{where}[{number}]"))
        elif kind in ("text", "input_text", "output_text"):
            said.append(_part_text(part, ("text", "content"), f"{where}[{number}]"))
        elif kind in ("tool_use", "tool_result", "tool_call"):
            raise RowError("tool calls", f"`{where}[{number}]` is a {kind} part")
        else:
            raise RowError(_NO_TEXT, f"`{where}[{number}]` is of type {str(kind)[:40]!r}")
    return "".join(said), "\n".join(thought)


def _part_text(part: dict[str, Any], keys: Sequence[str], where: str) -> str:
    value = next((part[key] for key in keys if part.get(key) not in (None, [])), None)
    if isinstance(value, list):  # parts within a part
        said, thought = _content(value, where)
        return thought or said
    if value is None and part.get("summary") == []:
        return ""  # reasoning that its maker withholds
    if not isinstance(value, str):
        raise BrokenLine("wrong type", f"`{where}` has no text")
    return value


def _parsed(content: str) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        raise RowError("tool calls", "a call that is no JSON") from None


def _call(call: Any) -> dict[str, Any]:
    """A call in OpenAI's shape with its arguments as an object (some sources write them as JSON text)."""
    if not isinstance(call, dict):
        raise BrokenLine("wrong type", f"a tool call must be an object, got {type(call).__name__}")
    inner = call.get("function") if isinstance(call.get("function"), dict) else call
    assert isinstance(inner, dict)
    arguments = inner.get("arguments", inner.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _parsed(arguments or "{}")
    if not isinstance(inner.get("name"), str) or not isinstance(arguments, dict | None):
        raise RowError("tool calls", "a call without a name or with arguments that are no object")
    made = {"type": "function", "function": {"name": inner["name"], "arguments": arguments or {}}}
    return {"id": call["id"], **made} if isinstance(call.get("id"), str) else made
