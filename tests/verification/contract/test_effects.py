"""Tokenizer keys written otherwise are notes where llama.cpp does the same with both files, and faults elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from gguf_bytes import BOOL, I32, U32, Value, with_keys

from verification.contract import metadata
from verification.contract.effects import written_otherwise
from verification.gguf.reader import ARRAY, STRING, read_gguf


def bpe(path: Path) -> Path:
    """A byte-level vocabulary: all 256 bytes, three merges, two control tokens."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(rest)}
    tokens = ["<s>", "</s>", *(letters[byte] for byte in range(256)), "th", "the", "12"]
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_feed_forward_length(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * 259])
    writer.add_token_merges(["t h", "th e", "1 2"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def judged(oracle: Path, keys: dict[str, Value | None], target: Path) -> tuple[set[str], set[str]]:
    file, wanted = read_gguf(with_keys(oracle, target, keys)), read_gguf(oracle)
    faults, notes = written_otherwise(metadata.against_oracle(file, wanted), file, wanted)
    return {f.where.partition("[")[0] for f in faults}, {f.where.partition("[")[0] for f in notes}


@pytest.mark.parametrize(
    "keys",
    [
        {"tokenizer.ggml.add_bos_token": Value(BOOL, False)},
        {"tokenizer.ggml.add_eos_token": Value(BOOL, False)},
        {"tokenizer.ggml.padding_token_id": Value(U32, 1)},
        {"tokenizer.ggml.add_space_prefix": Value(BOOL, False)},
        {"tokenizer.ggml.remove_extra_whitespaces": Value(BOOL, False)},
    ],
    ids=lambda keys: next(iter(keys)).rpartition(".")[2],
)
def test_what_is_the_default_anyway_is_a_note(keys: dict[str, Value | None], tmp_path: Path) -> None:
    assert judged(bpe(tmp_path / "a.gguf"), keys, tmp_path / "b.gguf") == (set(), set(keys))


@pytest.mark.parametrize(
    "keys",
    [
        {"tokenizer.ggml.add_bos_token": Value(BOOL, True)},
        {"tokenizer.ggml.eos_token_id": Value(U32, 5)},
        {"tokenizer.ggml.eot_token_id": Value(U32, 1)},
        {"tokenizer.ggml.pre": Value(STRING, "gpt-2")},
        {"tokenizer.ggml.merges": Value(ARRAY, ["t h"], STRING)},
        {"tokenizer.ggml.merges": Value(ARRAY, ["1 2", "th e", "t h"], STRING)},
        {"tokenizer.ggml.token_type": Value(ARRAY, [3, 3, *[1] * 258, 4], I32)},
        {"llama.rope.freq_base": Value(6, 5e4)},
        {"tokenizer.chat_template": Value(STRING, "{{ 'x' }}")},
    ],
    ids=lambda keys: next(iter(keys)).rpartition(".")[2],
)
def test_what_llama_cpp_does_otherwise_stays_a_fault(keys: dict[str, Any], tmp_path: Path) -> None:
    assert judged(bpe(tmp_path / "a.gguf"), keys, tmp_path / "b.gguf") == (set(keys), set())


def test_a_harmless_key_beside_a_harmful_one_is_not_excused(tmp_path: Path) -> None:
    keys = {"tokenizer.ggml.add_space_prefix": Value(BOOL, False), "tokenizer.ggml.add_bos_token": Value(BOOL, True)}
    assert judged(bpe(tmp_path / "a.gguf"), keys, tmp_path / "b.gguf") == (set(keys), set())


def test_one_number_for_all_layers_is_the_list_of_it(tmp_path: Path) -> None:
    path = bpe(tmp_path / "a.gguf")
    listed = {"llama.attention.head_count": Value(ARRAY, [4], U32)}
    assert judged(path, listed, tmp_path / "b.gguf") == (set(), set())
    other = {"llama.attention.head_count": Value(ARRAY, [2], U32)}
    assert judged(path, other, tmp_path / "b.gguf") == ({"llama.attention.head_count"}, set())
