"""Stop tokens that llama.cpp would not stop at, written into keys of a GGUF file.

llama.cpp ends a generation at the ids of `eos_token_id`, `eot_token_id` and `eom_token_id`, and at tokens whose text is
on a list of its own. The stop set of a checkpoint is a list in generation_config.json, or in config.json where there is
no such file; upstream's converter takes one id of it. Phi-3.5's list has <|assistant|>, whose text llama.cpp does not
know: such ids go into the free keys, eom before eot, because nothing but the stop set reads eom. What finds no key is
left to the check `contract.stop_set`.
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
    """`eos_token_id` of a configuration file, a number or a list, in its order; empty where there is none.

    A model with a vision part names it in `text_config`.

    Raises:
        InputError: the file is damaged.
    """
    fields = read_json(path) if path.is_file() else {}
    value, text = fields.get("eos_token_id"), fields.get("text_config")
    if value is None and isinstance(text, dict):
        value = text.get("eos_token_id")
    return [token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)]


def listed_stops(directory: Path) -> set[int]:
    """The eos ids at which transformers stops: generation_config.json's, or config.json's where there is no such file.

    Raises:
        InputError: the file is damaged.
    """
    path = directory / "generation_config.json"
    return set(eos_ids(path if path.is_file() else directory / "config.json"))


def add_stop_keys(gguf: Path, directory: Path) -> dict[str, int]:
    """Make llama.cpp stop where the checkpoint in `directory` says; returns the keys that were written.

    The file is only rewritten when a stop is missing (a copy of its data, nothing in memory).

    Raises:
        InputError: llama.cpp cannot load the file's vocabulary.
    """
    file = read_gguf(gguf)
    wanted = listed_stops(directory) - {file.metadata.get("tokenizer.ggml.eos_token_id")}
    if not wanted:
        return {}
    with Vocabulary(gguf) as model:  # of a stranger's tokenizer: what ends llama.cpp must not end this process
        if model.refused:
            raise InputError(f"llama.cpp does not load the vocabulary of {gguf}: {model.refused}")
        missing = sorted(t for t in wanted if 0 <= t < model.vocab_size and not model.is_end(t))
    free = [key for key in KEYS if key not in file.metadata]
    added = dict(zip(free, missing, strict=False))
    if added:
        insert_keys(gguf, added)
    return added
