"""SO8T's form: first line `# 思考ステップ`, one line `# 最終回答`, as `pipeline.data.think_form` writes it.

After `fold` the words of each marker occur once in the whole text: a second time in any spelling, or in prose, is odd.
"""

from __future__ import annotations

from pipeline.data.think_form import ANSWER_MARKER, THINK_MARKER, strip_message
from pipeline.serve.forms.form import Odd, Parts
from pipeline.serve.text_folding import fold, has_tags

_MARKER_WORDS = (fold(THINK_MARKER), fold(ANSWER_MARKER))


class So8t:
    """See `pipeline.serve.forms.form.Form`."""

    name, markers, instructs, may_skip = "so8t", (THINK_MARKER, ANSWER_MARKER), True, False

    def split(self, content: str, reasoning: str, *, mixed: bool) -> Parts:
        """The text between the markers and the text after them.

        Raises:
            Odd: the generation does not have this form.
        """
        lines = content.split("\n")
        if lines[0] != THINK_MARKER:
            raise Odd("thinking marker not first")
        if lines.count(ANSWER_MARKER) != 1:
            raise Odd("answer marker missing or repeated")
        folded = fold(content)
        if any(folded.count(words) != 1 for words in _MARKER_WORDS) or has_tags(content):
            raise Odd("odd marker")
        border = lines.index(ANSWER_MARKER)
        return Parts(strip_message("\n".join(lines[1:border])), strip_message("\n".join(lines[border + 1 :])))
