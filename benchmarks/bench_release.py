"""Convert, quantise, lint and verify against the least work that each of them needs (its floor).

Floors: upstream's converter alone in its process; llama.cpp's quantiser alone; reading the files and their sha256; the
forward passes of the reference and of the file. Models: SmolLM2-135M, or in a quick run a Llama 256 x 2 with its
tokenizer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import pytest
import torch

from benchmarks.bench_verify import _bare, _ours
from so8t_core.files import sha256_file
from verification import verify
from verification.commands.lint import lint
from verification.engines.convert import SCRIPT, _environment, convert, find_converter
from verification.engines.llama_model import quiet
from verification.engines.quantise import quantise, type_number
from verification.logit_parity.text import read_corpus
from verification.reference.tokenizer import load_tokenizer


class Model(NamedTuple):
    """A checkpoint and the files made from it."""

    name: str
    reference: Path
    f16: Path
    q8: Path


@pytest.fixture(scope="session")
def model(quick: bool, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """SmolLM2-135M, or in a quick run a tiny model with its tokenizer."""
    folder = tmp_path_factory.mktemp("release")
    reference, name = tokenizer_dir, "SmolLM2-135M"  # the model's own directory
    if quick:
        reference, name = tiny_checkpoint(folder / "tiny", tokenizer_of=tokenizer_dir), "Llama 256 x 2"
    f16 = convert(reference, folder / "m-F16.gguf")
    return Model(name, reference, f16, quantise(f16, folder / "m-Q8_0.gguf", "Q8_0"))


def tiny_checkpoint(folder: Path, *, tokenizer_of: Path) -> Path:
    """A random bfloat16 Llama of two layers with SmolLM2's tokenizer; its logits are far from uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=49152,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.06,
    )
    made = LlamaForCausalLM(config)
    with torch.no_grad():
        made.model.embed_tokens.weight *= 4
    made.to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tokenizer_of / name, folder / name)
    return folder


def bench_convert(figures: Any, absent: Any, model: Model, quick: bool, tmp_path: Path) -> None:
    if quick:
        absent("convert to F16", "only in a whole run: the converter's start alone takes seconds")
    home = find_converter()
    command = [sys.executable, str(home / SCRIPT), str(model.reference), "--outtype", "f16", "--outfile"]

    def upstream() -> None:
        out = tmp_path / "bare.gguf"
        out.unlink(missing_ok=True)
        subprocess.run([*command, out], check=True, capture_output=True, env=_environment(home))

    figures(
        f"convert to F16, {model.name}",
        {"so8t": lambda: convert(model.reference, tmp_path / "ours.gguf"), "upstream's converter": upstream},
        rounds=5,
        warmup=1,
        bar=1.3,
        lower_is_better=True,
    )


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M"])
def bench_quantise(figures: Any, absent: Any, model: Model, quick: bool, tmp_path: Path, kind: str) -> None:
    if quick and kind != "Q8_0":
        absent(f"quantise to {kind}", "only in a whole run: ours goes the same way as with Q8_0")
    quiet()

    def bare() -> None:
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = type_number(kind), 1
        assert llama_cpp.llama_model_quantize(os.fsencode(model.f16), os.fsencode(tmp_path / "bare.gguf"), params) == 0

    figures(
        f"quantise to {kind}, {model.name}",
        {"so8t": lambda: quantise(model.f16, tmp_path / "ours.gguf", kind, threads=1), "llama_model_quantize": bare},
        rounds=5,
        warmup=1,
        lower_is_better=True,
    )


@pytest.mark.parametrize("against", ["alone", "reference"])
def bench_lint(figures: Any, absent: Any, model: Model, quick: bool, against: str) -> None:
    """With the reference, lint re-quantises and compares all its tensors; upstream's metadata is given, not made."""
    if quick and against == "alone":
        absent("lint alone", "only in a whole run: it is part of lint against the reference")
    files = [model.q8, *(sorted(model.reference.glob("*.safetensors")) if against == "reference" else ())]
    options = {"reference": model.reference, "oracle": model.f16} if against == "reference" else {}

    def floor() -> None:
        for file in files:
            file.read_bytes()
            sha256_file(file)

    report = lint(model.q8, **options)
    assert report.verdict == "pass", report.checks
    figures(
        f"lint Q8_0 {'alone' if against == 'alone' else 'against its reference'}, {model.name}",
        {"so8t": lambda: lint(model.q8, **options), "read + sha256": floor},
        rounds=5,
        warmup=1,
        lower_is_better=True,
    )


def bench_verify_logits(figures: Any, model: Model, quick: bool) -> None:
    """The time that spooling, reading back and the divergence in float64 add to the forward passes."""
    n_ctx = 128 if quick else 512
    text = read_corpus(None, load_tokenizer(model.reference), n_ctx=n_ctx, chunks=2)
    figures(
        f"verify, logits of Q8_0 and reference, 2 x {n_ctx} tokens, {model.name}",
        {
            "so8t": lambda: _ours(model.reference, [model.q8], text, 1),
            "bare forwards": lambda: _bare(model.reference, [model.q8], text, 1),
        },
        rounds=5,
        warmup=1,
        lower_is_better=True,
        bar=None if quick else 1.25,
    )


def bench_verify_whole(figures: Any, absent: Any, model: Model, quick: bool, tmp_path: Path) -> None:
    """All legs, quick cells, contract and evidence, with a kept oracle, against the same forward passes."""
    if quick:
        absent("verify, everything", "only in a whole run: it takes a minute even for a tiny model")
    n_ctx = 256
    text = read_corpus(None, load_tokenizer(model.reference), n_ctx=n_ctx, chunks=2)
    work = tmp_path / "work"
    work.mkdir()
    options: dict[str, Any] = {"chunks": 2, "n_ctx": n_ctx, "threads": 1, "work_dir": work, "base_damage": False}
    figures(
        f"verify, everything, Q8_0, 2 x {n_ctx} tokens, {model.name}",
        {
            "so8t": lambda: verify(model.reference, [model.q8], **options),
            "bare forwards": lambda: _bare(model.reference, [model.q8], text, 1),
        },
        rounds=5,
        warmup=1,
        lower_is_better=True,
        more_seconds=0.0,
    )
