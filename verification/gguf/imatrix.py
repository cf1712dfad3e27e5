"""Reads llama.cpp's importance matrix, in its GGUF form or the older .dat form, as the numbers that its quantiser uses.

An entry is one float32 per input channel of a tensor, the mean of the squared activations (times experts if there are
several). GGUF: `<name>.in_sum2` / `<name>.counts` per expert, 1 if an expert was never used. Legacy, little endian:
int32 entries, each int32 length, name, int32 calls, int32 values, float32 values; value / calls.
All divisions are in float32, as in the quantiser's loader: the bytes of a quantised tensor depend on every bit.
Source: llama.cpp, common/imatrix-loader.cpp and tools/quantize/quantize.cpp.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from so8t_core.errors import InputError
from verification.gguf import admission
from verification.gguf.reader import read_gguf

Array = npt.NDArray[np.float32]


def read_imatrix(path: str | Path) -> dict[str, Array]:
    """Tensor name -> importance of each input channel, shape (channels,).

    Raises:
        InputError: missing, truncated, sums without counts, no entry, an entry twice, or a value that is NaN, infinite
            or negative.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"importance matrix {path} does not exist")
    with path.open("rb") as stream:
        is_gguf = stream.read(4) == b"GGUF"
    entries = _from_gguf(path) if is_gguf else _from_legacy(path)
    if not entries:
        raise InputError(f"{path} holds no entry of an importance matrix; give the output of llama-imatrix")
    for name, values in entries.items():
        if not np.isfinite(values).all():
            raise InputError(f"importance matrix {path}: the entry {name} holds NaN or infinite values")
        if values.min(initial=0.0) < 0:
            raise InputError(
                f"importance matrix {path}: the entry {name} holds {values.min():g}, a mean of squares is 0 or more; "
                "make it again"
            )
    return entries


def is_legacy_imatrix(path: str | Path) -> bool:
    """Whether a file is an importance matrix of the older form, judged by its ending or its first entry."""
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        head = stream.read(8 + admission.MAX_NAME)
    if head[:4] == b"GGUF":
        return False
    if path.suffix in (".dat", ".imatrix"):
        return True
    count, length = struct.unpack("<ii", head[:8]) if len(head) >= 8 else (0, 0)
    name = head[8 : 8 + max(length, 0)]
    return 0 < count <= admission.MAX_TENSORS and 0 < length < admission.MAX_NAME and name.endswith(b".weight")


def _from_gguf(path: Path) -> dict[str, Array]:
    tensors = read_gguf(path).tensors
    entries = {}
    for name, tensor in tensors.items():
        if not name.endswith(".in_sum2"):
            continue
        stem = name.removesuffix(".in_sum2")
        counted = tensors.get(f"{stem}.counts")
        if counted is None or {tensor.type, counted.type} != {"F32"}:
            raise InputError(f"importance matrix {path}: {stem} lacks its counts or is not F32; make it again")
        found = counted.values().reshape(-1, 1)  # (experts, 1)
        if tensor.raw.size % counted.raw.size:
            raise InputError(
                f"importance matrix {path}: {stem} has {found.size} counts for {tensor.raw.size // 4} sums, "
                "not a divisor; make it again"
            )
        odd = found[~(np.isfinite(found) & (found >= 0))]
        if odd.size:
            raise InputError(
                f"importance matrix {path}: {stem} has a count of {odd[0]:g}, not 0 or more; make it again"
            )
        counts = np.rint(found).astype(np.float32)
        sums = tensor.values().reshape(len(counts), -1)  # (experts, channels)
        safe = np.where(counts > 0, counts, np.float32(1))
        with np.errstate(over="ignore", invalid="ignore"):  # the values are checked later
            entries[stem] = np.where(counts > 0, sums / safe, np.float32(1)).astype(np.float32).ravel()
    return entries


def _from_legacy(path: Path) -> dict[str, Array]:
    size, data = path.stat().st_size, memoryview(b"")
    if size:
        data = np.memmap(path, dtype=np.uint8, mode="r").data
    at = 0

    def take(count: int, what: str) -> memoryview:
        nonlocal at
        if count < 0 or at + count > size:
            raise InputError(
                f"importance matrix {path} is truncated or no importance matrix: {what} needs {count} bytes at {at}, "
                f"the file has {size}"
            )
        at += count
        return data[at - count : at]

    def number(what: str) -> int:
        return int(struct.unpack("<i", take(4, what))[0])

    entries: dict[str, Array] = {}
    stated = number("the number of entries")
    if not 0 < stated <= admission.MAX_TENSORS:
        raise InputError(
            f"importance matrix {path} states {stated} entries, 1 to {admission.MAX_TENSORS} are read; it is damaged "
            "or no importance matrix"
        )
    for index in range(stated):
        where = f"entry {index + 1} of {stated}"
        name = bytes(take(number(where), f"the name of {where}")).decode("utf-8", errors="surrogateescape")
        admission.tensor(path, name, 0)
        if name in entries:
            raise InputError(f"importance matrix {path}: the entry {name} occurs twice; make it again")
        calls, count = number(where), number(where)
        if count <= 0:
            raise InputError(f"importance matrix {path}: the entry {name} has {count} values; make it again")
        values = np.frombuffer(take(4 * count, f"{name} with {count} values"), dtype="<f4")
        with np.errstate(over="ignore", invalid="ignore"):
            entries[name] = (values / np.float32(calls) if calls > 0 else values).astype(np.float32)
    return entries
