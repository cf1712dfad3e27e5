"""Load a checkpoint's tokenizer as it is; it is never saved again (a re-saved tokenizer loses files and flags)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from so8t_core.errors import InputError


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a checkpoint directory.

    Raises:
        InputError: none there, or it has no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"no usable tokenizer in {directory}: {str(error).strip().splitlines()[0]}") from None
    if tokenizer.chat_template is None:
        raise InputError(f"the tokenizer in {directory} has no chat template; /think data need one")
    return tokenizer
