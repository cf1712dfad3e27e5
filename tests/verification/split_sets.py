"""Sets of shards in llama.cpp's own format: gguf-py's writer splits a file, or llama.cpp's quantiser keeps a split."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import llama_cpp
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from verification.engines.llama_model import quiet
from verification.engines.quantise import type_number
from verification.gguf.split_set import shard_paths


def split(file: Path, folder: Path, *, tensors: int = 8, stem: str | None = None) -> list[Path]:
    """A file written again as shards of so many tensors, by gguf-py's writer; the shards in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    reader = GGUFReader(file)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(folder / f"{stem or file.stem}.gguf", architecture, split_max_tensors=tensors)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob(f"{stem or file.stem}-*.gguf"))


def quantise_split(first: Path, target: Path, kind: str) -> list[Path]:
    """A set quantised by llama.cpp into as many shards."""
    quiet()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.keep_split = type_number(kind), 1, True
    assert llama_cpp.llama_model_quantize(os.fsencode(first), os.fsencode(target.with_suffix("")), params) == 0
    return sorted(target.parent.glob(f"{target.stem}-*.gguf"))


def moved(shards: list[Path], folder: Path, stem: str) -> list[Path]:
    """A copy of a set under another name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = shard_paths(folder / f"{stem}-00001-of-{len(shards):05}.gguf")
    for source, path in zip(shards, paths, strict=True):
        shutil.copyfile(source, path)
    return paths
