"""llama.cpp's quantiser, for a whole GGUF file or one tensor, and the type that the file type promises each tensor.

The output depends on the source's bytes, the type and the build, but not on the number of threads: rows are quantised
independently. K-quants need rows that are multiples of 256. For other rows llama.cpp silently takes another type, so
the nominal type of every tensor is kept beside the actual one. An importance matrix is passed as the C struct array of
llama.h.

`ggml_quantize_chunk` quantises one tensor without a file. llama.cpp uses this function row by row from float32, so the
function gives the bytes of the file for the expected values, if the same build made the file with the same importance
matrix or without one (k-quants may differ in the last bit between machines through fused multiply-add; Q8_0 does not).
Source: llama.cpp, src/llama-quant.cpp and ggml/include/ggml.h.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize
from llama_cpp._ggml import libggml

from so8t_core.errors import InputError
from so8t_core.files import atomic_file
from verification.engines.llama_model import last_words, quiet, usable_cores
from verification.gguf.reader import FILE_TYPES, GGUFFile, read_gguf

Array = npt.NDArray[np.float32]
_quantize = libggml.ggml_quantize_chunk
_quantize.restype = ctypes.c_size_t
_quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
_needs_imatrix = libggml.ggml_quantize_requires_imatrix
_needs_imatrix.restype, _needs_imatrix.argtypes = ctypes.c_bool, [ctypes.c_int]
_PLAIN = ("Q1_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
_K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
_I_QUANTS = ("IQ1_M", "IQ1_S", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ3_S", "IQ3_XXS", "IQ4_NL", "IQ4_XS")
_SMALL = ("MXFP4", "NVFP4", "TQ1_0", "TQ2_0")
# Types that `ggml_quantize_chunk` writes. It aborts the process on all others: types of activations (Q8_1, Q8_K) and
# plain numbers (I8 to I64, F64), which an untrusted file may name.
WRITTEN = frozenset((*_PLAIN, *_K_QUANTS, *_I_QUANTS, *_SMALL))

# types that llama.cpp writes if a row is not a multiple of the type's block; older builds: IQ4_NL for Q2_K and Q3_K
FALLBACKS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("Q2_K", "Q3_K"), ("Q4_0", "IQ4_NL")),
    **dict.fromkeys(
        ("IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M"),
        ("IQ4_NL",),
    ),
    **dict.fromkeys(("TQ1_0", "TQ2_0"), ("Q4_0",)),
    "Q4_K": ("Q5_0",),
    "Q5_K": ("Q5_1",),
    "Q6_K": ("Q8_0",),
}
# main type of the file types that have another name (llama_ftype_get_default_type)
_MAIN_TYPES = {"IQ2_M": "IQ2_S", "IQ3_M": "IQ3_S", "IQ3_XS": "IQ3_S"}


@dataclass(frozen=True)
class NominalType:
    """The type that the file type promises a tensor, and the type in the file."""

    name: str
    row: int
    nominal: str
    actual: str

    @property
    def is_fallback(self) -> bool:
        return self.nominal != self.actual


def type_number(name: str) -> int:
    """llama.cpp's number of a file type.

    Raises:
        InputError: unknown name; the message lists the known names.
    """
    for number, known in FILE_TYPES.items():
        if known == name.upper():
            return number
    raise InputError(f"unknown quantisation type {name!r}; known: {', '.join(FILE_TYPES.values())}")


Importance = Mapping[str, Array]


def quantise(
    source: str | Path,
    target: str | Path,
    type_name: str,
    *,
    threads: int | None = None,
    imatrix: Importance | None = None,
) -> Path:
    """Write `source` (F32, F16 or BF16) as `type_name` to `target`, whole or not at all.

    Args:
        imatrix: tensor name -> importance of each input channel, see `read_imatrix`.

    Raises:
        InputError: unknown type, source not a float file, or llama.cpp refuses.
    """
    source, target = Path(source), Path(target)
    number = type_number(type_name)
    origin = read_gguf(source)
    if not origin.is_float:
        raise InputError(f"{source} is {origin.file_type}; quantising starts from F32, F16 or BF16, never from a quant")
    with atomic_file(target) as temporary:
        if origin.file_type == type_name.upper():
            shutil.copyfile(source, temporary)
        else:
            run_quantiser(source, temporary, number, threads, imatrix or {})
        read_gguf(temporary)
    return target


def run_quantiser(source: Path, target: Path, number: int, threads: int | None, imatrix: Importance) -> None:
    """Have llama.cpp write `source` as the file type `number` to `target`, which is left half-written by an error.

    Raises:
        InputError: llama.cpp refuses.
    """
    quiet()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = number
    params.nthread = threads or usable_cores()
    kept = {name: np.ascontiguousarray(values, dtype=np.float32) for name, values in imatrix.items()}
    if kept:  # `kept` and `entries` must outlive the call: C holds only pointers. The last entry's name is null
        entries = (llama_cpp.llama_model_imatrix_data * (len(kept) + 1))()
        for entry, (name, values) in zip(entries, kept.items(), strict=False):
            entry.name = name.encode()
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = values.size
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    status = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), params)
    if status != 0:
        words = last_words()
        if not kept and "requires an imatrix" in words:
            raise InputError(
                f"{FILE_TYPES[number]} can only be made with an importance matrix; give the one the file was made with "
                "(--imatrix FILE)"
            )
        free = shutil.disk_usage(target.parent).free
        if "iostream" in words and free < source.stat().st_size:  # the only word of a C++ stream about a full disk
            raise InputError(
                f"cannot write {FILE_TYPES[number]} of {source.name}: {target.parent} has {free / 2**20:.0f} MiB left; "
                "free some space and run again"
            )
        raise InputError(f"llama.cpp cannot quantise {source} to {FILE_TYPES[number]}: {words}")


def quantised_bytes(
    values: Array, kind: str, importance: Array | None = None, *, name: str = "the tensor"
) -> npt.NDArray[np.uint8] | None:
    """`values` (.., row) as raw bytes of a GGML type; None for a type that cannot be made, or needs a matrix.

    Args:
        importance: importance of each input channel, (row,); for values (experts, .., row), of each expert's channels,
            (experts * row,).

    Raises:
        InputError: an importance matrix of another size; llama-quantize refuses it too.
    """
    number = GGMLQuantizationType[kind]
    row = values.shape[-1] if values.ndim else 1
    if kind in ("F32", "F16", "BF16"):
        with np.errstate(over="ignore"):
            raw: npt.NDArray[np.uint8] = np.ascontiguousarray(quantize(values, number)).view(np.uint8).reshape(-1)
        return raw
    block, block_bytes = GGML_QUANT_SIZES[number]
    if kind not in WRITTEN or row % block or (importance is None and _needs_imatrix(int(number))):
        return None
    experts = len(values) if values.ndim == 3 else 1
    matrix = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    if matrix is not None and matrix.size != experts * row:
        raise InputError(
            f"the importance matrix has {matrix.size} values for {name}, which has {experts * row} input channels; "
            "give the matrix of this model"
        )
    source = np.ascontiguousarray(values, dtype=np.float32)
    target = np.empty(source.size // block * block_bytes, dtype=np.uint8)
    rows = source.size // row // experts
    for expert in range(experts):
        weights = None if matrix is None else matrix[expert * row :].ctypes.data
        first = expert * rows * row
        _quantize(int(number), source.ctypes.data, target.ctypes.data, first, rows, row, weights)
    return target


def even_matrix(kind: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32] | None:
    """A matrix of ones, (row,) or (experts * row,) for `shape`, if the type needs a matrix; otherwise None."""
    if not _needs_imatrix(int(GGMLQuantizationType[kind])):
        return None
    return np.ones(shape[-1] * (shape[0] if len(shape) == 3 else 1), dtype=np.float32)


def nominal_types(file: GGUFFile) -> list[NominalType]:
    """Nominal and actual type of every tensor.

    A fallback stands for a type that the tensor's rows cannot hold; other types than the main one (Q6_K inside a Q4_K_M
    file) are part of the file type's recipe. The nominal type of a fallback is the K- or IQ-type in the recipe whose
    fallback is the found type. If two fit, the name is a guess. But the tensor is certainly a fallback, because recipes
    never choose a type with smaller blocks for rows that are multiples of 256.
    """
    recipe = _recipe(file.file_type)
    rows = []
    for tensor in file.tensors.values():
        row = tensor.shape[-1] if tensor.shape else 1
        nominal = tensor.type
        if recipe and len(tensor.shape) > 1 and row % 256 and tensor.type not in ("F32", "F16", "BF16"):
            options = [wish for wish in recipe if tensor.type in FALLBACKS.get(wish, ())]
            nominal = options[0] if options else tensor.type
        rows.append(NominalType(tensor.name, row, nominal, tensor.type))
    return rows


def main_type(file_type: str) -> str:
    """The tensor type that a file type stores most weights in; "F32" for a name without one."""
    stem = file_type.rsplit("_", 1)[0] if file_type.endswith(("_S", "_M", "_L")) else file_type
    names = (_MAIN_TYPES.get(file_type, file_type), stem, "F32")
    return next(name for name in names if name in GGMLQuantizationType.__members__)


def _recipe(file_type: str) -> tuple[str, ...]:
    """Types with blocks of 256 that a file type's recipe uses, its main type first."""
    main = main_type(file_type)
    if GGML_QUANT_SIZES[GGMLQuantizationType[main]][0] != 256:
        return ()
    return (main, *(other for other in ("Q4_K", "Q5_K", "Q6_K") if other != main))
