"""A pair of tags around the thinking: `<think>steps</think>answer`, `[THINK]steps[/THINK]answer`, or any other pair.

The opening tag may be missing, because many chat templates write it into the prompt. All text before the one closing
tag is thinking and is never shown.
"""

from __future__ import annotations

import re

from pipeline.data.think_form import strip_message
from pipeline.serve.forms.form import Odd, Parts
from pipeline.serve.text_folding import TAGS, fold, skeleton
from so8t_core.errors import InputError


class Pair:
    """See `pipeline.serve.forms.form.Form`.

    Raises:
        InputError: the two tags are too similar to each other or to ordinary text.
    """

    instructs, may_skip = False, True

    def __init__(self, name: str, opening: str, closing: str) -> None:
        self.name, self.markers = name, (opening, closing)
        bare = [skeleton(marker).rstrip("|>") for marker in self.markers]  # a tag that is cut off counts too
        if not all(map(fold, self.markers)) or opening in closing or closing in opening:
            raise InputError(f"--think-form {name!r}: both tags need a letter or digit, and neither may hold the other")
        self._marks = re.compile("|".join([TAGS, *map(re.escape, bare)]))
        if [self._count(marker) for marker in self.markers] != [1, 1]:
            raise InputError(f"--think-form {name!r}: one tag must be one word in brackets, or a few plain words")

    def split(self, content: str, reasoning: str, *, mixed: bool) -> Parts:
        """The text before the closing tag and the text after it."""
        opening, closing = self.markers
        opened = content.startswith(opening)
        body = content.removeprefix(opening)
        if body.count(closing) != 1:
            raise Odd("closing tag missing or repeated")
        if self._count(content) != 1 + opened:
            raise Odd("odd marker")
        steps, answer = body.split(closing)
        return Parts(strip_message(steps), strip_message(answer))

    def _count(self, text: str) -> int:
        """The number of tags of any family and of this pair, in any spelling."""
        return len(self._marks.findall(skeleton(text)))
