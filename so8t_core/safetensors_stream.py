"""Write a safetensors file tensor by tensor, holding one tensor in memory.

Format: an 8-byte little-endian length, a JSON header {name: {dtype, shape, data_offsets}}, then the tensors' bytes
without gaps in the header's order. All sizes are known before the first byte, so the header is written first.
Source: the format section of the safetensors README.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from so8t_core.errors import InputError

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class StreamWriter:
    """`specs` are (name, safetensors dtype, shape) in file order; `write` must follow that order.

    Raises:
        InputError: a dtype that is not in SAFETENSORS_DTYPES.
    """

    def __init__(self, path: Path, specs: list[tuple[str, str, list[int]]], *, metadata: dict[str, str]) -> None:
        header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
        offset = 0
        for name, dtype, shape in specs:
            if dtype not in SAFETENSORS_DTYPES:
                raise InputError(f"{name} has dtype {dtype}; supported are {', '.join(SAFETENSORS_DTYPES)}")
            end = offset + math.prod(shape) * SAFETENSORS_DTYPES[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
            offset = end
        encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # readers map the data in place: keep it aligned
        self._pending = list(specs)
        self._file = open(path, "wb")  # noqa: SIM115 (closed by __exit__)
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)

    def write(self, name: str, tensor: Tensor) -> int:
        """Append the next tensor; returns its bytes.

        Raises:
            ValueError: another name, dtype or shape than announced.
        """
        expected, dtype, shape = self._pending.pop(0)
        if (name, SAFETENSORS_DTYPES[dtype], shape) != (expected, tensor.dtype, list(tensor.shape)):
            raise ValueError(f"expected {expected} {dtype} {shape}, got {name} {tensor.dtype} {list(tensor.shape)}")
        self._file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        return tensor.numel() * tensor.element_size()

    def __enter__(self) -> StreamWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self._pending:
            raise ValueError(f"{len(self._pending)} announced tensors were never written, first {self._pending[0][0]}")
