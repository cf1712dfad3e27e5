"""The contract without logits: each comparison is silent on a healthy file and speaks on an injected fault."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from verification_models import Family, rewrite

from verification import tokens
from verification.gguf_file import read_gguf
from verification.llama_engine import LlamaModel
from verification.tensors import read_config


def vocabulary(path: Path) -> LlamaModel:
    return LlamaModel(path, vocab_only=True)


def test_a_healthy_file_has_no_findings(family: Family, tokenizer: Any) -> None:
    file = read_gguf(family.files["Q8_0"])
    with vocabulary(file.path) as model:
        assert tokens.token_ids(tokenizer, model, tokens.PLAIN) == (0, "")
        chats = tokens.render_chats(tokenizer)
        assert len(chats) == len(tokens.CHATS)
        assert tokens.token_ids(tokenizer, model, chats) == (0, "")
        assert tokens.added_specials(tokenizer, model) == (0, "")
        assert tokens.chat_template(tokenizer, model) == (0, "")
        assert tokens.stop_set(family.reference, tokenizer, model) == (0, "")
    assert tokens.special_ids(tokenizer, file) == (0, "")
    assert tokens.metadata(read_config(family.reference), file, len(tokenizer)) == (0, "")
    assert tokens.differs_from_oracle(file, read_gguf(family.files["F16"])) == (0, "")


def broken(family: Family, tmp_path: Path, **fields: Any) -> Path:
    return rewrite(
        family.files["F16"], tmp_path / "f.gguf", fields={k.replace("__", "."): v for k, v in fields.items()}
    )


def test_another_pre_tokenizer_changes_ids(family: Family, tokenizer: Any, tmp_path: Path) -> None:
    with vocabulary(broken(family, tmp_path, tokenizer__ggml__pre="llama-bpe")) as model:
        count, detail = tokens.token_ids(tokenizer, model, tokens.PLAIN)
    assert count >= 1
    assert "in llama.cpp" in detail


def test_an_added_bos_is_found(family: Family, tokenizer: Any, tmp_path: Path) -> None:
    with vocabulary(broken(family, tmp_path, tokenizer__ggml__add_bos_token=True)) as model:
        assert tokens.added_specials(tokenizer, model)[0] == 1
        assert tokens.token_ids(tokenizer, model, tokens.PLAIN)[0] > 0


def test_a_changed_template_is_found_with_its_place(family: Family, tokenizer: Any, tmp_path: Path) -> None:
    other = tokenizer.chat_template.replace("assistant", "model")
    with vocabulary(broken(family, tmp_path, tokenizer__chat_template=other)) as model:
        count, detail = tokens.chat_template(tokenizer, model)
    assert count == 1
    assert "from character" in detail
    with vocabulary(broken(family, tmp_path, tokenizer__chat_template=None)) as model:
        assert "missing in the file" in tokens.chat_template(tokenizer, model)[1]


def test_a_wrong_eos_is_found(family: Family, tokenizer: Any, tmp_path: Path) -> None:
    path = broken(family, tmp_path, tokenizer__ggml__eos_token_id=100)
    count, detail = tokens.special_ids(tokenizer, read_gguf(path))
    assert (count, detail) == (1, "eos is 2 in the reference and 100 in the file")


def test_a_stop_token_that_llama_cpp_does_not_know_is_found(family: Family, tokenizer: Any, tmp_path: Path) -> None:
    directory = shutil.copytree(family.reference, tmp_path / "hf", ignore=shutil.ignore_patterns("*.safetensors"))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 500]}), encoding="utf-8")
    with vocabulary(family.files["F16"]) as model:
        assert tokens.stop_set(directory, tokenizer, model) == (1, "llama.cpp goes on after [500]")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.rope.freq_base", 10001.0),
        ("llama.attention.layer_norm_rms_epsilon", 1.1e-5),
        ("llama.context_length", 1024),
        ("llama.attention.head_count_kv", 8),
        ("llama.attention.key_length", 64),
        ("llama.vocab_size", 49153),
    ],
)
def test_every_changed_key_is_named(family: Family, tokenizer: Any, tmp_path: Path, key: str, value: Any) -> None:
    file = read_gguf(rewrite(family.files["F16"], tmp_path / "f.gguf", fields={key: value}))
    count, detail = tokens.metadata(read_config(family.reference), file, len(tokenizer))
    assert count == 1
    assert key in detail
    assert tokens.differs_from_oracle(file, read_gguf(family.files["F16"]))[0] == 1


def test_whatever_the_list_forgets_the_oracle_sees(family: Family, tmp_path: Path) -> None:
    scores = list(range(49152))
    file = read_gguf(rewrite(family.files["F16"], tmp_path / "f.gguf", fields={"tokenizer.ggml.token_type": scores}))
    count, detail = tokens.differs_from_oracle(file, read_gguf(family.files["F16"]))
    assert count == 1
    assert "tokenizer.ggml.token_type" in detail


def test_expected_metadata_reads_both_forms_of_rope_theta() -> None:
    old = tokens.expected_metadata({"rope_theta": 5000, "rope_scaling": {"type": "linear"}})
    new = tokens.expected_metadata({"rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}})
    assert old["rope.freq_base"] == new["rope.freq_base"] == 5000.0
