"""Quantise a GGUF file with llama.cpp's own quantiser, and say which type each tensor was promised.

The output depends on the source's bytes, the type and the build, not on the number of threads: rows are quantised
independently. K-quants need rows that are multiples of 256; elsewhere llama.cpp silently takes another type, so the
nominal type of every tensor is kept beside the actual one. Source: llama.cpp, src/llama-quant.cpp.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from so8t_core.errors import InputError
from so8t_core.files import atomic_file
from verification.gguf_file import FILE_TYPES, GGUFFile, read_gguf
from verification.llama_engine import last_words, quiet

# what llama.cpp writes instead when a row is not a multiple of the type's block
FALLBACKS = {
    "Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "IQ4_XS": "IQ4_NL", "IQ3_S": "IQ4_NL", "IQ3_XXS": "IQ4_NL", "IQ2_S": "IQ4_NL",
    "IQ2_XS": "IQ4_NL", "IQ2_XXS": "IQ4_NL", "IQ1_S": "IQ4_NL", "IQ1_M": "IQ4_NL", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0",
    "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip


@dataclass(frozen=True)
class NominalType:
    """What a tensor's file type promises and what the file holds."""

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
        InputError: unknown name; lists the known ones.
    """
    for number, known in FILE_TYPES.items():
        if known == name.upper():
            return number
    raise InputError(f"unknown quantisation type {name!r}; known: {', '.join(FILE_TYPES.values())}")


def quantise(source: str | Path, target: str | Path, type_name: str, *, threads: int | None = None) -> Path:
    """Write `source` (F32, F16 or BF16) as `type_name` to `target`, whole or not at all.

    Raises:
        InputError: unknown type, source not a float file, llama.cpp's own refusal.
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
            _run(source, temporary, number, threads)
        read_gguf(temporary)
    return target


def _run(source: Path, target: Path, number: int, threads: int | None) -> None:
    quiet()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = number
    params.nthread = threads or os.cpu_count() or 1
    status = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), params)
    if status != 0:
        raise InputError(f"llama.cpp cannot quantise {source} to {FILE_TYPES[number]}: {last_words()}")


def nominal_types(file: GGUFFile) -> list[NominalType]:
    """Nominal and actual type of every tensor.

    Only a type that its rows cannot hold is a fallback: the mixed types (Q6_K inside a Q4_K_M file, say) are part of
    the file type's promise. The nominal type of a fallback is the K- or IQ-type it stands for: the one of its file
    type's recipe whose fallback is the type found. Which of two is only a label; that it is a fallback is exact,
    because a type with smaller blocks never occurs in these recipes by choice where rows are multiples of 256.
    """
    recipe = _recipe(file.file_type)
    rows = []
    for tensor in file.tensors.values():
        row = tensor.shape[-1] if tensor.shape else 1
        nominal = tensor.type
        if recipe and len(tensor.shape) > 1 and row % 256 and tensor.type not in ("F32", "F16", "BF16"):
            options = [wish for wish in recipe if FALLBACKS.get(wish) == tensor.type]
            nominal = options[0] if options else tensor.type
        rows.append(NominalType(tensor.name, row, nominal, tensor.type))
    return rows


def _recipe(file_type: str) -> tuple[str, ...]:
    """Types with blocks of 256 that a file type's recipe uses, its main type first."""
    stem = file_type.rsplit("_", 1)[0] if file_type.endswith(("_S", "_M", "_L")) else file_type
    main = stem if stem in GGMLQuantizationType.__members__ else file_type
    if main not in GGMLQuantizationType.__members__ or GGML_QUANT_SIZES[GGMLQuantizationType[main]][0] != 256:
        return ()
    return (main, *(other for other in ("Q4_K", "Q5_K", "Q6_K") if other != main))
