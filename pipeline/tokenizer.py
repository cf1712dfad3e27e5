"""Load a checkpoint's tokenizer; it is never saved again, because a saved copy loses files and flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from so8t_core.errors import InputError
from verification.reference.tokenizer import load_tokenizer as load_any


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a checkpoint directory.

    Raises:
        InputError: the directory has no tokenizer, or the tokenizer has no chat template.
    """
    tokenizer = load_any(directory)
    if tokenizer.chat_template is None:
        raise InputError(f"the tokenizer in {directory} has no chat template; /think data need one")
    return tokenizer
