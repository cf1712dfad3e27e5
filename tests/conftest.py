"""Real parts shared by all tests, each made once a session: SmolLM2-135M and a tiny model with its tokenizer."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    # Each worker keeps to its share of the cores: torch's and llama.cpp's threads spin while they wait for one another.
    number, workers = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[number % len(cores) :: workers])

import pytest

# A test may use the parts of another room's tests: each folder's modules are found, and no two have one name.
sys.path += [str(folder) for folder in sorted(Path(__file__).parent.rglob("*")) if any(folder.glob("*.py"))]


@pytest.fixture(scope="session")
def smollm2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as an ordinary bfloat16 checkpoint."""
    from pipeline.base_model import prepare_base
    from pipeline.config import DEMO_MODEL

    return prepare_base(DEMO_MODEL, tmp_path_factory.mktemp("models") / "smollm2")


@pytest.fixture(scope="session")
def tiny_dir(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama, hidden 256 (so K-quants are real), with SmolLM2's tokenizer files."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=49152,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.06,  # 1 / sqrt(256): activations keep their size
        dtype="bfloat16",
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight *= 4  # tied head: logits of standard deviation 4, far from uniform
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(smollm2_dir / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def tiny_gguf(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as an F32 GGUF file."""
    from verification.engines.convert import convert

    return convert(tiny_dir, tmp_path_factory.mktemp("gguf") / "tiny-F32.gguf", outtype="f32")
