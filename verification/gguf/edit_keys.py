"""Keys of a GGUF file left out or added in place: the header is written anew, the tensors' bytes are copied."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from so8t_core.files import atomic_file
from verification.gguf.reader import Cursor, GGUFFile, read_gguf

_N_KV = 16  # byte at which the number of keys stands: behind magic, version and number of tensors
_KEYS = _N_KV + 8  # byte at which the first key stands
_UINT32, _STRING = 4, 8  # GGUF's numbers of the types


def drop_keys(gguf: Path, keys: Collection[str]) -> None:
    """Leave keys out of a file; tensors and all other keys stay as they are, byte for byte.

    Raises:
        InputError: it is no readable GGUF file.
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
    """Write keys behind a file's own: numbers as unsigned 32-bit ones, texts as strings.

    Raises:
        InputError: it is no readable GGUF file.
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
    """A value behind the number of its type."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    return struct.pack("<II", _UINT32, value)


def _write(file: GGUFFile, count: int, entries: bytes) -> None:
    """The file with these metadata entries in place of its own."""
    alignment = int(file.metadata.get("general.alignment", 32))
    with open(file.path, "rb") as source, atomic_file(file.path) as temporary, open(temporary, "wb") as target:
        head = source.read(file.header)
        target.write(head[:_N_KV] + struct.pack("<Q", count) + entries + head[file.keys_end :])
        target.write(bytes(-target.tell() % alignment))
        source.seek(-source.tell() % alignment, os.SEEK_CUR)  # over the padding to the data
        shutil.copyfileobj(source, target, 1 << 22)
    read_gguf(file.path)
