"""A GGUF file beside the checkpoint it was made from, small and healthy, and structure-aware damage to either of them.

The checkpoint has a SentencePiece-like vocabulary of 264 tokens, because upstream's converter knows byte-level
vocabularies by their digest only.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf_bytes import Parts, parts
from gguf_mutations import llama_config, mutate, spm
from test_checkpoint_admission import changed, mutated_json, mutated_safetensors

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Healthy:
    """A pair that `so8t lint FILE --reference DIR` passes."""

    checkpoint: Path
    file: Path
    whole: Parts  # the file, taken apart


def healthy_pair(root: Path) -> Healthy:
    """Made by transformers and upstream's converter."""
    import torch
    from transformers import LlamaForCausalLM

    from verification.engines.convert import convert

    vocabulary = spm()
    tokens = vocabulary["tokenizer.ggml.tokens"].value
    torch.manual_seed(0)
    config = llama_config(len(tokens), tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)
    checkpoint = root / "checkpoint"
    LlamaForCausalLM(config).half().save_pretrained(checkpoint, max_shard_size="60KB")
    _write(checkpoint / "tokenizer.json", _tokenizer(tokens))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": False,
        "add_eos_token": False,
        "model_max_length": 128,
        "chat_template": vocabulary["tokenizer.chat_template"].value,
    }
    _write(checkpoint / "tokenizer_config.json", settings)
    file = convert(checkpoint, root / "m-F16.gguf", model_name="tiny")
    return Healthy(checkpoint, file, parts(file))


def _tokenizer(tokens: list[str]) -> dict[str, Any]:
    """tokenizer.json as SentencePiece models have it: BPE with byte fallback, spaces as U+2581."""
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": text, **special} for number, text in enumerate(tokens[:3])],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {text: number for number, text in enumerate(tokens)},
            "merges": ["t h", "▁ th"],
        },
    }


def damaged_pair(healthy: Healthy, folder: Path, rng: random.Random) -> list[str]:
    """A damaged copy of a pair in `folder`; the command that holds its halves against one another."""
    checkpoint, file = folder / "checkpoint", folder / "m-F16.gguf"
    shutil.copytree(healthy.checkpoint, checkpoint)
    if rng.random() < 0.25:
        file.write_bytes(mutate(healthy.whole, rng))
    else:
        shutil.copyfile(healthy.file, file)
        for _ in range(rng.choice((1, 1, 2))):
            rng.choice((_settings, _settings, _tokens, _tokens, _weights, _weights, _index, _files))(checkpoint, rng)
    return ["lint", str(file), "--reference", str(checkpoint)]


def _write(path: Path, value: Any) -> None:
    path.write_bytes(json.dumps(value).encode("utf-8", "surrogatepass"))


def _bend(path: Path, rng: random.Random) -> None:
    if path.is_file():
        path.write_bytes(mutated_json(path.read_bytes(), rng))


def _settings(checkpoint: Path, rng: random.Random) -> None:
    """config.json, generation_config.json or tokenizer_config.json."""
    names = ("config.json", "config.json", "generation_config.json", "tokenizer_config.json")
    _bend(checkpoint / rng.choice(names), rng)


def _tokens(checkpoint: Path, rng: random.Random) -> None:
    """tokenizer.json in its parts: the vocabulary's long lists would take nearly every change."""
    path = checkpoint / "tokenizer.json"
    try:
        value = json.loads(path.read_bytes())
        part = rng.choice(list(value))
        value[part] = changed(value[part], rng)
        _write(path, value)
    except (OSError, ValueError, AttributeError):
        return  # it was damaged before


def _weights(checkpoint: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(checkpoint.glob("*.safetensors")) or [checkpoint])
    try:
        path.write_bytes(mutated_safetensors(path.read_bytes(), rng))
    except (OSError, ValueError, AttributeError):
        return


def _index(checkpoint: Path, rng: random.Random) -> None:
    _bend(checkpoint / INDEX, rng)


def _files(checkpoint: Path, rng: random.Random) -> None:
    """A file less, or one more that a reader might take."""
    path = rng.choice(sorted(checkpoint.iterdir()))
    kind = rng.randrange(7)
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.write_bytes(b"")
    elif kind == 2:
        path.unlink()
        path.symlink_to(rng.choice(("/dev/zero", "/", path.name, "../m-F16.gguf")))
    elif kind == 3:
        (checkpoint / "tokenizer.model").write_bytes(rng.randbytes(rng.choice((0, 10, 3000))))
    elif kind == 4:
        (checkpoint / "chat_template.jinja").write_bytes(rng.choice((b"{{ 1 // 0 }}", b"\xff", b"{% for %}", b"\0")))
    elif kind == 5:
        _write(
            checkpoint / "special_tokens_map.json", changed({"bos_token": "<s>", "eos_token": {"content": "x"}}, rng)
        )
    else:
        _write(checkpoint / "added_tokens.json", changed({"<a>": 264, "<b>": 3}, rng))
