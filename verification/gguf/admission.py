"""Limits for GGUF files, checked while the header is read: sizes, names, and the type of every known key.

`read_gguf` calls these functions at each step of the header, so every command that opens a GGUF has the same rules. A
refusal is an InputError of one line with key or tensor, value and bound. The bounds of tensors are llama.cpp's
(GGML_MAX_DIMS, GGML_MAX_NAME); the other bounds are far above the largest published files (Gemma-3: 1.3 million array
items).
Token strings may hold any bytes. Source: llama.cpp, ggml/src/gguf.cpp and src/llama-model-loader.cpp.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from so8t_core.errors import InputError
from verification.gguf.key_types import NAMES, wanted

MAX_ENTRIES, MAX_TENSORS, MAX_ITEMS, MAX_STRING = 65_536, 20_000, 1 << 22, 1 << 24
MAX_HEADER = 1 << 25  # bytes; Gemma-3's vocabulary of 262,144 tokens takes 12 MB
MAX_TOKENS = 1 << 19  # Gemma-3n has 262,400, LaBSE 501,153; llama.cpp needs five seconds for a million
MAX_DIMS, MAX_NAME, MAX_KEY, MAX_BLOCKS, MAX_ALIGNMENT = 4, 64, 1 << 16, 10_000, 1 << 16
_LARGEST = {"integer": (1 << 32) - 1, "float": float(np.finfo(np.float32).max)}  # llama.cpp reads 32 bits of each

_STRAY = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, as `surrogateescape` keeps them
_BLOCK = re.compile(r"blk\.([0-9]{1,5})\.")
_ARCHITECTURE = re.compile(r"[A-Za-z0-9_-]{1,63}", re.ASCII)
# tensors whose rank is the same in every architecture; a Hugging Face order of (out, in) for the matrices
_MATRIX = re.compile(r"(token_embd|output|blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down)))\.weight")
_VECTOR = re.compile(r"(output_norm|blk\.\d+\.(attn_norm|ffn_norm))\.weight")
_NOT_WEIGHTS = {"I8", "I16", "I32", "I64", "F64"}


def counts(path: Path, n_tensors: int, n_kv: int) -> None:
    """Refuse more tensors or metadata entries than any model has.

    Raises:
        InputError: the file states more than the bound.
    """
    for found, bound, what in ((n_kv, MAX_ENTRIES, "metadata entries"), (n_tensors, MAX_TENSORS, "tensors")):
        if found > bound:
            raise InputError(f"{path} states {found} {what}, at most {bound} are read; the file is damaged")


def text(path: Path, where: str, value: str, *, bound: int = MAX_STRING) -> None:
    """Refuse a text that a C reader would cut at a NUL, that is not UTF-8, or that is longer than `bound` characters.

    Raises:
        InputError: the text is refused.
    """
    if len(value) > bound:
        raise InputError(f"{path}: {where} has {len(value)} characters, at most {bound} are read")
    if "\0" in value:
        raise InputError(f"{path}: {where} holds a NUL at character {value.index(chr(0))}, where C readers stop")
    if not value.isascii() and _STRAY.search(value):
        raise InputError(f"{path}: {where} is not UTF-8; write the file again with a text in UTF-8")


def header(path: Path, size: int) -> None:
    """Refuse a header (keys and descriptions of tensors) with more bytes than any model needs.

    Raises:
        InputError: `size` exceeds the bound.
    """
    if size > MAX_HEADER:
        raise InputError(f"{path}: the header goes beyond {MAX_HEADER} bytes, more than any model has; it is damaged")


def key_type(path: Path, key: str, kind: int, inner: int | None) -> None:
    """Refuse a known key whose type differs from the type that llama.cpp reads; `inner` is an array's item type.

    Raises:
        InputError: the type differs.
    """
    rule = wanted(key)
    if rule is not None and not rule.allows(kind, inner):
        item = kind if inner is None else inner
        word = ("array of " if inner is not None else "") + NAMES.get(item, f"type {item}")
        raise InputError(f"{path}: metadata key {key} is {word}, wanted {rule}; convert again")


def key_value(path: Path, key: str, value: Any) -> None:
    """Refuse an invalid value of a known key.

    Invalid are numbers that are negative, not finite or too large for 32 bits, an architecture with odd characters, and
    too many tokens or blocks.

    Raises:
        InputError: the value is invalid.
    """
    rule = wanted(key)
    if rule is None:
        return
    if key == "general.architecture" and value and not _ARCHITECTURE.fullmatch(value):
        raise InputError(
            f"{path}: general.architecture is {value[:40]!r}, wanted at most 63 of A-Z a-z 0-9 _ -; the file is damaged"
        )
    if key == "tokenizer.ggml.tokens" and len(value) > MAX_TOKENS:
        raise InputError(
            f"{path}: {key} holds {len(value)} tokens, at most {MAX_TOKENS} are read: no model is known to have more"
        )
    numbers = value if isinstance(value, list) else [value]
    if not numbers or isinstance(numbers[0], str):
        return
    kind = "float" if isinstance(numbers[0], float) else "integer"
    if kind == "float" and isinstance(value, list):
        return  # scores of tokens are checked with the vocabulary
    low = 0 if rule.is_unsigned else -math.inf
    bad = next((n for n in numbers if not math.isfinite(n) or n < low or abs(n) > _LARGEST[kind]), None)
    if bad is not None:
        bound = "0 or more, within 32 bits" if rule.is_unsigned else "a finite number within 32 bits"
        raise InputError(f"{path}: metadata key {key} is {bad}, wanted {bound}; convert again")
    if key.endswith(".block_count") and bad is None and numbers[0] > MAX_BLOCKS:
        raise InputError(f"{path}: metadata key {key} is {value}, at most {MAX_BLOCKS} blocks are read; convert again")


def alignment(path: Path, value: int) -> None:
    """Refuse an alignment that is not a power of two or exceeds the bound.

    Raises:
        InputError: the alignment is refused.
    """
    if not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
        raise InputError(
            f"{path}: general.alignment is {value}, not a power of two up to {MAX_ALIGNMENT}; the file is damaged"
        )


def tensor(path: Path, name: str, n_dims: int) -> None:
    """Refuse a tensor whose name or rank llama.cpp cannot hold, or whose block number no model has.

    Raises:
        InputError: the tensor is refused.
    """
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


def shape(path: Path, name: str, dims: Sequence[int], kind: GGMLQuantizationType) -> tuple[int, ...]:
    """A tensor's shape in Hugging Face order, with the rank that its name requires.

    llama.cpp ignores dimensions of 1 that only pad the rank: an attn_q of (1, 1, 64, 32) is (64, 32).

    Raises:
        InputError: the tensor has no element, another rank, or a type that cannot hold weights.
    """
    found = tuple(reversed(dims)) or (1,)
    if not math.prod(found):
        raise InputError(f"{path}: tensor {name} has dimensions {list(dims)}, so no element; convert again")
    rank = 2 if _MATRIX.fullmatch(name) else 1 if _VECTOR.fullmatch(name) else None
    if not readable(kind) or (rank and kind.name in _NOT_WEIGHTS):
        raise InputError(f"{path}: tensor {name} is {kind.name}, a type in which no weights are stored; convert again")
    if rank is None:
        return found
    while len(found) > rank and found[0] == 1:
        found = found[1:]
    found = (1,) * (rank - len(found)) + found
    if len(found) != rank:
        raise InputError(f"{path}: tensor {name} has dimensions {list(dims)}, {rank} are wanted here; convert again")
    return found


@functools.cache
def readable(kind: GGMLQuantizationType) -> bool:
    """Whether the values of a type can be computed here; types that exist in memory only, as Q8_K, are not readable."""
    if kind.name in _NOT_WEIGHTS or kind.name in ("F32", "F16"):
        return True
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except (NotImplementedError, KeyError):
        return False
    return True
