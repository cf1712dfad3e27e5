"""Find a model's form of thinking, by its GGUF file, the Modelfile beside it or its chat template."""

from __future__ import annotations

from pathlib import Path

from pipeline.data.think_form import FORM_KEY, THINK_MARKER
from pipeline.serve.forms.form import Form
from pipeline.serve.forms.registry import SO8T, form_named, form_of_template
from so8t_core.errors import InputError
from verification.gguf.reader import GGUFFile
from verification.gguf.split_set import set_stem


def modelfile_beside(gguf: Path) -> str:
    """The text of the Modelfile beside a file; empty where no Modelfile is there."""
    beside = gguf.with_name(f"{set_stem(gguf)}.Modelfile")
    return beside.read_text(encoding="utf-8") if beside.is_file() else ""


def form_of_file(file: GGUFFile, template: str) -> Form:
    """The form of thinking that the file names by its key; without a key, SO8T's form if the Modelfile asks for it.

    Otherwise, and with the key `base`, it is the form that the chat template shows.

    Raises:
        InputError: the key names no form.
    """
    named = file.metadata.get(FORM_KEY)
    if named == "base":
        return form_of_template(template)
    if named is not None:
        try:
            return form_named(named)
        except InputError:
            raise InputError(
                f"{file.path} has {FORM_KEY} {named!r}, which is no form; name one, --think-form so8t"
            ) from None
    return SO8T if THINK_MARKER in modelfile_beside(file.path) else form_of_template(template)
