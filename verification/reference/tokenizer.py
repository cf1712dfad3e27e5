"""A checkpoint's tokenizer, loaded as it is; transformers is imported when one is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from so8t_core.checkpoint_admission import refuse_code
from so8t_core.errors import InputError
from so8t_core.files import read_json


def load_tokenizer(directory: Path) -> Any:
    """The reference's own tokenizer.

    Raises:
        InputError: transformers cannot load it, or only with code of the checkpoint's own.
    """
    from transformers import AutoTokenizer

    config = directory / "config.json"
    refuse_code(directory, read_json(config) if config.is_file() else {})
    try:
        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # bare Exception, RuntimeError, and a panic of Rust code, which is no Exception
        raise InputError(f"no usable tokenizer in {directory}: {' '.join(str(error).split())[:200]}") from None
