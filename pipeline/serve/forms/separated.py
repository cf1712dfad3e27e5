"""The form of an upstream that separates thinking: `reasoning_content`, `reasoning` or `thinking` beside `content`.

llama-server, vLLM and Ollama do this for the models that they know. A reply without any reasoning is odd, because the
upstream may have left the thinking in the content. Reasoning after the beginning of the content is odd too.
"""

from __future__ import annotations

from pipeline.serve.forms.form import Odd, Parts
from pipeline.serve.text_folding import has_tags


class Separated:
    """See `pipeline.serve.forms.form.Form`."""

    name, instructs, may_skip = "separated", False, False
    markers: tuple[str, ...] = ()

    def split(self, content: str, reasoning: str, *, mixed: bool) -> Parts:
        """The reasoning and the content.

        Raises:
            Odd: the generation does not have this form.
        """
        if not reasoning:
            raise Odd("upstream separated no thinking")
        if mixed:
            raise Odd("thinking after the answer began")
        if has_tags(content) or has_tags(reasoning):
            raise Odd("odd marker")
        return Parts(reasoning, content)
