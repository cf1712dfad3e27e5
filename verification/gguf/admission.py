"""What a GGUF file may hold before anything is computed from it: budgets, names, and the type of every known key.

`read_gguf` asks here at each step of the header, so every command that opens a GGUF has the same rules. A refusal is
an InputError of one line with key or tensor, value and bound. The bounds of tensors are llama.cpp's (GGML_MAX_DIMS,
GGML_MAX_NAME); the other bounds stand far above the largest published files (Gemma-3: 1.3 million array items).
Token strings may hold any bytes. Source: llama.cpp, ggml/src/gguf.cpp and src/llama-model-loader.cpp.
"""

from __future__ import annotations

import re
from pathlib import Path

from so8t_core.errors import InputError

MAX_ENTRIES, MAX_TENSORS, MAX_ITEMS, MAX_STRING = 65_536, 100_000, 1 << 22, 1 << 24
MAX_DIMS, MAX_NAME, MAX_KEY, MAX_BLOCKS, MAX_ALIGNMENT = 4, 64, 1 << 16, 10_000, 1 << 16

_WORDS = {
    0: "u8", 1: "i8", 2: "u16", 3: "i16", 4: "u32", 5: "i32", 6: "f32", 7: "bool", 8: "string", 10: "u64", 11: "i64",
    12: "f64",
}  # fmt: skip
_KINDS = {"integer": {0, 1, 2, 3, 4, 5, 10, 11}, "float": {6, 12}, "bool": {7}, "string": {8}}
_TYPES = (
    (r"general\.(architecture|name|type)|tokenizer\.(chat_template|ggml\.(model|pre))", "string"),
    (r"general\.(alignment|file_type|quantization_version)|split\.(no|count)", "integer"),
    (r"tokenizer\.ggml\.(tokens|merges)", "array of string"),
    (r"tokenizer\.ggml\.scores", "array of float"),
    (r"tokenizer\.ggml\.token_type", "array of integer"),
    (r"tokenizer\.ggml\.\w+_token_id", "integer"),
    (r"tokenizer\.ggml\.add_\w+", "bool"),
    (r"[\w-]+\.(block_count|context_length|embedding_length|vocab_size)", "integer"),
    (r"[\w-]+\.(feed_forward_length|attention\.head_count(_kv)?)", "integer or array of integer"),
    (r"[\w-]+\.attention\.((key|value)_length|kv_lora_rank|sliding_window)", "integer"),
    (r"[\w-]+\.attention\.layer_norm(_rms)?_epsilon", "float"),
    (r"[\w-]+\.rope\.(dimension_count|scaling\.original_context_length)", "integer"),
    (r"[\w-]+\.rope\.(freq_base(_swa)?|scaling\.(factor|attn_factor))", "float"),
    (r"[\w-]+\.rope\.scaling\.type", "string"),
)
_TABLE = tuple((re.compile(pattern, re.ASCII), wanted.split(" or ")) for pattern, wanted in _TYPES)
_BLOCK = re.compile(r"blk\.([0-9]{1,5})\.")


def counts(path: Path, n_tensors: int, n_kv: int) -> None:
    """Refuse more tensors or metadata entries than any model has."""
    for found, bound, what in ((n_kv, MAX_ENTRIES, "metadata entries"), (n_tensors, MAX_TENSORS, "tensors")):
        if found > bound:
            raise InputError(f"{path} states {found} {what}, at most {bound} are read; the file is damaged")


def text(path: Path, where: str, value: str, *, bound: int = MAX_STRING) -> None:
    """Refuse a text that a C reader would cut at a NUL, that is not UTF-8, or that is longer than `bound` bytes."""
    if len(value) > bound:
        raise InputError(f"{path}: {where} has {len(value)} characters, at most {bound} are read")
    if "\0" in value:
        raise InputError(f"{path}: {where} holds a NUL at character {value.index(chr(0))}, where C readers stop")
    if any("\udc80" <= c <= "\udcff" for c in value):
        raise InputError(f"{path}: {where} is not UTF-8; write the file again with a text in UTF-8")


def key_type(path: Path, key: str, kind: int, inner: int | None) -> None:
    """Refuse a known key of another type than llama.cpp asks for; `inner` is an array's item type."""
    for pattern, wanted in _TABLE:
        if pattern.fullmatch(key):
            array = "array of " if inner is not None else ""
            found = kind if inner is None else inner
            if not any(w.startswith("array of ") == bool(array) and found in _KINDS[w.split()[-1]] for w in wanted):
                word = array + _WORDS.get(found, f"type {found}")
                raise InputError(f"{path}: metadata key {key} is {word}, wanted {' or '.join(wanted)}; convert again")


def alignment(path: Path, value: int) -> None:
    """Refuse an alignment that is no power of two or beyond the bound."""
    if not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
        raise InputError(
            f"{path}: general.alignment is {value}, not a power of two up to {MAX_ALIGNMENT}; the file is damaged"
        )


def tensor(path: Path, name: str, n_dims: int) -> None:
    """Refuse a tensor whose name or rank llama.cpp cannot hold, or whose block number no model has."""
    where = f"tensor name {name[:80]!r}"
    text(path, where, name, bound=MAX_NAME - 1)
    if not name or len(name.encode()) >= MAX_NAME:
        raise InputError(f"{path}: {where} has {len(name.encode())} bytes, llama.cpp reads 1 to {MAX_NAME - 1}")
    if not name.isprintable():
        raise InputError(f"{path}: {where} holds characters that cannot be printed; the file is damaged")
    if n_dims > MAX_DIMS:
        raise InputError(f"{path}: tensor {name} has {n_dims} dimensions, llama.cpp reads at most {MAX_DIMS}")
    if name.startswith("blk."):
        block = _BLOCK.match(name)
        if block is None or int(block[1]) >= MAX_BLOCKS:
            raise InputError(f"{path}: {where} needs a block number from 0 to {MAX_BLOCKS - 1} behind 'blk.'")
