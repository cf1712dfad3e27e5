"""Find leftovers of another program in a text: control tokens, tool calls, unknown tags, half a code block.

The split of such a row is not certain, because unknown marks separate its steps and its answer. And a control token of
another model would be trained as text.
"""

from __future__ import annotations

import re

from pipeline.data.think_form import RowError, Thought

_CONTROL = re.compile(
    r"<\|[A-Za-z][\w .-]{0,40}\|?>|<[A-Za-z][\w.-]{0,40}\|>|<｜[^<>｜\n]{1,40}｜>|\A\s*<s>|</s>\s*\Z"
    r"|<(?:start|end)_of_turn>|\[/?INST\]|<unused\d+>|<\|?end_?of_?text\|?>"
    r"|assistant(?:final|analysis|commentary)(?![a-z])"
)
_TOOL = re.compile(
    r"</?tool_?(?:call|response|result)s?\b|\[TOOL_CALLS\]|<function[=_]|</function|<\|python_tag\|>|<\|tool|<｜tool"
    r"|</?invoke\b|```tool_(?:code|call)"
)
_HTML = (
    "a b i u s p q em br hr li ul ol dl dt dd td th tr h1 h2 h3 h4 h5 h6 sub sup div var kbd del ins img pre code "
    "span font small strong table thead tbody center blockquote html head body title script style form input button "
    "label select option nav main section header footer article svg path math mi mn mo"
)
_TAG = re.compile(r"(?:\A\s*<|</)\s*/?\s*(?P<name>[A-Za-z_][\w:-]{2,}|[\u3040-\u9fff]{2,})(?:\s[^<>\n]{0,80})?>")
_OTHER_END = re.compile(r"【\s*[/／]|\[/[A-Za-z_]{3,24}\]")
_NO_STEPS = frozenset({"none", "null", "nan", "n/a", "na", "todo", "tbd", "empty", "なし", "無し"})
_FENCE = re.compile(r"^[ \t]*```", re.MULTILINE)
_CODE = re.compile(r"^[ \t]*```.*?^[ \t]*```|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def calls_a_tool(text: str) -> bool:
    """Whether a text holds a tool call or a tool's result, as a model family writes them."""
    return _TOOL.search(text) is not None


def require_clean(thought: Thought) -> None:
    """Refuse a thought with leftovers of another program.

    Raises:
        RowError: a tool call, a control token, an unknown tag, half a code block, or a word such as "none" in place of
            the steps.
    """
    if not re.search(r"\w", thought.steps) or thought.steps.lower() in _NO_STEPS:
        raise RowError("no reasoning", f"the steps are {thought.steps[:20]!r}")
    for part in (thought.steps, thought.answer):
        if calls_a_tool(part):
            raise RowError("tool calls", "a call stands in the text")
        if found := _CONTROL.search(part):
            raise RowError("control token left over", "", shown=found[0] if len(found[0]) < 24 else "")
        if len(_FENCE.findall(part)) % 2:
            raise RowError("thinking tags unclear", "a code block is cut in two")
        plain = _CODE.sub("", part)
        if any(found["name"].lower() not in _HTML.split() for found in _TAG.finditer(plain)) or _OTHER_END.search(
            plain
        ):
            raise RowError("thinking tags unclear", "a tag that nobody here knows is left over")
