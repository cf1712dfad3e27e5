"""Real parts shared by all tests, each made once a session: SmolLM2-135M and a tiny model with its tokenizer."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    # Each worker keeps to its share of the cores: torch's and llama.cpp's threads spin while they wait for one another.
    number, workers = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[number % len(cores) :: workers])

import pytest
from made import Made
from remembered_converter import remembering

# A test may use the parts of another room's tests: each folder's modules are found, and no two have one name.
sys.path += [str(folder) for folder in sorted(Path(__file__).parent.rglob("*")) if any(folder.glob("*.py"))]


def pytest_collection_finish() -> None:
    _keep_what_is_loaded()


@pytest.fixture(autouse=True, scope="module")
def _loaded() -> None:
    _keep_what_is_loaded()


def _keep_what_is_loaded() -> None:
    """Garbage is looked for among what the tests make, not in 600,000 objects of imported packages: 0.3 s each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """Makes each shared folder once for all workers of this run (`made.py`)."""
    base = tmp_path_factory.getbasetemp()
    shared = Made((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "made")
    yield shared
    assert shared.changed() == [], "a test changed files that all tests share; it should change a copy"


@pytest.fixture(scope="session")
def remembered_converter(made: Made) -> Path:
    """A directory for $SO8T_CONVERTER: upstream's converter, which makes each file of a run once."""
    return made(remembering)


@pytest.fixture(scope="session")
def smollm2_dir(made: Made) -> Path:
    """SmolLM2-135M-Instruct as an ordinary bfloat16 checkpoint."""
    return made(_smollm2) / "smollm2"


@pytest.fixture(scope="session")
def tiny_dir(made: Made, smollm2_dir: Path) -> Path:
    """A random two-layer Llama, hidden 256 (so K-quants are real), with SmolLM2's tokenizer files."""
    return made(_tiny_llama, smollm2_dir) / "tiny-llama"


@pytest.fixture(scope="session")
def tiny_gguf(made: Made, tiny_dir: Path) -> Path:
    """The tiny model as an F32 GGUF file."""
    return made(_tiny_gguf, tiny_dir) / "tiny-F32.gguf"


def _smollm2(folder: Path) -> None:
    from pipeline.base_model import prepare_base
    from pipeline.config import DEMO_MODEL

    prepare_base(DEMO_MODEL, folder / "smollm2")


def _tiny_llama(folder: Path, smollm2_dir: Path) -> None:
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
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight *= 4  # tied head: logits of standard deviation 4, far from uniform
    model.to(torch.bfloat16).save_pretrained(folder / "tiny-llama")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(smollm2_dir / name, folder / "tiny-llama" / name)


def _tiny_gguf(folder: Path, tiny_dir: Path) -> None:
    from verification.engines.convert import convert

    convert(tiny_dir, folder / "tiny-F32.gguf", outtype="f32")
