"""A GGUF file in parts, which can be changed and written again: every key, tensor and type, also to invalid values."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from verification.gguf.reader import ARRAY, SCALARS, STRING, Cursor, read_gguf


@dataclass
class Info:
    """One tensor's description and data."""

    name: str
    dims: list[int]  # innermost first
    kind: int
    data: bytes


@dataclass
class Raw:
    """A GGUF file in parts: keys as (type, value) and tensors in the file's order."""

    keys: dict[str, tuple[int, Any]]
    tensors: list[Info]
    arrays: dict[str, int] = field(default_factory=dict)  # key -> type of its items

    @classmethod
    def read(cls, path: Path) -> Raw:
        """Read a whole file."""
        whole = read_gguf(path)
        cursor = Cursor(path, np.memmap(path, dtype=np.uint8, mode="r"))
        cursor.take(8)
        n_tensors, n_keys = cursor.unpack("Q"), cursor.unpack("Q")
        raw = cls({}, [])
        for _ in range(n_keys):
            key, kind = cursor.string(), cursor.unpack("I")
            if kind == ARRAY:
                raw.arrays[key] = struct.unpack_from("<I", cursor.data, cursor.at)[0]
            raw.keys[key] = kind, cursor.value(kind)
        for _ in range(n_tensors):
            name = cursor.string()
            dims = [cursor.unpack("Q") for _ in range(cursor.unpack("I"))]
            kind, _offset = cursor.unpack("I"), cursor.unpack("Q")
            raw.tensors.append(Info(name, dims, kind, whole.tensors[name].raw.tobytes()))
        return raw

    def write(self, path: Path, *, alignment: int = 32) -> Path:
        """Write the file anew, with its tensors at multiples of `alignment` bytes."""

        def text(value: str) -> bytes:
            encoded = value.encode("utf-8", errors="surrogateescape")
            return struct.pack("<Q", len(encoded)) + encoded

        def pack(kind: int, value: Any) -> bytes:
            return text(value) if kind == STRING else struct.pack("<" + SCALARS[kind], value)

        header = [b"GGUF", struct.pack("<IQQ", 3, len(self.tensors), len(self.keys))]
        for key, (kind, value) in self.keys.items():
            header += [text(key), struct.pack("<I", kind)]
            if kind == ARRAY:
                inner = self.arrays[key]
                header += [struct.pack("<IQ", inner, len(value)), *(pack(inner, item) for item in value)]
            else:
                header.append(pack(kind, value))
        offset = 0
        for t in self.tensors:
            dims = struct.pack(f"<{len(t.dims)}Q", *t.dims)
            header.append(text(t.name) + struct.pack("<I", len(t.dims)) + dims + struct.pack("<IQ", t.kind, offset))
            offset += -(-len(t.data) // alignment) * alignment
        start = b"".join(header)
        body = [t.data + bytes(-len(t.data) % alignment) for t in self.tensors]
        path.write_bytes(start + bytes(-len(start) % alignment) + b"".join(body))
        return path
