"""Writes a checkpoint's stop tokens that llama.cpp does not know into keys of a GGUF file.

llama.cpp ends a generation at the ids of `eos_token_id`, `eot_token_id` and `eom_token_id`, and at tokens whose text is
in llama.cpp's list. The stop set of a checkpoint is a list in generation_config.json, or in config.json if there is no
such file; upstream's converter uses one id of this list. Phi-3.5's list has <|assistant|>, whose text llama.cpp does
not know. Such ids go into the free keys, eom before eot, because only the stop set reads eom. If no key is free, the
check `contract.stop_set` reports the stop token.
Source: llama.cpp, src/llama-vocab.cpp (special_eog_ids).
"""

from __future__ import annotations

from pathlib import Path

from so8t_core.errors import InputError
from so8t_core.files import read_json
from verification.engines.sandbox import Vocabulary
from verification.gguf.edit_keys import insert_keys
from verification.gguf.reader import read_gguf

KEYS = ("tokenizer.ggml.eom_token_id", "tokenizer.ggml.eot_token_id")


def eos_ids(path: Path) -> list[int]:
    """`eos_token_id` of a configuration file, a number or a list, in its order; empty if there is none.

    A model with a vision part has the key in `text_config`.

    Raises:
        InputError: the file is damaged.
    """
    fields = read_json(path) if path.is_file() else {}
    value, text = fields.get("eos_token_id"), fields.get("text_config")
    if value is None and isinstance(text, dict):
        value = text.get("eos_token_id")
    return [token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)]


def listed_stops(directory: Path) -> set[int]:
    """The eos ids at which transformers stops: from generation_config.json, or config.json if there is no such file.

    Raises:
        InputError: the file is damaged.
    """
    path = directory / "generation_config.json"
    return set(eos_ids(path if path.is_file() else directory / "config.json"))


def add_stop_keys(gguf: Path, directory: Path) -> dict[str, int]:
    """Make llama.cpp stop at the stop tokens of the checkpoint in `directory`; returns the written keys.

    The file is rewritten only if a stop token is missing (its data is copied, not held in memory).

    Raises:
        InputError: llama.cpp cannot load the file's vocabulary.
    """
    file = read_gguf(gguf)
    wanted = listed_stops(directory) - {file.metadata.get("tokenizer.ggml.eos_token_id")}
    if not wanted:
        return {}
    with Vocabulary(gguf) as model:  # an untrusted tokenizer may end llama.cpp, but not this process
        if model.refused:
            raise InputError(f"llama.cpp does not load the vocabulary of {gguf}: {model.refused}")
        missing = sorted(t for t in wanted if 0 <= t < model.vocab_size and not model.is_end(t))
    free = [key for key in KEYS if key not in file.metadata]
    added = dict(zip(free, missing, strict=False))
    if added:
        insert_keys(gguf, added)
    return added
