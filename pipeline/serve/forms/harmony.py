"""The harmony form of gpt-oss: messages on channels; the last message must be on the channel `final`.

    <|channel|>analysis<|message|>steps<|end|><|start|>assistant<|channel|>final<|message|>answer

Every other channel is thinking (`analysis`, `commentary`). A recipient, a constraint, a tool call, text between the
messages or a token in another spelling is odd. A text from which an upstream has removed the tokens (`assistantfinal`)
is odd too, because its parts cannot be told apart.
Source: OpenAI's harmony response format, openai/harmony, docs/format.md.
"""

from __future__ import annotations

import re

from pipeline.data.think_form import strip_message
from pipeline.serve.forms.form import Odd, Parts
from pipeline.serve.text_folding import TAGS, fold, skeleton

_BEGIN, _NEXT, _ENDS = "<|start|>assistant", "<|end|><|start|>assistant", ("<|return|>", "<|end|>")
_THOUGHT = re.compile(r"(?s)<\|channel\|>(?:analysis|commentary)<\|message\|>(.*)")
_FINAL = re.compile(r"(?s)<\|channel\|>final<\|message\|>(.*)")
_MARKS = re.compile(rf"{TAGS}|<\|(?:start|end|message|return|call|constrain)")
_STRIPPED = re.compile("assistant(?:analysis|commentary|final)")


class Harmony:
    """See `pipeline.serve.forms.form.Form`."""

    name, instructs, may_skip = "harmony", False, True
    markers = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>")

    def split(self, content: str, reasoning: str, *, mixed: bool) -> Parts:
        """All messages before the last together, and the last message, which must be on the channel `final`.

        Raises:
            Odd: the generation does not have this form.
        """
        bare = content.removeprefix(_BEGIN)
        ended = next((bare.removesuffix(end) for end in _ENDS if bare.endswith(end)), bare)
        *thoughts, last = ended.split(_NEXT)
        steps, answer = [_THOUGHT.fullmatch(message) for message in thoughts], _FINAL.fullmatch(last)
        if answer is None or None in steps:
            raise Odd("no final channel at the end")
        marks = 4 * len(thoughts) + 2 + (bare != content) + (ended != bare)
        if len(_MARKS.findall(skeleton(content))) != marks or _STRIPPED.search(fold(content)):
            raise Odd("odd marker")
        return Parts(strip_message("\n".join(step[1] for step in steps if step)), strip_message(answer[1]))
