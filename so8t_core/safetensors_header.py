"""Read the header of a safetensors file, without torch: the name, type, shape and place of each tensor.

Format: an 8-byte little-endian length, a JSON header {name: {dtype, shape, data_offsets}}, then the tensors' bytes
without gaps. Source: the format section of the safetensors README.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from so8t_core.errors import InputError, one_line

FLOATS = ("F64", "F32", "F16", "BF16")
# Bounds of a header; a model of 10^12 weights in one file would have about 18 MB and 140,000 tensors
MAX_HEADER, MAX_TENSORS, MAX_NAME, MAX_RANK = 1 << 26, 1 << 18, 512, 8


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    name: str
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]
    nbytes: int
    begin: int = field(default=0, compare=False)  # its first byte in the file


def read_entries(path: Path) -> list[Entry]:
    """The tensors of a file in the order of their bytes.

    Raises:
        InputError: the file is damaged, or its header is larger than that of any model.
    """
    return read_header(path)[1]


def read_header(path: Path) -> tuple[bytes, list[Entry], dict[str, Any]]:
    """(length and header as stored, entries, metadata).

    Raises:
        InputError: the file is damaged, or its header is larger than that of any model.
    """
    try:
        with open(path, "rb") as file:
            length = file.read(8)
            size = int.from_bytes(length, "little")
            if size > MAX_HEADER:
                raise InputError(f"{path} is damaged: its header has {size} bytes, at most {MAX_HEADER} are read")
            raw = file.read(size)
        if raw.count(b"{") > MAX_TENSORS:
            raise InputError(f"{path} is damaged: its header lists more than {MAX_TENSORS} tensors")
        with safe_open(path, framework="np"):  # upstream's own checks: sizes, gaps, overlaps, dtypes, UTF-8
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged: {one_line(error)}") from None
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:  # upstream's parser accepts it, Python's does not
        raise InputError(f"{path} is damaged: {one_line(error)}") from None
    metadata = header.pop("__metadata__", None) or {}
    for name, fields in header.items():
        if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
            raise InputError(f"{path}: {name[:80]!r} is no tensor's name: 1 to {MAX_NAME} printable characters are")
        if len(fields["shape"]) > MAX_RANK:
            raise InputError(f"{path}: {name} has {len(fields['shape'])} dimensions, at most {MAX_RANK} are read")
    spans = sorted((*fields["data_offsets"], name) for name, fields in header.items())
    entries = [
        Entry(name, header[name]["dtype"], tuple(header[name]["shape"]), end - start, 8 + size + start)
        for start, end, name in spans
    ]
    return length + raw, entries, metadata
