"""The header of a GGUF file written anew in place, its data copied: keys that nobody should publish are dropped."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Collection
from pathlib import Path

import numpy as np

from so8t_core.files import atomic_file
from verification.gguf.reader import Cursor, read_gguf

_N_KV = 16  # byte at which the number of keys stands: behind magic, version and number of tensors


def drop_keys(gguf: Path, keys: Collection[str]) -> None:
    """Leave keys out of a file; tensors and all other keys stay as they are, byte for byte.

    Raises:
        InputError: it is no readable GGUF file.
    """
    if not keys:
        return
    file = read_gguf(gguf)
    alignment = int(file.metadata.get("general.alignment", 32))
    cursor = Cursor(gguf, np.memmap(gguf, dtype=np.uint8, mode="r"))
    cursor.take(_N_KV + 8)
    kept = []
    for _ in range(len(file.metadata)):
        begin = cursor.at
        key = cursor.string()
        cursor.value(cursor.unpack("I"))
        if key not in keys:
            kept.append(bytes(cursor.data[begin : cursor.at]))
    with open(gguf, "rb") as source, atomic_file(gguf) as temporary, open(temporary, "wb") as target:
        head = source.read(file.header)
        target.write(head[:_N_KV] + struct.pack("<Q", len(kept)) + b"".join(kept) + head[file.keys_end :])
        target.write(bytes(-target.tell() % alignment))
        source.seek(-source.tell() % alignment, os.SEEK_CUR)  # over the padding to the data
        shutil.copyfileobj(source, target, 1 << 22)
    read_gguf(gguf)
