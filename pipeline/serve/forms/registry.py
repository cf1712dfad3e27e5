"""Forms by name, and the form that a chat template uses.

To add a form: write a class as in `pair.py`, an entry in `_KNOWN`, and, if templates show the form, a text in `_SIGNS`.
"""

from __future__ import annotations

from pipeline.serve.forms.form import Form
from pipeline.serve.forms.harmony import Harmony
from pipeline.serve.forms.pair import Pair
from pipeline.serve.forms.separated import Separated
from pipeline.serve.forms.so8t import So8t
from so8t_core.errors import InputError

SO8T = So8t()
_PAIRS = {
    "mistral": ("[THINK]", "[/THINK]"),
    "seed": ("<seed:think>", "</seed:think>"),
    "kimi": ("◁think▷", "◁/think▷"),
    "gemma": ("<|channel>", "<channel|>"),  # the word `thought` on a line follows the first
    "thinking": ("<thinking>", "</thinking>"),
    "thought": ("<thought>", "</thought>"),
    "reasoning": ("<reasoning>", "</reasoning>"),
    "think": ("<think>", "</think>"),
}
_KNOWN: list[Form] = [SO8T, Harmony(), *(Pair(name, *tags) for name, tags in _PAIRS.items()), Separated()]
_SIGNS = {"harmony": ("<|channel|>",), **_PAIRS}
FORMS = {form.name: form for form in _KNOWN}


def form_named(name: str) -> Form:
    """The form of this name, or a pair of tags written `OPENING...CLOSING`.

    Raises:
        InputError: there is no such form.
    """
    opening, dots, closing = name.partition("...")
    if dots:
        return Pair(name, opening, closing)
    if name not in FORMS:
        raise InputError(f"--think-form {name!r} is none of {', '.join(FORMS)}; or give a pair: '<plan>...</plan>'")
    return FORMS[name]


def form_of_template(source: str) -> Form:
    """The form whose markers stand in a chat template; SO8T's form if there are none."""
    found = (name for name, signs in _SIGNS.items() if any(sign in source for sign in signs))
    return FORMS[next(found, SO8T.name)]


def describe(form: Form) -> str:
    """The form for the start-up line."""
    return f"{form.name} ({' ... '.join(form.markers) or 'the upstream separates the thinking'})"
