"""A checkpoint's tokenizer, loaded as it is; transformers is imported when one is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from so8t_core.errors import InputError


def load_tokenizer(directory: Path) -> Any:
    """The reference's own tokenizer.

    Raises:
        InputError: transformers cannot load it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"no usable tokenizer in {directory}: {' '.join(str(error).split())[:200]}") from None
