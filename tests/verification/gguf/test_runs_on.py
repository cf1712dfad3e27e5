"""The oldest build that loads a file follows from what the file names; a name without a source gives no number."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import MODEL_ARCH_NAMES, GGMLQuantizationType
from tiny_gguf import write_tiny

from verification.commands.lint import lint
from verification.commands.lint_terminal import lint_table
from verification.gguf import runs_on as module
from verification.gguf.key_effects import TABLE
from verification.gguf.reader import GGUFFile, GGUFTensor
from verification.gguf.runs_on import runs_on


def file_of(architecture: str = "llama", tensors: tuple[str, ...] = (), kind: str = "F16", **keys: Any) -> GGUFFile:
    """A header without data."""
    metadata = {name.replace("__", "."): value for name, value in keys.items()}
    made = {name: GGUFTensor(name, (2, 256), kind, np.zeros(1, np.uint8)) for name in ("token_embd.weight", *tensors)}
    return GGUFFile(Path("x.gguf"), {"general.architecture": architecture, **metadata}, made)


# Read apart from the table: pull requests by their numbers, and builds as others report them (b5092 for Qwen3:
# guinmoon/LLMFarm#126)
@pytest.mark.parametrize(
    ("file", "build", "because"),
    [
        (file_of(), 1405, "GGUF version 3, PR #3552"),
        (file_of("qwen3"), 5092, "architecture qwen3, PR #12828"),
        (file_of("gpt-oss", kind="MXFP4"), 6096, "PR #15091"),
        (file_of("gemma4"), 8637, "architecture gemma4, PR #21309"),
        (file_of(kind="IQ4_XS"), 2281, "type IQ4_XS, PR #5747"),
        (file_of(kind="IQ1_S"), 2404, "type IQ1_S, PR #5999"),
        (file_of(kind="NVFP4"), 8297, "type NVFP4, PR #19769"),
        (file_of(tensors=("rope_freqs.weight",)), 3472, "tensor rope_freqs.weight, PR #8676"),
        (file_of(tensors=("blk.0.attn_k.weight", "blk.7.attn_q.bias")), 1597, "tensor blk.7.attn_q.bias, PR #4283"),
        (file_of(tensors=("blk.7.attn_q.bias", "blk.0.attn_q.scale")), 8297, "tensor blk.0.attn_q.scale, PR #19769"),
        (
            file_of(tokenizer__ggml__model="gpt2", tokenizer__ggml__pre="llama-bpe"),
            2761,
            "pre-tokenizer llama-bpe, PR #6920",
        ),
        (file_of(tokenizer__ggml__model="llama", tokenizer__ggml__pre="no-such"), 1405, "GGUF version 3, PR #3552"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_newest_need_decides(file: GGUFFile, build: int, because: str) -> None:
    found = runs_on(file)
    assert found.loads is not None
    assert found.loads.build == build
    assert because in found.sentence
    assert (found.keys, found.unknown) == (None, ())


def test_a_key_that_changes_the_network_gives_a_second_number() -> None:
    found = runs_on(file_of("gemma3", **{"gemma3__attention__sliding_window_pattern": [True]}))
    assert found.sentence == (
        "loads from b4875 on (architecture gemma3, PR #12343), knows every key from b7515 on "
        "(gemma3.attention.sliding_window_pattern, PR #15641)"
    )
    words = runs_on(file_of("gemma3", general__sampling__temp=1.0, gemma3__new_switch=1, llama__kda__head_dim=1))
    assert words.keys is None  # settings and keys that are not read change neither network nor tokens


@pytest.mark.parametrize(
    ("file", "unknown"),
    [
        (file_of("llama9"), "architecture llama9"),
        (file_of(tokenizer__ggml__model="gpt2", tokenizer__ggml__pre="no-such"), "pre-tokenizer no-such"),
        (file_of(tokenizer__ggml__model="runes"), "tokenizer runes"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_name_without_a_source_gives_no_number(file: GGUFFile, unknown: str) -> None:
    found = runs_on(file)
    assert (found.loads, found.keys, found.unknown) == (None, None, (unknown,))
    assert found.sentence.startswith(f"the oldest build is not known here: {unknown}: in no build up to b")


def test_the_table_has_every_architecture_and_type_of_the_package() -> None:
    """Those that llama.cpp loads: a projector is no model, the others are of its own tools or were never added."""
    table = module._table()
    elsewhere = {"mmproj", "clip"}
    assert {name for name in MODEL_ARCH_NAMES.values() if name not in table["architectures"]} <= elsewhere
    assert {kind.name for kind in GGMLQuantizationType} - set(table["types"]) == set()
    assert {key for key in table["keys"] if key.replace("%s", "{arch}") not in TABLE} == set()


def test_lint_says_it(tmp_path: Path) -> None:
    from rich.console import Console

    report = lint(write_tiny(tmp_path / "tiny.gguf"))
    assert report.runs_on is not None
    assert report.runs_on.loads is not None
    assert (report.runs_on.loads.build, report.runs_on.loads.what) == (2761, "pre-tokenizer default")
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(lint_table(report))
    assert f"llama.cpp: loads from b{report.runs_on.loads.build} on" in console.export_text()
