"""One tensor through llama.cpp's own quantiser: the exact oracle for a quantised tensor, without a file.

llama.cpp quantises row by row from float32 with `ggml_quantize_chunk`; the same function on the expected values gives
the same bytes, where the file was made without an importance matrix by the same build (k-quants may differ in the last
bit between machines through fused multiply-add; Q8_0 does not). Source: ggml/include/ggml.h, src/llama-quant.cpp.
"""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize
from llama_cpp._ggml import libggml

Array = npt.NDArray[np.float32]
_quantize = libggml.ggml_quantize_chunk
_quantize.restype = ctypes.c_size_t
_quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
_needs_imatrix = libggml.ggml_quantize_requires_imatrix
_needs_imatrix.restype, _needs_imatrix.argtypes = ctypes.c_bool, [ctypes.c_int]


def quantised_bytes(values: Array, kind: str) -> npt.NDArray[np.uint8] | None:
    """`values` (.., row) as raw bytes of a GGML type; None for a type that cannot be made without an imatrix."""
    number = GGMLQuantizationType[kind]
    row = values.shape[-1] if values.ndim else 1
    if kind in ("F32", "F16", "BF16"):
        with np.errstate(over="ignore"):
            raw: npt.NDArray[np.uint8] = np.ascontiguousarray(quantize(values, number)).view(np.uint8).reshape(-1)
        return raw
    block, block_bytes = GGML_QUANT_SIZES[number]
    if _needs_imatrix(int(number)) or row % block:
        return None
    source = np.ascontiguousarray(values, dtype=np.float32)
    target = np.empty(source.size // block * block_bytes, dtype=np.uint8)
    _quantize(int(number), source.ctypes.data, target.ctypes.data, 0, source.size // row, row, None)
    return target
