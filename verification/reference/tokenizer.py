"""Loads a checkpoint's tokenizer unchanged; transformers is imported only then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from so8t_core.checkpoint_admission import refuse_code
from so8t_core.errors import InputError
from so8t_core.files import read_json


def load_tokenizer(directory: Path) -> Any:
    """The reference's tokenizer.

    Raises:
        InputError: transformers cannot load the tokenizer, or only with code from the checkpoint.
    """
    from transformers import AutoTokenizer

    config = directory / "config.json"
    refuse_code(directory, read_json(config) if config.is_file() else {})
    try:
        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # Exception, RuntimeError, and a panic of Rust code, which is not an Exception
        raise InputError(f"no usable tokenizer in {directory}: {' '.join(str(error).split())[:200]}") from None
