"""A GGUF file out of keys and tensors, byte by byte: what upstream's writer would refuse to write can be made here."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verification.gguf.reader import ARRAY, SCALARS, STRING, Cursor

U32, F32, BOOL, I32 = 4, 6, 7, 5


@dataclass
class Value:
    """A metadata value with its GGUF type; `inner` is an array's item type."""

    kind: int
    value: Any
    inner: int | None = None


@dataclass
class Tensor:
    """A tensor's description (dimensions innermost first) and its bytes."""

    dims: list[int]
    kind: int
    data: bytes
    offset: int | None = None  # None: behind the tensor before it


@dataclass
class Parts:
    """A whole file, to be changed and written again."""

    keys: dict[str, Value] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    alignment: int = 32

    def write(self, path: Path) -> Path:
        """Write it; sizes, offsets and padding follow from the parts."""
        path.unlink(missing_ok=True)  # a file that is mapped elsewhere keeps its bytes
        path.write_bytes(self.data())
        return path

    def data(self) -> bytes:
        """The file's bytes."""
        head = [b"GGUF", struct.pack("<IQQ", 3, len(self.tensors), len(self.keys))]
        head += [text(key) + entry(value) for key, value in self.keys.items()]
        body, at = bytearray(), 0
        for name, tensor in self.tensors.items():
            at = len(body) if tensor.offset is None else tensor.offset
            dims = struct.pack(f"<{len(tensor.dims)}Q", *tensor.dims)
            head.append(text(name) + struct.pack("<I", len(tensor.dims)) + dims + struct.pack("<IQ", tensor.kind, at))
            body += tensor.data + bytes(-len(tensor.data) % self.alignment)
        joined = b"".join(head)
        return joined + bytes(-len(joined) % self.alignment) + bytes(body)


def text(value: str) -> bytes:
    """A GGUF string."""
    raw = value.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def entry(value: Value) -> bytes:
    """A value behind its type."""
    if value.kind == ARRAY:
        assert value.inner is not None
        items = b"".join(_plain(value.inner, item) for item in value.value)
        return struct.pack("<IIQ", ARRAY, value.inner, len(value.value)) + items
    return struct.pack("<I", value.kind) + _plain(value.kind, value.value)


def _plain(kind: int, value: Any) -> bytes:
    return text(value) if kind == STRING else struct.pack("<" + SCALARS[kind], value)


def parts(path: Path) -> Parts:
    """A healthy file, taken apart."""
    import numpy as np
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    data = np.fromfile(path, dtype=np.uint8)
    cursor = Cursor(path, data)
    cursor.take(8)
    n_tensors, n_kv = cursor.unpack("Q"), cursor.unpack("Q")
    found = Parts()
    for _ in range(n_kv):
        key, kind = cursor.string(), cursor.unpack("I")
        inner = cursor.peek() if kind == ARRAY else None
        found.keys[key] = Value(kind, cursor.value(kind), inner)
    infos = []
    for _ in range(n_tensors):
        name, rank = cursor.string(), cursor.unpack("I")
        infos.append((name, [cursor.unpack("Q") for _ in range(rank)], cursor.unpack("I"), cursor.unpack("Q")))
    start = -(-cursor.at // found.alignment) * found.alignment
    for name, dims, kind, offset in infos:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        length = int(np.prod(dims)) // block * size
        found.tensors[name] = Tensor(dims, kind, data[start + offset : start + offset + length].tobytes())
    return found


def with_keys(source: Path, target: Path, keys: Mapping[str, Value | None]) -> Path:
    """A copy with some keys set, or left out where the value is None."""
    whole = parts(source)
    for key, value in keys.items():
        if value is None:
            whole.keys.pop(key, None)
        else:
            whole.keys[key] = value
    return whole.write(target)
