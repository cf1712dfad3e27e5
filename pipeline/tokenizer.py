"""Load a checkpoint's tokenizer as it is; it is never saved again (a re-saved tokenizer loses files and flags)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from so8t_core.errors import InputError
from verification.reference.tokenizer import load_tokenizer as load_any


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a checkpoint directory.

    Raises:
        InputError: none there, or it has no chat template.
    """
    tokenizer = load_any(directory)
    if tokenizer.chat_template is None:
        raise InputError(f"the tokenizer in {directory} has no chat template; /think data need one")
    return tokenizer
