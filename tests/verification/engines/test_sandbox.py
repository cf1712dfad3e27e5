"""A stranger's file in llama.cpp: the child answers as the same code does in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf_mutations
import pytest

from verification.engines import llama_model, sandbox
from verification.engines.sandbox import Vocabulary

TEXTS = ["the th", "", "ä 日本\n", "<|im_start|>user", "</s> [user]", "\ud800", " the" * 2000]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    made = {"bpe": gguf_mutations.llama(gguf_mutations.bpe()), "spm": gguf_mutations.llama(gguf_mutations.spm())}
    return {name: parts.write(folder / f"{name}.gguf") for name, parts in made.items()}


@pytest.fixture
def engine() -> Iterator[Any]:
    """The child's code in this process, on healthy files only; llama.cpp's log is given back afterwards."""
    yield sandbox._Engine()
    llama_model.quiet()


@pytest.mark.parametrize("kind", ["bpe", "spm"])
def test_the_child_answers_as_the_same_code_does_here(kind: str, files: dict[str, Path], engine: Any) -> None:
    path = files[kind]
    with Vocabulary(path) as vocabulary:
        facts = engine.answer({"do": "vocabulary", "path": str(path)})
        assert facts["reason"] == vocabulary.refused == ""
        assert facts["template"] == vocabulary.chat_template()
        assert facts["n_tokens"] == vocabulary.vocab_size
        assert (facts["bos"], facts["eos"]) == (vocabulary.bos, vocabulary.eos) == (1, 2)
        assert (facts["add_bos"], facts["add_eos"]) == (vocabulary.add_bos, vocabulary.add_eos)
        for text in TEXTS:
            for special, parsed in ((False, False), (True, True)):
                question = {"do": "tokenise", "text": text, "add_special": special, "parse_special": parsed}
                ids = vocabulary.tokenize(text, add_special=special, parse_special=parsed)
                assert engine.answer(question)["ids"] == ids
        for token in range(6):
            found = engine.answer({"do": "token", "token": token})
            assert found["text"] == vocabulary.token_text(token)
            assert found["is_control"] == vocabulary.is_control(token)
            assert found["is_end"] == vocabulary.is_end(token)
        assert vocabulary.token_text(vocabulary.vocab_size) == ""
        assert not vocabulary.is_end(-1)
        assert engine.answer({"do": "effects", "texts": TEXTS}) == vocabulary.effects(TEXTS)
        assert engine.answer({"do": "model", "path": str(path)})["reason"] == vocabulary.model_refused() == ""


def test_a_longer_piece_than_the_first_buffer_is_read_whole(tmp_path: Path, engine: Any) -> None:
    keys = gguf_mutations.bpe()
    keys["tokenizer.ggml.tokens"].value[-1] = "e" * 1000
    path = gguf_mutations.llama(keys).write(tmp_path / "long.gguf")
    last = len(keys["tokenizer.ggml.tokens"].value) - 1
    engine.answer({"do": "vocabulary", "path": str(path)})
    assert engine._piece(last) == b"e" * 1000
    with Vocabulary(path) as vocabulary:
        assert vocabulary.effects(["e"]) == engine.answer({"do": "effects", "texts": ["e"]})


def test_the_reason_of_a_refusal_is_llama_cpps(tmp_path: Path, engine: Any) -> None:
    parts = gguf_mutations.llama(gguf_mutations.bpe())
    del parts.tensors["blk.1.ffn_up.weight"]
    short = parts.write(tmp_path / "short.gguf")
    reason = engine.answer({"do": "model", "path": str(short)})["reason"]
    assert "tensor 'blk.1.ffn_up.weight' not found" in reason
    other = tmp_path / "other.gguf"
    other.write_bytes(b"no GGUF at all")
    with Vocabulary(short) as vocabulary, Vocabulary(other) as none:
        assert vocabulary.refused == ""
        assert vocabulary.model_refused() == reason
        assert none.model_refused() == none.refused == engine.answer({"do": "vocabulary", "path": str(other)})["reason"]
        assert "no reason given" not in none.refused
