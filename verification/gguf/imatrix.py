"""llama.cpp's importance matrix, in its GGUF form or the older .dat form, as the numbers its quantiser takes.

An entry is one float32 per input channel of a tensor, the mean of the squared activations (times experts where there
are several). GGUF: `<name>.in_sum2` / `<name>.counts` per expert, 1 where an expert was never used. Legacy, little
endian: int32 entries, each int32 length, name, int32 calls, int32 values, float32 values; value / calls.
All divisions in float32, as the quantiser's own loader does them: the bytes of a quant depend on every bit.
Source: llama.cpp, common/imatrix-loader.cpp and tools/quantize/quantize.cpp.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from so8t_core.errors import InputError
from verification.gguf.reader import read_gguf

Array = npt.NDArray[np.float32]


def read_imatrix(path: str | Path) -> dict[str, Array]:
    """Tensor name -> importance of each input channel, shape (channels,).

    Raises:
        InputError: missing, truncated, sums without counts, no entry, or a value that is NaN or infinite.
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
    return entries


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
        counts = np.rint(counted.values().reshape(-1, 1)).astype(np.float32)  # (experts, 1)
        if not counts.size or tensor.raw.size % counted.raw.size:
            raise InputError(
                f"importance matrix {path}: {stem} has {counts.size} counts for {tensor.raw.size // 4} sums, "
                "not a divisor; make it again"
            )
        sums = tensor.values().reshape(len(counts), -1)  # (experts, channels)
        safe = np.where(counts > 0, counts, np.float32(1))
        entries[stem] = np.where(counts > 0, sums / safe, np.float32(1)).astype(np.float32).ravel()
    return entries


def _from_legacy(path: Path) -> dict[str, Array]:
    data = memoryview(path.read_bytes())
    at = 0

    def take(size: int) -> memoryview:
        nonlocal at
        if size < 0 or at + size > len(data):
            raise InputError(f"importance matrix {path} is truncated or no importance matrix: {len(data)} bytes")
        at += size
        return data[at - size : at]

    def number() -> int:
        return int(struct.unpack("<i", take(4))[0])

    entries = {}
    for _ in range(number()):
        name = bytes(take(number())).decode("utf-8", errors="replace")
        calls = number()
        values = np.frombuffer(take(4 * number()), dtype="<f4")
        entries[name] = (values / np.float32(calls) if calls > 0 else values).astype(np.float32)
    return entries
