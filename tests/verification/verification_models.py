"""Tiny models, the family of files made from them, and a fault injector for GGUF files."""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGUFValueType

from verification.gguf.reader import read_gguf


def save_tiny(directory: Path, tokenizer: Any, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A Llama of two layers whose logits have a standard deviation near 3.5: far from uniform, so faults show."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                # rows of unit gain keep the residual stream at scale 1; the head makes the logits' spread
                weight.normal_(std=0.22 if "lm_head" in name else 1.0 if "embed" in name else weight.shape[1] ** -0.5)
            else:
                weight.uniform_(0.7, 1.3)  # distinct gains: a swapped or lost norm shows
    model.to(dtype).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class Family:
    """base + adapter -> reference, and the files made from it."""

    base: Path
    adapter: Path
    reference: Path
    files: dict[str, Path]
    work: Path


def make_family(root: Path, base: Path) -> Family:
    from so8t_core import SO8TConfig, attach, bake_checkpoint, save_adapter
    from verification.engines.convert import convert
    from verification.engines.huggingface import load_hf
    from verification.engines.quantise import quantise

    torch.manual_seed(1)
    model = attach(load_hf(base), SO8TConfig(init_scale=0.05))
    save_adapter(model, root / "adapter")
    bake_checkpoint(base, root / "adapter", root / "reference")
    files = {"F16": convert(root / "reference", root / "m-F16.gguf", model_name="tiny")}
    for kind in ("Q8_0", "Q4_K_M"):
        files[kind] = quantise(files["F16"], root / f"m-{kind}.gguf", kind)
    return Family(base, root / "adapter", root / "reference", files, root / "work")


def rewrite(
    source: Path, target: Path, *, tensors: dict[str, Any] | None = None, fields: dict[str, Any] | None = None
) -> Path:
    """Copy a GGUF file with some F16/F32 tensors' values or some scalar fields replaced: the fault injector."""
    """Tensors are patched in place; fields are written again with upstream's writer (slower: 100,000 strings)."""
    if not fields:
        shutil.copyfile(source, target)
        file = read_gguf(source)
        with open(target, "r+b") as stream:
            for name, change in (tensors or {}).items():
                tensor = file.tensors[name]
                kind = np.float16 if tensor.type == "F16" else np.float32
                values = np.array(tensor.raw).view(kind).reshape(tensor.shape)
                stream.seek(tensor.offset)
                stream.write(np.ascontiguousarray(change(values)).astype(kind).tobytes())
        return target
    return _rewrite_fields(source, target, fields)


@functools.cache
def _reader(source: Path) -> GGUFReader:
    return GGUFReader(source)


def _rewrite_fields(source: Path, target: Path, fields: dict[str, Any]) -> Path:
    reader = _reader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = fields.get(field.name, field.contents())
        if value is None:
            continue
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
