"""The interface of a row format, and the list of formats. The first registered format that accepts a row reads it.

    @register
    class Quiz(Format):
        name = "quiz"
        keys = ("q", "working", "a")

        def read(self, row):
            return Conversation(ask(row["q"]), Target(reasoning=row["working"], text=row["a"]))

Formats from a user's file (`data.formats`) come before the built-in formats. A format only finds the parts of a row;
the data step splits, checks and counts them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pipeline.data.think_form import BrokenLine, RowError
from so8t_core.errors import InputError

Turn = dict[str, Any]  # role and content, and the fields of a tool call


@dataclass(frozen=True)
class Target:
    """The assistant's last turn as a format found it; the data step splits `text` where `reasoning` is None."""

    text: str = ""  # the whole reply, or the text after the reasoning
    reasoning: str | None = None  # the thinking, where it has its own field
    stated: str | None = None  # the right answer, where it has its own field


@dataclass(frozen=True)
class Conversation:
    """One row: the turns before the target (user, assistant, tool), the target, the system text, the tools."""

    turns: list[Turn]
    target: Target
    system: str | None = None
    tools: list[Any] = field(default_factory=list)
    alternatives: tuple[Target, ...] = ()  # further candidates for the target, tried in order


class Format:
    """One row format: a row must have all `keys` (not null), and `read` makes the conversation."""

    name: ClassVar[str]
    keys: ClassVar[tuple[str, ...]]

    def accepts(self, row: dict[str, Any]) -> bool:
        """Whether `row` is in this format."""
        return all(row.get(key) is not None for key in self.keys)

    def read(self, row: dict[str, Any]) -> Conversation:
        """The row's conversation.

        Raises:
            BrokenLine: wrong types.
            RowError: a row of this format that cannot be used.
        """
        raise NotImplementedError


FORMATS: list[Format] = []  # built-in formats in order of precedence
_OWN: list[Format] = []  # formats of the user's file, tried first
_loading: list[list[Format]] = [FORMATS]


def register(kind: type[Format]) -> type[Format]:
    """Class decorator: add a format to the list.

    Raises:
        InputError: the class lacks a name or keys, or its name is taken.
    """
    name = getattr(kind, "name", None)
    if not name or not isinstance(getattr(kind, "keys", None), tuple):
        raise InputError(f"the row format {kind.__name__} needs a `name` and a tuple `keys`; docs/data.md shows one")
    if name in (known.name for known in [*_OWN, *FORMATS]):
        raise InputError(f"a row format named {name!r} exists already; choose another name")
    _loading[-1].append(kind())
    return kind


def load_formats(file: str | None) -> None:
    """Put the formats of a user's Python file (`data.formats`) first; None: only the built-in formats.

    Raises:
        InputError: the file is missing, cannot be imported, or registers nothing.
    """
    _OWN.clear()
    if file is None:
        return
    path = Path(file)
    if not path.is_file():
        raise InputError(f"data.formats {file} does not exist; give a Python file with @register classes")
    name = f"so8t_formats_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"data.formats {file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _loading.append(_OWN)
    try:
        spec.loader.exec_module(module)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"data.formats {file} cannot be imported: {type(error).__name__}: {error}") from None
    finally:
        _loading.pop()
    if not _OWN:
        raise InputError(f"data.formats {file} registers no format; put @register above the class")


def read_row(row: dict[str, Any]) -> Conversation:
    """The conversation of a row, by the first format that accepts it.

    Raises:
        BrokenLine: no format accepts it, wrong types, or an error inside a user's format.
        RowError: a row that cannot be used.
    """
    for known in [*_OWN, *FORMATS]:
        if known.accepts(row):
            if known in FORMATS:
                return known.read(row)
            try:
                return _checked(known.read(row))
            except RowError:
                raise
            except Exception as error:
                raise BrokenLine("format failed", f"{known.name}: {type(error).__name__}: {error}") from None
    lower = {key.lower(): value for key, value in row.items()}
    if len(lower) == len(row) and lower.keys() != row.keys() and any(known.accepts(lower) for known in FORMATS):
        return read_row(lower)  # `Question`, `Response`
    filled = {key: "" if value is None else value for key, value in row.items()}
    if any(known.accepts(filled) for known in [*_OWN, *FORMATS]):
        raise RowError("empty message", "a field that the format needs is null")
    keys = ", ".join(sorted(row)[:6]) or "(none)"
    raise BrokenLine("unknown format", f"keys {keys}; known are {', '.join(f.name for f in [*_OWN, *FORMATS])}")


def _checked(found: Any) -> Conversation:
    """Check the types of the conversation that a user's format returned."""
    if not isinstance(found, Conversation):
        raise TypeError(f"`read` must return a Conversation, got {type(found).__name__}")
    for target in (found.target, *found.alternatives):
        for name in ("text", "reasoning", "stated"):
            value = getattr(target, name)
            if not isinstance(value, str | None) or (name == "text" and value is None):
                raise TypeError(f"`{name}` must be a string, got {type(value).__name__}")
    for turn in found.turns:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise TypeError("every turn must have a `role` and a `content`, both strings")
    return found


def ask(prompt: str) -> list[Turn]:
    """The turns of a row that asks one question."""
    return [{"role": "user", "content": prompt}]
