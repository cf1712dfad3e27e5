"""Real parts shared by all tests, each made once a session: SmolLM2-135M and a tiny model with its tokenizer."""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import subprocess
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
from remembered_converter import remembering, warm
from warm_programs import Warm, WarmChildren, WarmConverter, program

# A test may use the parts of another room's tests: each folder's modules are found, and no two have one name.
sys.path += [str(folder) for folder in sorted(Path(__file__).parent.rglob("*")) if any(folder.glob("*.py"))]


def pytest_configure(config: pytest.Config) -> None:
    """Workers share the cores: numpy's threads are made when plugins import it, before a worker takes its share."""
    if config.getoption("numprocesses", None):
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # shared parts are made before the first file's own fixtures


@pytest.fixture(autouse=True, scope="module")
def _collector_spares_what_is_loaded() -> None:
    """Objects that exist before a test file, a million of torch and transformers, are left out of its collections.

    A full collection visits every live object, and `verify` runs one after every stage.
    """
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
def so8t(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The program for shell scripts and `subprocess`, without the seconds of its imports (`warm_programs.py`)."""
    warm = Warm("so8t", {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])})
    yield program(tmp_path_factory.mktemp("so8t") / "so8t", warm.words())
    warm.close()


@pytest.fixture(scope="session")
def warm_converter() -> Iterator[None]:
    """Conversions by forks of one process of upstream's converter; `cold_converter` starts it as users do."""
    module, converter = importlib.import_module("verification.engines.convert"), WarmConverter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "subprocess", converter)
        yield
    converter.close()


@pytest.fixture(scope="session")
def warm_children() -> Iterator[None]:
    """The verifier's children by forks; `cold_children` starts each as users do."""
    children = WarmChildren()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("verification.engines.child"), "subprocess", children)
        yield
    children.close()


@pytest.fixture
def cold_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start each child of the verifier as a new process, as in ordinary use."""
    monkeypatch.setattr(sys.modules["verification.engines.child"], "subprocess", subprocess)


@pytest.fixture
def cold_converter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start upstream's converter as a new process, as in ordinary use."""
    monkeypatch.setattr(sys.modules["verification.engines.convert"], "subprocess", subprocess)


@pytest.fixture(scope="session")
def remembered_converter(made: Made) -> Iterator[Path]:
    """A directory for $SO8T_CONVERTER: upstream's converter, which makes each file of a run once."""
    home = made(remembering)
    with warm(home):
        yield home


@pytest.fixture
def conversions_remembered(remembered_converter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion that this run has made before is copied."""
    monkeypatch.setenv("SO8T_CONVERTER", str(remembered_converter))


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
