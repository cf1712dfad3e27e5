"""Laws of the corpus: every file is scored, in turn; the ids are the reference's own; too little text is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from so8t_core.errors import InputError
from verification.logit_parity.text import read_corpus


class Letters:
    """A tokenizer with one id a character."""

    chat_template = None

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def _files(tmp_path: Path, *texts: str) -> list[Path]:
    paths = [tmp_path / f"{number}.txt" for number in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def _text(chunk: np.ndarray) -> str:
    return "".join(map(chr, chunk))


def test_files_take_turns_and_a_short_one_gives_way(tmp_path: Path) -> None:
    paths = _files(tmp_path, "a" * 100, "b" * 20)
    corpus = read_corpus(paths, Letters(), n_ctx=8, chunks=6)
    assert [_text(c)[0] for c in corpus.chunks] == ["a", "b", "a", "b", "a", "a"]


def test_digest_is_of_the_ids(tmp_path: Path) -> None:
    paths = _files(tmp_path, "a" * 100, "a" * 99 + "b")
    first, second = (read_corpus(p, Letters(), n_ctx=8, chunks=2).sha256 for p in paths)
    assert first == second  # the difference lies behind what was scored
    assert read_corpus(paths[0], Letters(), n_ctx=8, chunks=3).sha256 != first
    assert read_corpus(paths[0], Letters(), n_ctx=8, chunks=2, bos=7).sha256 != first


def test_bos_replaces_the_first_token_of_each_chunk(tmp_path: Path) -> None:
    corpus = read_corpus(_files(tmp_path, "abcdefghijklmnop")[0], Letters(), n_ctx=8, chunks=2, bos=7)
    assert [c[0] for c in corpus.chunks] == [7, 7]
    assert _text(corpus.chunks[1][1:]) == "jklmnop"


def test_too_little_text_says_how_much_there_is(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds 2 whole chunks of 8 tokens, but 3 .*at most 2"):
        read_corpus(_files(tmp_path, "a" * 20)[0], Letters(), n_ctx=8, chunks=3)
