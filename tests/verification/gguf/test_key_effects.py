"""The table of keys names every key that the installed llama.cpp reads, and nothing that it does not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import gguf.constants
import llama_cpp
import pytest

from verification.gguf import key_effects
from verification.gguf.key_effects import TABLE, effect_of, is_information

# a key as it stands in the compiled library: `%s` for the architecture
_KEY = re.compile(rb"\0((?:%s|general|tokenizer|split|adapter|xielu)(?:\.[a-z0-9_]+)+)(?=\0)")
_NO_KEYS = {"tokenizer.ggml", "adapter.lora"}
# rows of other readers: example programs, tools that make or use other kinds of file, and this project
_ELSEWHERE = re.compile(r"imatrix\.|quantize\.|diffusion\.|dflash\.|so8t\.|tokenizer\.chat_template(s|\.)")
_DESCRIPTIVE = {f"general.{name}" for name in key_effects._SHOWN}


def library_keys(data: bytes) -> set[str]:
    """Every key that a compiled library names, as a row of the table is called."""
    found = {key.decode().replace("%s", "{arch}") for key in _KEY.findall(data)}
    return found - _NO_KEYS


@pytest.fixture(scope="module")
def library() -> bytes:
    return Path(llama_cpp.llama_cpp._lib._name).read_bytes()


def package_keys(names: type = gguf.constants.Keys) -> Iterator[str]:
    for name, value in vars(names).items():
        if isinstance(value, type) and not name.startswith("_"):
            yield from package_keys(value)
        elif isinstance(value, str) and not name.startswith("_"):
            yield value


def test_every_key_of_the_installed_llama_cpp_has_a_row(library: bytes) -> None:
    found = library_keys(library)
    assert len(found) > 200
    assert sorted(found - TABLE.keys()) == []


def test_every_row_is_read_by_the_installed_llama_cpp_or_says_who_reads_it(library: bytes) -> None:
    rows = {key for key in TABLE if not _ELSEWHERE.match(key)} - _DESCRIPTIVE
    assert sorted(rows - library_keys(library)) == []


def test_a_key_more_or_less_would_be_seen(library: bytes) -> None:
    newer = library + b"\0%s.attention.new_switch\0"
    assert library_keys(newer) - TABLE.keys() == {"{arch}.attention.new_switch"}
    older = library.replace(b"\0%s.attention.clamp_kqv\0", b"\0%s.attention.clamp_kqv!\0")
    assert "{arch}.attention.clamp_kqv" in TABLE.keys() - library_keys(older)


def test_keys_that_the_package_names_have_a_row_or_are_known_to_be_unread() -> None:
    unread = {"{arch}.activation_sparsity_scale", "{arch}.altup.active_idx", "{arch}.altup.num_inputs"}
    values = {"{id}": "0", "{arch}": "x", "{dense}": "dense_2", "{name}": "tool_use"}
    filled = {re.sub(r"\{\w+\}", lambda name: values[name[0]], key) for key in package_keys()}
    assert {key for key in filled if effect_of(key, "x") is None} == {key.replace("{arch}", "x") for key in unread}


def test_a_key_of_another_architecture_is_not_read() -> None:
    assert effect_of("llama.block_count", "llama") is not None
    assert effect_of("llama.block_count", "qwen2") is None
    assert effect_of("gpt-oss.attention.sliding_window", "gpt-oss") is not None
    assert effect_of("llama.attention", "llama") is None
    assert effect_of("{arch}.block_count", "llama") is None


@pytest.mark.parametrize(
    ("key", "information"),
    [
        ("general.base_model.0.name", True),
        ("general.license.name", True),
        ("general.sampling.temp", False),
        ("tokenizer.chat_template.tool_use", False),
        ("x.y", False),
    ],
)
def test_what_is_shown_alone_changes_nothing(key: str, information: bool) -> None:
    assert is_information(key) is information
