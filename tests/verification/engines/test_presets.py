"""llama.cpp's recipe for a file type: asked in a child, because with a stranger's sizes its quantiser aborts."""

from __future__ import annotations

import os
from pathlib import Path

import gguf_mutations
import pytest
from gguf_bytes import U32, Value, parts

from verification.commands.lint import lint
from verification.engines import presets
from verification.engines.quantise import quantise
from verification.gguf.reader import ARRAY, GGUFFile, read_gguf

pytestmark = pytest.mark.usefixtures("cold_children")  # what ends them is tested


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_mutations.llama(gguf_mutations.bpe()).write(tmp_path_factory.mktemp("presets") / "f16.gguf")


def types(file: GGUFFile) -> dict[str, str]:
    return {name: tensor.type for name, tensor in file.tensors.items()}


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M", "Q2_K"])
def test_the_recipe_is_what_llama_cpp_writes(kind: str, whole: Path, tmp_path: Path) -> None:
    file = read_gguf(quantise(whole, tmp_path / "made.gguf", kind, threads=1))
    assert presets.preset_types(file)[0] == types(file)


def test_the_child_answers_as_the_same_code_does_here(whole: Path, tmp_path: Path) -> None:
    file = read_gguf(quantise(whole, tmp_path / "made.gguf", "Q4_K_M", threads=1))
    found = presets.preset_types(file)
    keys = {key: value for key, value in file.metadata.items() if key.startswith("llama.")}
    keys |= {"llama.a": 0.5, "llama.b": True, "llama.c": "x", "llama.d": [1, 2], "llama.e": []}
    shapes = {tensor.name: list(tensor.shape) for tensor in file.tensors.values()}
    code = presets._Quantiser()
    code.answer({"do": "write", "architecture": "llama", "keys": keys, "shapes": shapes, "folder": str(tmp_path)})
    question = {"do": "quantise", "type": "Q4_K_M"}
    assert [code.answer({**question, "matrix": matrix})["types"] for matrix in (False, True)] == found


def test_a_long_list_is_no_size_of_a_model(whole: Path, tmp_path: Path) -> None:
    """It is not sent to the child: a million numbers took the linter 2.7 s more."""
    damaged = parts(quantise(whole, tmp_path / "made.gguf", "Q8_0", threads=1))
    damaged.keys["llama.odd"] = Value(ARRAY, [7] * (1 << 20), U32)
    file = read_gguf(damaged.write(tmp_path / "x.gguf"))
    before = os.times()
    assert presets.preset_types(file)[0] == types(file)
    after = os.times()
    assert sum(after[:4]) - sum(before[:4]) < 1.5  # 0.3 s; with the list 3 s


@pytest.mark.parametrize("blocks", [0, 600, 10_000])
def test_sizes_of_which_the_quantiser_dies_give_no_recipe_and_a_report(
    blocks: int, whole: Path, tmp_path: Path
) -> None:
    damaged = parts(quantise(whole, tmp_path / "made.gguf", "Q8_0", threads=1))
    damaged.keys["llama.block_count"] = Value(U32, blocks)
    path = damaged.write(tmp_path / "damaged.gguf")
    assert presets.preset_types(read_gguf(path)) == []
    assert lint(path).verdict == "fail"
