"""Reads a GGUF file or a set of shards, or refuses it: metadata as Python values, tensors as views of raw bytes.

Layout (little endian): "GGUF" | u32 version | u64 n_tensors | u64 n_kv | n_kv x (string key, u32 type, value) |
n_tensors x (string name, u32 n_dims, u64 dims innermost first, u32 type, u64 offset) | padding | data.
The header is parsed here and not by gguf.GGUFReader, because the error for a truncated file must name the missing part,
and because this parser reads 100,000 vocabulary strings in 0.1 s. Shapes are in Hugging Face order (outermost first).
Source: the GGUF specification (ggml, docs/gguf.md); block sizes, file types and dequantisation come from the
gguf package.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import dequantize

from so8t_core.errors import InputError
from verification.gguf import admission
from verification.gguf.split_set import (
    is_shard,
    only_set,
    require_one_model,
    require_shard,
    set_digest,
    set_size,
    set_stem,
    siblings,
)

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
BOOL, STRING, ARRAY = 7, 8, 9
_PLAIN = {"I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "F64": "<f8"}
FLOAT_TYPES = {"F32", "F16", "BF16"}
TOGETHER = 4096  # weights in a piece that is dequantised as one row

# The number stored in general.file_type (llama.cpp's enum llama_ftype) -> its name without gguf's prefix: "Q4_K_M".
FILE_TYPES = {
    int(known): re.sub("^(ALL|MOSTLY)_|_MOE$", "", known.name)
    for known in LlamaFileType
    if known is not LlamaFileType.GUESSED  # a flag that llama.cpp keeps in memory, never in a file
}


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor; `raw` is a view into the mapped file."""

    name: str
    shape: tuple[int, ...]  # Hugging Face order
    type: str  # "F16", "Q4_K", ...
    raw: npt.NDArray[np.uint8]
    offset: int = 0  # position of the first byte in the file

    def pieces(self, weights: int = 1 << 22) -> Iterator[GGUFTensor]:
        """The tensor in pieces of whole rows, each of about `weights` weights, so that memory is bounded."""
        rows = int(np.prod(self.shape[:-1], dtype=np.int64))
        step, bytes_row = max(weights // self.shape[-1], 1), self.raw.size // rows
        for row in range(0, rows, step):
            count = min(step, rows - row)
            begin = row * bytes_row
            raw = self.raw[begin : begin + count * bytes_row]
            yield GGUFTensor(self.name, (count, self.shape[-1]), self.type, raw, self.offset + begin)

    def values(self) -> npt.NDArray[np.float32]:
        """Dequantised to float32, in `shape`."""
        kind = GGMLQuantizationType[self.type]
        if self.type == "F32":
            return self.raw.view(np.float32).reshape(self.shape)
        if self.type == "F16":
            return self.raw.view(np.float16).reshape(self.shape).astype(np.float32)
        if self.type in _PLAIN:
            with np.errstate(over="ignore"):  # a float64 beyond float32 is infinite
                return self.raw.view(_PLAIN[self.type]).reshape(self.shape).astype(np.float32)
        block, size = GGML_QUANT_SIZES[kind]
        long = TOGETHER // block * size  # bytes of a piece: gguf reads 16 rows at a time, of any length
        rest = self.raw.size % long
        parts = [self.raw[: self.raw.size - rest].reshape(-1, long), self.raw[self.raw.size - rest :].reshape(1, -1)]
        with np.errstate(all="ignore"):  # the values are checked later
            found = [dequantize(part, kind).reshape(-1) for part in parts if part.size or not self.raw.size]
        values: npt.NDArray[np.float32] = found[0] if len(found) == 1 else np.concatenate(found)
        return values.reshape(self.shape)


@dataclass(frozen=True)
class GGUFFile:
    """A complete GGUF file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor] = field(repr=False)
    header: int = 0  # bytes before the padding and the first tensor
    keys_end: int = 0  # bytes before the tensors' descriptions
    parts: tuple[GGUFFile, ...] = field(default=(), repr=False)  # of a set: each shard by itself
    version: int = 3  # of the GGUF format

    @property
    def shards(self) -> tuple[GGUFFile, ...]:
        """The files on the disk: the shards of a set in their order, or the one file."""
        return self.parts or (self,)

    @property
    def stem(self) -> str:
        """The model's name: the file's name without its ending and without a shard's numbers."""
        return set_stem(self.path) if self.parts else self.path.stem

    @property
    def size(self) -> int:
        """Bytes on the disk, of all shards."""
        return set_size([shard.path for shard in self.shards])

    @property
    def digest(self) -> str:
        """sha256 of the file, or of the set as `split_set` defines it."""
        return set_digest([shard.path for shard in self.shards])

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @property
    def file_type(self) -> str:
        """Name of the file's type, e.g. "Q4_K_M"; "unknown" when the key is missing or newer than the gguf package."""
        return FILE_TYPES.get(self.metadata.get("general.file_type", -1), "unknown")

    @property
    def is_float(self) -> bool:
        return self.file_type in FLOAT_TYPES

    def get(self, key: str) -> Any:
        """A value of this architecture: `key` without its "llama." prefix; None when absent."""
        return self.metadata.get(f"{self.architecture}.{key}")


class Cursor:
    """Reads a file forward; raises if the file ends too early."""

    def __init__(self, path: Path, data: npt.NDArray[np.uint8]) -> None:
        self.path, self.data, self.at, self.inside = path, data.data, 0, "the header"
        self.items = 0  # of all arrays so far

    def take(self, size: int) -> memoryview:
        """The next `size` bytes.

        Raises:
            InputError: the file ends before that.
        """
        if size > len(self.data) - self.at:
            raise InputError(
                f"{self.path} is truncated: {self.inside} needs bytes up to {self.at + size}, "
                f"the file has {len(self.data)}. Copy or convert it again."
            )
        admission.header(self.path, self.at + size)
        self.at += size
        return self.data[self.at - size : self.at]

    def unpack(self, code: str) -> Any:
        """The next number, by its struct code."""
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def peek(self) -> int:
        """The next u32, without moving on."""
        number = int(self.unpack("I"))
        self.at -= 4
        return number

    def string(self) -> str:
        """The next string."""
        return bytes(self.take(self.unpack("Q"))).decode("utf-8", errors="surrogateescape")

    def strings(self, count: int) -> list[str]:
        """The next `count` strings; fast, because vocabularies have 100,000."""
        data, at, size_at = self.data, self.at, struct.Struct("<Q").unpack_from
        end = min(len(data), admission.MAX_HEADER)
        found = []
        for _ in range(count):
            if at + 8 > end:
                self.at = at
                self.take(8)  # raises
            stop = at + 8 + size_at(data, at)[0]
            if stop > end:
                self.at = at + 8
                self.take(stop - at - 8)
            found.append(str(data[at + 8 : stop], "utf-8", "surrogateescape"))
            at = stop
        self.at = at
        return found

    def value(self, kind: int) -> Any:
        """The next value of a GGUF value type.

        Raises:
            InputError: an unknown type, or an array of arrays.
        """
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            inner, count = self.unpack("I"), self.unpack("Q")
            self.items += count
            if self.items > admission.MAX_ITEMS:
                raise InputError(
                    f"{self.path}: {self.inside} brings the arrays to {self.items} items, "
                    f"at most {admission.MAX_ITEMS} are read"
                )
            if inner == ARRAY:
                raise InputError(f"{self.path}: {self.inside} is an array of arrays, which llama.cpp does not read")
            if inner in SCALARS:
                size = struct.calcsize("<" + SCALARS[inner])
                return list(struct.unpack(f"<{count}{SCALARS[inner]}", self.take(size * count)))
            return self.strings(count) if inner == STRING else [self.value(inner) for _ in range(count)]
        if kind not in SCALARS:
            raise InputError(
                f"{self.path}: {self.inside} has the unknown value type {kind}; the file is damaged or newer"
            )
        if kind == BOOL and self.data[self.at : self.at + 1].tobytes() not in (b"\0", b"\1", b""):
            raise InputError(f"{self.path}: {self.inside} is the truth value {self.data[self.at]}, neither 0 nor 1")
        return self.unpack(SCALARS[kind])


_AGAIN = "Check the path, and copy or download the file again."


def read_gguf(path: str | Path) -> GGUFFile:
    """Open a GGUF file, or a set of shards as one file, and check that every tensor lies inside.

    Args:
        path: a file, any shard of a set, or a folder that holds exactly one model.

    Raises:
        InputError: missing, not GGUF, truncated, unknown tensor type, or shards that do not form a set; the message
            names the file, the expected and the found value.
    """
    path = Path(path)
    file = _read_file(only_set(path) if path.is_dir() else path)
    if not is_shard(file.metadata):
        return file
    return _as_one(file)


def _as_one(shard: GGUFFile) -> GGUFFile:
    """The set that a shard belongs to: the metadata of the first shard, the tensors of all shards."""
    joined = _joined_files(shard)
    if joined:
        raise InputError(
            f"{shard.path} holds several shards one behind the other, which llama.cpp does not read; join them with "
            "llama-gguf-split --merge FIRST_SHARD.gguf WHOLE.gguf"
        )
    paths, parts = siblings(shard.path, shard.metadata), []
    total = 0
    for number, path in enumerate(paths, 1):
        parts.append(shard if path == shard.path else _read_file(path))
        require_shard(path, parts[-1].metadata, number, len(paths))
        total += len(parts[-1].tensors)
        admission.counts(path, total, 0)
    require_one_model(parts)
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    first = parts[0]
    return GGUFFile(first.path, first.metadata, tensors, first.header, first.keys_end, tuple(parts), first.version)


def _joined_files(file: GGUFFile) -> bool:
    """Whether another GGUF file begins after this file's tensors, as after joining shards with `cat`."""
    alignment = file.metadata.get("general.alignment", 32)
    end = max((tensor.offset + tensor.raw.size for tensor in file.tensors.values()), default=file.header)
    with file.path.open("rb") as stream:
        places = (end, -(-end // alignment) * alignment)
        return any(stream.seek(at) == at and stream.read(4) == b"GGUF" for at in places)


def _read_file(path: Path) -> GGUFFile:
    """Read one file on the disk: a whole model or one shard."""
    if not path.is_file():
        raise InputError(f"{path} is not a file; a GGUF file is expected here")
    size = path.stat().st_size
    if size < 24:
        raise InputError(f"{path} is not a GGUF file: it has {size} bytes, the header alone needs 24. {_AGAIN}")
    data = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)  # slices of a memmap are slow
    cursor = Cursor(path, data)
    magic = bytes(cursor.take(4))
    if magic != b"GGUF":
        raise InputError(f"{path} is not a GGUF file: it begins with {magic!r}, expected b'GGUF'. {_AGAIN}")
    version = cursor.unpack("I")
    if version not in (2, 3):
        raise InputError(
            f"{path} has GGUF version {version}; versions 2 and 3 (little endian) can be read. "
            "Convert it again with a current converter."
        )
    n_tensors, n_kv = cursor.unpack("Q"), cursor.unpack("Q")
    admission.counts(path, n_tensors, n_kv)
    metadata: dict[str, Any] = {}
    for index in range(n_kv):
        cursor.inside = f"metadata entry {index + 1} of {n_kv}"
        key = cursor.string()
        cursor.inside = f"metadata key {key!r}"
        if key in metadata:
            raise InputError(f"{path}: {cursor.inside} occurs twice; the file is damaged")
        admission.text(path, cursor.inside, key, bound=admission.MAX_KEY)
        if not key:
            raise InputError(f"{path}: metadata entry {index + 1} of {n_kv} has an empty key; the file is damaged")
        kind = cursor.unpack("I")
        inner = cursor.peek() if kind == ARRAY else None
        admission.key_type(path, key, kind, inner)
        value = cursor.value(kind)
        if isinstance(value, str):
            admission.text(path, cursor.inside, value)
        admission.key_value(path, key, value)
        metadata[key] = value
    keys_end = cursor.at
    infos = list(_tensor_infos(cursor, n_tensors))
    alignment = metadata.get("general.alignment", 32)
    admission.alignment(path, alignment)
    start, claimed = -(-cursor.at // alignment) * alignment, 0
    tensors: dict[str, GGUFTensor] = {}
    for name, dims, kind, offset in infos:
        shape = admission.shape(path, name, dims, kind)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        count = math.prod(dims)  # Python's integers: a damaged size must not wrap around
        if shape[-1] % block:
            raise InputError(f"{path}: tensor {name} has rows of {shape[-1]}, not a multiple of {kind.name}'s {block}")
        begin, length = start + offset, count // block * block_bytes
        if begin + length > size:
            aligned = "" if alignment == 32 else f", by its general.alignment of {alignment}"
            raise InputError(
                f"{path} is truncated: tensor {name} ({kind.name}, {list(reversed(dims))}) ends at byte "
                f"{begin + length}{aligned}, the file has {size}. Copy or convert it again."
            )
        claimed += length
        if claimed > size:
            raise InputError(
                f"{path}: up to {name} the tensors take {claimed} bytes, the file has {size}; they overlap"
            )
        if name in tensors:
            raise InputError(f"{path}: tensor {name} occurs twice; the file is damaged")
        tensors[name] = GGUFTensor(name, shape, kind.name, data[begin : begin + length], begin)
    return GGUFFile(path, metadata, tensors, cursor.at, keys_end, version=version)


def _tensor_infos(cursor: Cursor, count: int) -> Iterator[tuple[str, list[int], GGMLQuantizationType, int]]:
    for index in range(count):
        cursor.inside = f"description of tensor {index + 1} of {count}"
        name = cursor.string()
        cursor.inside = f"description of tensor {name[:80]!r}"
        n_dims = cursor.unpack("I")
        admission.tensor(cursor.path, name, n_dims)
        dims = [cursor.unpack("Q") for _ in range(n_dims)]
        number, offset = cursor.unpack("I"), cursor.unpack("Q")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise InputError(f"{cursor.path}: tensor {name} has the unknown type {number}; update `gguf`") from None
        yield name, dims, kind, offset
