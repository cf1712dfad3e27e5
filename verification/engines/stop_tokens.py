"""Stop tokens that llama.cpp would not stop at, written into keys of a GGUF file.

llama.cpp ends a generation at the ids of `eos_token_id`, `eot_token_id` and `eom_token_id`, and at tokens whose text is
on a list of its own. The stop set of a checkpoint is a list in generation_config.json, of which upstream's converter
takes one id. Phi-3.5's list has <|assistant|>, whose text llama.cpp does not know: such ids go into the free keys, eom
before eot, because nothing but the stop set reads eom. What finds no key is left to the check `contract.stop_set`.
Source: llama.cpp, src/llama-vocab.cpp (special_eog_ids).
"""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

from so8t_core.errors import InputError
from so8t_core.files import atomic_file, read_json
from verification.engines.sandbox import Vocabulary
from verification.gguf.reader import read_gguf

KEYS = ("tokenizer.ggml.eom_token_id", "tokenizer.ggml.eot_token_id")
_N_KV = 16  # byte at which the number of keys stands: behind magic, version and number of tensors
_UINT32 = 4  # GGUF's number of the type


def listed_stops(directory: Path) -> set[int]:
    """The eos ids of generation_config.json; empty where there is none.

    Raises:
        InputError: the file is damaged.
    """
    path = directory / "generation_config.json"
    if not path.is_file():
        return set()
    value = read_json(path).get("eos_token_id")
    found = value if isinstance(value, list) else [value]
    return {token for token in found if isinstance(token, int)}


def add_stop_keys(gguf: Path, directory: Path) -> dict[str, int]:
    """Make llama.cpp stop where generation_config.json of `directory` says; returns the keys that were written.

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


def insert_keys(gguf: Path, keys: dict[str, int]) -> None:
    """Write unsigned 32-bit keys behind a file's own, in place of the file."""
    file = read_gguf(gguf)
    alignment = int(file.metadata.get("general.alignment", 32))
    entries = b"".join(
        struct.pack(f"<Q{len(key)}sII", len(key), key.encode(), _UINT32, value) for key, value in keys.items()
    )
    with open(gguf, "rb") as source, atomic_file(gguf) as temporary, open(temporary, "wb") as target:
        head = source.read(file.header)
        n_kv = struct.unpack_from("<Q", head, _N_KV)[0] + len(keys)
        target.write(head[:_N_KV] + struct.pack("<Q", n_kv) + head[_N_KV + 8 : file.keys_end] + entries)
        target.write(head[file.keys_end :])
        target.write(bytes(-target.tell() % alignment))
        source.seek(-source.tell() % alignment, os.SEEK_CUR)  # over the padding to the data
        shutil.copyfileobj(source, target, 1 << 22)
    read_gguf(gguf)
