"""Row formats: one JSON object of a source file to one conversation in /think form.

Accepted: `instruction`/`output` (with `input`, `system`), `prompt`/`response`, `question`/`answer`, `messages`,
`prompt`/`steps`/`answer`. An answer text already in /think form is kept as it is; one whose reasoning ends in an
explicit answer ("The answer is", "####", 答えは ...) is split there; any other has no reasoning and is rejected.
Reasoning is never invented. A line that is no row at all is a `BrokenLine`, a usable row without use a `RowError`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data.think_form import (
    Message,
    RowError,
    Thought,
    chat,
    format_assistant,
    has_marker,
    require,
    strip_message,
)
from so8t_core.errors import InputError

MAX_LINE = 1 << 23  # bytes; a file without line ends must not fill the memory
LABELS = ("four_class_label", "domain_label", "safety_label")
FORMATS = (
    "instruction/output (optional input, system)",
    "prompt/response",
    "question/answer",
    "messages",
    "prompt/steps/answer",
)

# Where reasoning hands over to the answer. The last match counts, connectives ("So", したがって) belong to it.
_ENGLISH = r"(?<!\w)(?:(?:so|thus|therefore|hence)\b,?\s+)?the\s+(?:final\s+|correct\s+)?answer\s+is\b\s*:?\s*"
_LABELLED = r"^[ \t]*(?:final\s+)?answer\s*[::]\s*"
_HASHES = r"(?<!#)####(?!#)\s*"
_JAPANESE = (
    r"(?:(?:したがって|従って|よって|ゆえに|だから|つまり|以上より)[、,]?\s*)?"
    r"(?:最終的な|最終の|正しい)?(?:答え|解答|回答)(?:は|\s*[::])[::、\s]*|^[ \t\u3000]*答え[ \t\u3000\n]+"
)
_HANDOVER = re.compile(
    f"(?P<english>{_ENGLISH}|{_LABELLED})|(?P<hashes>{_HASHES})|(?P<japanese>{_JAPANESE})", re.IGNORECASE | re.MULTILINE
)
_COPULA = re.compile("(?:です|でした|になります|となります|である)$")
_STOPS = "。." + "".join(filter(str.isspace, map(chr, range(0x3001))))
_JAPANESE_LETTER = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")


class BrokenLine(RowError):
    """A line that is not a row in a known format: it stops the run unless `skip_bad_rows` is set."""


@dataclass(frozen=True)
class ThinkRow:
    """One conversation whose last message is the assistant's, in /think form."""

    messages: list[Message]
    answer: str
    family: str
    language: str
    labels: dict[str, Any] = field(default_factory=dict)


def read_lines(path: Path, *, what: str = "data source") -> Iterator[tuple[int, dict[str, Any] | BrokenLine]]:
    """(1-based line number, row or what is broken about it) of a JSONL file, streaming; blank lines are passed over.

    Args:
        what: how an error names the file.
    Raises:
        InputError: the file is missing or cannot be opened.
    """
    try:
        stream = open(path, "rb")  # noqa: SIM115  (closed below; only the opening is the user's mistake)
    except FileNotFoundError:
        hint = "check data.sources and data.heldout_sources" if what == "data source" else "check the path"
        raise InputError(f"{what} {path} does not exist; {hint}") from None
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {error.strerror}") from None
    with stream:
        number = 0
        while line := stream.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                while line and not line.endswith(b"\n"):
                    line = stream.readline(MAX_LINE)
                yield number, BrokenLine("line too long", f"more than {MAX_LINE} bytes")
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # the BOM some editors write
            if line.strip():
                yield number, _parse_line(line)


def _parse_line(line: bytes) -> dict[str, Any] | BrokenLine:
    try:
        row = json.loads(line.decode("utf-8"))
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        return BrokenLine("not UTF-8", f"byte 0x{line[error.start]:02x} at column {error.start + 1}")
    except UnicodeEncodeError:
        return BrokenLine("not UTF-8", "a \\u escape is half of a surrogate pair")
    except json.JSONDecodeError as error:
        return BrokenLine("bad JSON", f"{error.msg} at column {error.colno}")
    except (ValueError, RecursionError):
        return BrokenLine("bad JSON", "a number or a nesting beyond what can be read")
    if not isinstance(row, dict):
        return BrokenLine("not an object", f"a row must be a JSON object, got {type(row).__name__}")
    return row


def to_think_row(row: dict[str, Any], *, family: str) -> ThinkRow:
    """Bring one row into /think form; `family` names rows that carry none of their own.

    Raises:
        BrokenLine: unknown format or wrong types.
        RowError: an empty message, roles out of order, no reasoning, markers wrong.
    """
    turns, system, assistant = _read_format(row)
    turns = [{"role": turn["role"], "content": strip_message(turn["content"])} for turn in turns]
    if empty := next((turn["role"] for turn in turns if not turn["content"]), None):
        raise RowError("empty message", f"the {empty} message has no text")
    wanted = ["user", "assistant"] * (len(turns) // 2) + ["user"]
    if [turn["role"] for turn in turns] != wanted:
        raise RowError("roles out of order", "expected an optional system, then user and assistant in turn")
    text = strip_message(assistant) if isinstance(assistant, str) else format_assistant(*assistant)
    if has_marker(text):
        thought = require(text)  # already in /think form: kept as it is
    else:
        thought = split_reasoning(text)
        text = format_assistant(thought.steps, thought.answer)
    return ThinkRow(
        messages=[chat("", system)[0], *turns, {"role": "assistant", "content": text}],
        answer=thought.answer,
        family=_optional(row, "family") or family,
        language=_optional(row, "language") or detect_language(turns[-1]["content"] + text),
        labels={name: _label(row, name) for name in LABELS if name in row},
    )


def split_reasoning(text: str) -> Thought:
    """Split reasoning from the explicit answer that ends it.

    Raises:
        RowError: no explicit answer at the end, nothing before it, or nothing after the phrase.
    """
    matches = list(_HANDOVER.finditer(text))
    if not matches:
        raise RowError(
            "no reasoning", "no /think markers and no explicit answer such as `The answer is`, `####` or 答えは"
        )
    last = matches[-1]
    steps = strip_message(text[: last.start()]).rstrip(",、 ")
    answer = strip_message(text[last.end() :])
    if "\n" in answer:
        raise RowError("no reasoning", "text follows the explicit answer, so the row does not end in it")
    if last["english"] is not None:
        answer = answer.rstrip(".。 ")
    elif last["japanese"] is not None:
        answer = _COPULA.sub("", answer.rstrip(_STOPS))
    if not steps:
        raise RowError("no reasoning", "nothing stands before the explicit answer")
    if not answer:
        raise RowError("empty answer", f"nothing stands after {last.group().strip()!r}")
    return Thought(steps=steps, answer=answer)


def detect_language(text: str) -> str:
    """`ja` if kana or han characters occur outside the markers, else `en`; a label for counting, nothing more."""
    for marker_word in ("思考ステップ", "最終回答"):
        text = text.replace(marker_word, "")
    return "ja" if _JAPANESE_LETTER.search(text) else "en"


def _read_format(row: dict[str, Any]) -> tuple[list[Message], str | None, str | tuple[str, str]]:
    """(turns before the answer, the row's own system message, the answer's text or its (steps, answer))."""
    system = _optional(row, "system")
    if "messages" in row:
        return _read_messages(row["messages"], system)
    if "instruction" in row and "output" in row:
        prompt, extra = strip_message(_text(row, "instruction")), strip_message(_optional(row, "input") or "")
        return _ask(f"{prompt}\n\n{extra}" if prompt and extra else prompt or extra), system, _text(row, "output")
    if "prompt" in row and "response" in row:
        return _ask(_text(row, "prompt")), system, _text(row, "response")
    if "prompt" in row and "steps" in row and "answer" in row:
        return _ask(_text(row, "prompt")), system, (_text(row, "steps"), _text(row, "answer"))
    if "question" in row and "answer" in row:
        return _ask(_text(row, "question")), system, _text(row, "answer")
    keys = ", ".join(sorted(row)[:6]) or "(none)"
    raise BrokenLine("unknown format", f"keys {keys}; known are {'; '.join(FORMATS)}")


def _read_messages(messages: Any, system: str | None) -> tuple[list[Message], str | None, str]:
    if not isinstance(messages, list) or not messages:
        raise BrokenLine("wrong type", "`messages` must be a non-empty list")
    turns: list[Message] = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise BrokenLine("wrong type", f"`messages[{number}]` must be an object, got {type(message).__name__}")
        turns.append({key: _text(message, key, f"messages[{number}].") for key in ("role", "content")})
    if turns[0]["role"] == "system":
        own = turns.pop(0)["content"]
        system = own if system is None else f"{own}\n\n{system}"
    if not turns or turns[-1]["role"] != "assistant":
        raise RowError("roles out of order", "the last message must be the assistant's")
    return turns[:-1], system, turns[-1]["content"]


def _ask(prompt: str) -> list[Message]:
    return [{"role": "user", "content": prompt}]


def _text(row: dict[str, Any], key: str, where: str = "") -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise BrokenLine("wrong type", f"`{where}{key}` must be a string, got {type(value).__name__}")
    return value


def _optional(row: dict[str, Any], key: str) -> str | None:
    return None if row.get(key) is None else _text(row, key)


def _label(row: dict[str, Any], key: str) -> Any:
    if not isinstance(row[key], str | int | float | bool | None):
        raise BrokenLine("wrong type", f"`{key}` must be a string, number, boolean or null")
    return row[key]
