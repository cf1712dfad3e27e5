"""Renders untrusted chat templates with Jinja in a child process, for `verify`, `lint` and `serve`.

The environment is that of transformers and llama-cpp-python: a sandbox without changes to objects, `trim_blocks`,
`lstrip_blocks`, loop controls, `{% generation %}` (only its body is rendered), `raise_exception`, `tojson` without
escapes and `strftime_now`. The caller passes the variables, because transformers and llama-cpp-python pass different
ones. The clock stands still at `CLOCK` unless a caller gives a time, so that two renderings never differ by a date.
Source: transformers, utils/chat_template_utils.py; llama-cpp-python, llama_chat_format.py.
"""

from __future__ import annotations

import datetime
import json
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # run as the child: import from the package's root, not from this folder
    sys.path[0] = sys.argv[2]

from verification.engines.child import Child, ChildDied, Limits, Message, serve

CLOCK = datetime.datetime(2026, 1, 1, 12, 0, 0)
MAX_TEMPLATE, MAX_TEXT = 1 << 20, 1 << 20  # characters; the longest published templates have 25,000
# bytes of data (Python with Jinja takes 25 MB), seconds of processor time a question, seconds on the clock
_LIMITS = Limits(memory=1 << 28, cpu=2.0, wall=60.0)


@dataclass(frozen=True)
class Outcome:
    """The result of one rendering."""

    kind: Literal["text", "refused", "failed"]  # refused: by `raise_exception`; failed: by any other error
    text: str  # the rendering, or the reason why there is no rendering


class ChatTemplate:
    """A template in a child process; threads may share it.

    The child is started when it is first needed, and again after it ended. The methods do not raise for errors of the
    template or for the death of the child: both are outcomes.
    """

    def __init__(self, source: str, *, limits: Limits = _LIMITS) -> None:
        self.source, self._limits = source, limits
        self._child: Child | None = None
        self._lock = threading.Lock()

    def error(self) -> str:
        """Why Jinja cannot compile the template, with the line; empty if it can."""
        return str(self._ask({"do": "compile"})["error"])

    def render(self, *variables: Mapping[str, Any], now: datetime.datetime = CLOCK) -> list[Outcome]:
        """One outcome for each set of variables (plain JSON values); they share one limit of time."""
        found = self._ask({"do": "render", "variables": [dict(v) for v in variables], "now": now.isoformat()})
        if found["error"]:
            return [Outcome("failed", found["error"])] * len(variables)
        return [Outcome(**outcome) for outcome in found["outcomes"]]

    def powers(self) -> list[dict[str, str]]:
        """Abilities of the template beyond laying out a chat, see `verification.engines.template_powers`."""
        found: list[dict[str, str]] = self._ask({"do": "powers"}).get("powers", [])
        return found

    def _ask(self, question: Message) -> Message:
        """The child's answer; if the child died, the reason as an answer."""
        if len(self.source) > MAX_TEMPLATE:
            return {"error": f"{len(self.source)} characters, at most {MAX_TEMPLATE} are read"}
        with self._lock:
            try:
                if self._child is None:
                    self._child = Child(Path(__file__), self._limits, name="the template")
                    self._child.ask({"do": "source", "source": self.source})
                return self._child.ask(question)
            except ChildDied as error:
                self._child = None  # the child has been closed
                return {"error": str(error)}

    def close(self) -> None:
        """End the child; a later question starts another."""
        with self._lock:
            if self._child is not None:
                self._child.close()
                self._child = None

    def __enter__(self) -> ChatTemplate:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Renderer:
    """The code that runs in the child, for one template."""

    def __init__(self) -> None:
        import jinja2.ext
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        from verification.engines import template_powers

        class Refusal(TemplateError):
            pass

        class Generation(jinja2.ext.Extension):
            tags = {"generation"}  # noqa: RUF012 - Jinja's name

            def parse(self, parser: Any) -> Any:
                parser.stream.skip(1)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def refuse(message: object) -> None:
            raise Refusal(str(message))

        def tojson(
            x: Any,
            ensure_ascii: bool = False,
            indent: int | None = None,
            separators: Any = None,
            sort_keys: bool = False,
        ) -> str:
            return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

        self.refusal, self.template_powers, self.now = Refusal, template_powers, CLOCK
        self.world = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
        )
        self.world.filters["tojson"] = tojson
        self.world.globals["raise_exception"] = refuse
        self.world.globals["strftime_now"] = lambda form: self.now.strftime(form)
        self.source, self.broken = "", ""
        self.template: Any = None

    def answer(self, question: Message) -> Message:
        """Answer one question of `ChatTemplate`."""
        if question["do"] == "source":
            self.source = question["source"]
            return {}
        if question["do"] == "powers":
            try:
                facts = self.template_powers.powers(self.world.parse(self.source))
                return {"error": "", "powers": [{**fact, "text": _writable(fact["text"])} for fact in facts]}
            except Exception as error:
                return {"error": _words(error)}
        if self.template is None and not self.broken:
            try:
                self.template = self.world.from_string(self.source)
            except Exception as error:
                self.broken = _words(error)
        if self.broken or question["do"] == "compile":
            return {"error": self.broken}
        self.now = datetime.datetime.fromisoformat(question["now"])
        return {"error": "", "outcomes": [self.one(variables) for variables in question["variables"]]}

    def one(self, variables: Message) -> Message:
        """One rendering; any error is reported as an error of the template."""
        pieces: list[str] = []
        size = 0
        try:
            for piece in self.template.generate(variables):
                size += len(piece)
                if size > MAX_TEXT:
                    return {"kind": "failed", "text": f"it writes more than {MAX_TEXT} characters"}
                pieces.append(piece)
        except self.refusal as error:
            return {"kind": "refused", "text": str(error)[:400]}
        except Exception as error:
            return {"kind": "failed", "text": _words(error)}
        return {"kind": "text", "text": "".join(pieces)}


def _words(error: Exception) -> str:
    """ "TemplateSyntaxError: unexpected '}', line 3"."""
    line = getattr(error, "lineno", None)
    place = f", line {line}" if line else ""
    return _writable(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}")


def _writable(text: str) -> str:
    """A text with lone surrogates spelled out: a template can make them, but a report cannot hold them."""
    return text.encode("utf-8", "backslashreplace").decode()


def llama_cpp_variables(messages: Sequence[Mapping[str, Any]], *, bos: str, eos: str, prompt: bool) -> dict[str, Any]:
    """The variables that llama-cpp-python passes to a file's template."""
    return {
        "messages": [dict(message) for message in messages],
        "eos_token": eos,
        "bos_token": bos,
        "add_generation_prompt": prompt,
        "functions": None,
        "function_call": None,
        "tools": None,
        "tool_choice": None,
    }


if __name__ == "__main__":
    serve(lambda: _Renderer().answer)
