"""Rewrite a safetensors file with some tensors changed and every other byte copied, a megabyte at a time.

All sizes are known beforehand, so the header is written first; it equals the source's header, byte for byte,
unless a dtype changes. Nothing is mapped: mapped pages would count as this process's memory.
Source: the format section of the safetensors README.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from so8t_core.errors import InputError
from so8t_core.folding import mapping, named, rounded
from so8t_core.safetensors_header import Entry, read_header

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in FLOATS.items()}
CHUNK = 1 << 20  # bytes; a multiple of every item size
Change = Callable[[Tensor, torch.dtype], Tensor]


def rewrite(
    source: Path, target: Path, changes: Mapping[str, Change], dtype: torch.dtype | None = None
) -> Iterator[int]:
    """Write `target`, yielding after each piece how many bytes of `source` it took; their sum is the file's size.

    Args:
        changes: by tensor name, (tensor, its dtype in `target`) -> new tensor of that dtype and the same shape. Such a
            tensor is read whole, all others in pieces.
        dtype: of all floating-point tensors in `target`; None keeps each tensor's dtype.

    Raises:
        InputError: the file is damaged, or (naming the tensor) a NaN, an Inf or a value that overflows `dtype`.
    """
    header, entries, metadata = read_header(source)
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
