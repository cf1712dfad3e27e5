"""Rewrite a safetensors file with some tensors changed and every other byte copied, a megabyte at a time.

Format: an 8-byte little-endian length, a JSON header {name: {dtype, shape, data_offsets}}, then the tensors' bytes
without gaps. All sizes are known beforehand, so the header is written first; it is the source's own, byte for byte,
unless a dtype changes. Nothing is mapped: mapped pages would count as this process's memory.
Source: the format section of the safetensors README.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from so8t_core.errors import InputError, one_line
from so8t_core.folding import mapping, named, rounded

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in FLOATS.items()}
CHUNK = 1 << 20  # bytes; a multiple of every item size
# of a header; a model of 10^12 weights in one file would have about 18 MB and 140,000 tensors
MAX_HEADER, MAX_TENSORS, MAX_NAME, MAX_RANK = 1 << 26, 1 << 18, 512, 8
Change = Callable[[Tensor, torch.dtype], Tensor]


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    name: str
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]
    nbytes: int


def read_entries(path: Path) -> list[Entry]:
    """The tensors of a file in the order of their bytes.

    Raises:
        InputError: the file is damaged, or its header is larger than any model's.
    """
    return _read(path)[1]


def _read(path: Path) -> tuple[bytes, list[Entry], dict[str, Any]]:
    """(length and header as stored, entries, metadata)."""
    try:
        with open(path, "rb") as file:
            length = file.read(8)
            size = int.from_bytes(length, "little")
            if size > MAX_HEADER:
                raise InputError(f"{path} is damaged: its header has {size} bytes, at most {MAX_HEADER} are read")
            raw = file.read(size)
        if raw.count(b"{") > MAX_TENSORS:
            raise InputError(f"{path} is damaged: its header lists more than {MAX_TENSORS} tensors")
        with safe_open(path, framework="pt"):  # upstream's own checks: sizes, gaps, overlaps, dtypes, UTF-8
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged: {one_line(error)}") from None
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:  # what upstream's parser takes and Python's does not
        raise InputError(f"{path} is damaged: {one_line(error)}") from None
    metadata = header.pop("__metadata__", None) or {}
    for name, fields in header.items():
        if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
            raise InputError(f"{path}: {name[:80]!r} is no tensor's name: 1 to {MAX_NAME} printable characters are")
        if len(fields["shape"]) > MAX_RANK:
            raise InputError(f"{path}: {name} has {len(fields['shape'])} dimensions, at most {MAX_RANK} are read")
    spans = sorted((*fields["data_offsets"], name) for name, fields in header.items())
    entries = [Entry(n, header[n]["dtype"], tuple(header[n]["shape"]), end - start) for start, end, n in spans]
    return length + raw, entries, metadata


def rewrite(
    source: Path, target: Path, changes: Mapping[str, Change], dtype: torch.dtype | None = None
) -> Iterator[int]:
    """Write `target`, yielding after each piece how many bytes of `source` it took; their sum is the file's size.

    Args:
        changes: by tensor name, (tensor, its dtype in `target`) -> new tensor of that dtype and the same shape; the
            tensor is read whole. All others go by in pieces.
        dtype: of all floating-point tensors in `target`; None keeps each one's own.

    Raises:
        InputError: the file is damaged, or (naming the tensor) a NaN, an Inf or a value that overflows `dtype`.
    """
    header, entries, metadata = _read(source)
    wanted = [replace(e, dtype=_NAMES[dtype]) if dtype and e.dtype in FLOATS else e for e in entries]
    with open(source, "rb") as reader, open(target, "wb") as writer, mapping() as run:
        reader.seek(len(header))
        writer.write(header if wanted == entries else _header(wanted, metadata))
        yield len(header)
        for old, new in zip(entries, wanted, strict=True):
            size = max(old.nbytes, 1) if old.name in changes else CHUNK
            for start in range(0, old.nbytes, size):
                piece = bytearray(min(size, old.nbytes - start))
                if reader.readinto(piece) != len(piece):
                    raise InputError(f"{source} is damaged: it ends within {old.name}")
                if old.name in changes or new != old:
                    with named(old.name):
                        x = torch.frombuffer(piece, dtype=FLOATS[old.dtype])
                        change = changes.get(old.name)
                        kind = FLOATS[new.dtype]
                        y = change(x.view(old.shape), kind) if change else next(run(rounded, [x], [kind]))
                    writer.write(y.flatten().view(torch.uint8).numpy().data)
                else:
                    writer.write(piece)
                yield len(piece)


def _header(entries: list[Entry], metadata: dict[str, str]) -> bytes:
    fields: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for entry in entries:
        kind = FLOATS.get(entry.dtype)
        end = offset + (math.prod(entry.shape) * kind.itemsize if kind else entry.nbytes)
        fields[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # readers map the data in place: keep it aligned
    return len(encoded).to_bytes(8, "little") + encoded
