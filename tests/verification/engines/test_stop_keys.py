"""Stop keys: written where llama.cpp would go on, nowhere else, and nothing of the file changes beside them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_gguf import write_tiny

from so8t_core.errors import InputError
from verification.contract import file_structure
from verification.engines.llama_model import LlamaModel
from verification.engines.stop_keys import KEYS, add_stop_keys, listed_stops
from verification.gguf.edit_keys import insert_keys
from verification.gguf.reader import read_gguf


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "m.gguf")


def stops(folder: Path, value: object) -> Path:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("keys", [{KEYS[0]: 7}, {KEYS[0]: 7, KEYS[1]: 9}])
def test_inserted_keys_are_all_that_changes(file: Path, keys: dict[str, int]) -> None:
    before = read_gguf(file)
    values = {name: np.array(tensor.raw) for name, tensor in before.tensors.items()}
    insert_keys(file, keys)
    after = read_gguf(file)
    assert after.metadata == {**before.metadata, **keys}
    assert list(after.metadata)[: len(before.metadata)] == list(before.metadata)  # theirs first, in their order
    assert list(after.tensors) == list(values)
    assert all(np.array_equal(after.tensors[name].raw, raw) for name, raw in values.items())
    assert file_structure.layout(after) == []


def test_llama_cpp_stops_at_every_listed_token(file: Path, tmp_path: Path) -> None:
    folder = stops(tmp_path, [1, 7, 9])
    with LlamaModel(file) as model:
        assert [model.is_end(token) for token in (1, 7, 9)] == [True, False, False]
    assert add_stop_keys(file, folder) == {KEYS[0]: 7, KEYS[1]: 9}
    with LlamaModel(file) as model:  # the whole file loads
        assert [model.is_end(token) for token in (1, 7, 9, 8)] == [True, True, True, False]
    assert add_stop_keys(file, folder) == {}


@pytest.mark.parametrize("value", [1, [1], None, [1, 1000]])
def test_a_file_that_needs_no_key_is_not_touched(file: Path, tmp_path: Path, value: object) -> None:
    before = file.read_bytes(), file.stat().st_ino
    assert add_stop_keys(file, stops(tmp_path, value)) == {}
    assert (file.read_bytes(), file.stat().st_ino) == before


def test_more_stops_than_keys_are_left_to_the_gate(file: Path, tmp_path: Path) -> None:
    assert add_stop_keys(file, stops(tmp_path, [7, 8, 9])) == {KEYS[0]: 7, KEYS[1]: 8}


@pytest.mark.parametrize("nested", [False, True], ids=["config.json", "its text_config"])
def test_stops_of_a_checkpoint_without_a_generation_config_are_config_jsons(
    nested: bool, file: Path, tmp_path: Path
) -> None:
    """As transformers takes them; a generation_config.json, where there is one, counts alone."""
    named = {"eos_token_id": [1, 7, 9]}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": named} if nested else named), encoding="utf-8")
    assert add_stop_keys(file, tmp_path) == {KEYS[0]: 7, KEYS[1]: 9}
    assert listed_stops(stops(tmp_path, [1])) == {1}


def test_a_text_is_inserted_as_a_string(file: Path) -> None:
    before = read_gguf(file).metadata
    insert_keys(file, {"so8t.think_form": "思考", KEYS[0]: 7})
    assert read_gguf(file).metadata == {**before, "so8t.think_form": "思考", KEYS[0]: 7}
    with LlamaModel(file) as model:
        assert model.is_end(7)


def test_a_damaged_generation_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("[", encoding="utf-8")
    with pytest.raises(InputError, match=r"generation_config\.json is damaged"):
        listed_stops(tmp_path)
