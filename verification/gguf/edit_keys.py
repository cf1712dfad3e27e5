"""Removes or adds keys of a GGUF file in place: the header is written anew, the tensors' bytes are copied."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from so8t_core.files import atomic_file
from verification.gguf.reader import Cursor, GGUFFile, read_gguf

_N_KV = 16  # offset in bytes of the number of keys, after magic, version and number of tensors
_KEYS = _N_KV + 8  # offset in bytes of the first key
_UINT32, _STRING = 4, 8  # GGUF's numbers of these types


def drop_keys(gguf: Path, keys: Collection[str]) -> None:
    """Remove keys from a file; the bytes of the tensors and of all other keys stay the same.

    Raises:
        InputError: the file is not a readable GGUF file.
    """
    if not keys:
        return
    file = read_gguf(gguf)
    cursor = Cursor(gguf, np.memmap(gguf, dtype=np.uint8, mode="r"))
    cursor.take(_KEYS)
    kept = []
    for _ in range(len(file.metadata)):
        begin = cursor.at
        key = cursor.string()
        cursor.value(cursor.unpack("I"))
        if key not in keys:
            kept.append(bytes(cursor.data[begin : cursor.at]))
    _write(file, len(kept), b"".join(kept))


def insert_keys(gguf: Path, keys: Mapping[str, int | str]) -> None:
    """Add keys after a file's last key: numbers as unsigned 32-bit integers, texts as strings.

    Raises:
        InputError: the file is not a readable GGUF file.
    """
    file = read_gguf(gguf)
    added = [_string(key) + _value(value) for key, value in keys.items()]
    with open(gguf, "rb") as source:
        own = source.read(file.keys_end)[_KEYS:]
    _write(file, len(file.metadata) + len(keys), own + b"".join(added))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: int | str) -> bytes:
    """The number of a value's type, then the value."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    return struct.pack("<II", _UINT32, value)


def _write(file: GGUFFile, count: int, entries: bytes) -> None:
    """Write the file with these metadata entries instead of its present ones."""
    alignment = int(file.metadata.get("general.alignment", 32))
    with open(file.path, "rb") as source, atomic_file(file.path) as temporary, open(temporary, "wb") as target:
        head = source.read(file.header)
        target.write(head[:_N_KV] + struct.pack("<Q", count) + entries + head[file.keys_end :])
        target.write(bytes(-target.tell() % alignment))
        source.seek(-source.tell() % alignment, os.SEEK_CUR)  # skip the padding before the data
        shutil.copyfileobj(source, target, 1 << 22)
    read_gguf(file.path)
