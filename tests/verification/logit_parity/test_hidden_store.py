"""Hidden states in place of logits: the same bits, a head that runs once a chunk, a body that is given up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_streamed import FAMILIES, passages, save_family
from verification_models import Family

import verification.logit_parity.logit_store as store_module
from verification.engines.huggingface import load_hf, open_reference
from verification.logit_parity import hidden_store
from verification.logit_parity.compare import Subject, measure_corpus, measure_file, passages_of, run_reference
from verification.logit_parity.hidden_store import HiddenSpool, gives_the_same
from verification.logit_parity.logit_store import LogitSpool
from verification.logit_parity.run_modes import Passage
from verification.logit_parity.text import Corpus


def silent(stage: str, done: int, total: int) -> None:
    pass


def rows_of(model: Any, texts: list[Passage], folder: Path) -> tuple[Any, list[Any]]:
    reference = run_reference(model, texts, folder, name="", tell=silent)
    with reference.spool as spool:
        return spool, [reference.read(p, 0, p.rows) for p in texts]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["llama tied", "gemma2", "cohere", "granite", "gpt2"])
def test_logits_made_from_hidden_states_are_the_models_bit_by_bit(
    name: str, stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Soft-cap, logit scale and a tied head are the model's own; pieces are those of the first time."""
    assert name in FAMILIES
    folder = save_family(name, tmp_path / "m")
    texts = [Passage(tokens, len(tokens) // 3) for tokens in passages()]
    full, wanted = rows_of(open_reference(folder, stream=stream), texts, tmp_path)
    assert isinstance(full, LogitSpool)
    monkeypatch.setattr(store_module, "LARGE", 0)
    small, found = rows_of(open_reference(folder, stream=stream), texts, tmp_path)
    assert isinstance(small, HiddenSpool)
    for own, other in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(own, other)


def test_parts_of_passages_are_read_in_any_order_and_pieces_are_cut_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, folder = np.random.default_rng(0), save_family("llama tied", tmp_path / "m")
    texts = [Passage(rng.integers(3, 96, length), 1) for length in (20, 33)]
    monkeypatch.setattr(hidden_store, "PIECE_ELEMENTS", 10 * 96)
    whole = run_reference(load_hf(folder), texts, tmp_path, name="", tell=silent)
    monkeypatch.setattr(store_module, "LARGE", 0)
    parts = run_reference(load_hf(folder), texts, tmp_path, name="", tell=silent)
    with whole.spool, parts.spool:
        assert isinstance(parts.spool, HiddenSpool)
        for start, stop in ((3, 17), (0, 18), (40, 49), (12, 12), (9, 41)):
            # another cut orders a head's 64 products otherwise: see test_long_chunks_come_in_pieces
            assert np.abs(parts.spool.read(start, stop) - whole.spool.read(start, stop)).max(initial=0) < 4e-5
        with pytest.raises(IndexError):
            parts.spool.read(40, 50)


def test_the_head_runs_once_a_chunk_for_all_files_and_the_body_is_given_up(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    text = Corpus((), tuple(rng.integers(3, family.vocab, 64) for _ in range(3)), "ids")
    texts = passages_of(text.chunks)
    plain = run_reference(load_hf(family.reference), texts, tmp_path, name="", tell=silent)
    with plain.spool:
        wanted = [
            measure_file(kind, family.files[kind], text, plain, seed=kind, threads=1, tell=silent)
            for kind in ("F16", "Q8_0")
        ]
    monkeypatch.setattr(store_module, "LARGE", 0)
    model = load_hf(family.reference)
    small = run_reference(model, texts, tmp_path, name="", tell=silent)
    assert sum(p.numel() for p in model.model.layers.parameters()) == 0
    calls: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    with small.spool:
        files = [Subject(kind, family.files[kind], kind) for kind in ("F16", "Q8_0")]
        found = measure_corpus(files, text, small, threads=1)
        assert len(calls) == 3
        assert [found[kind].divergence for kind in ("F16", "Q8_0")] == [one.divergence for one in wanted]


def test_a_head_that_gives_other_bits_keeps_full_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that asks its body for more than hidden states: planted as one that adds what the body was given."""
    model = load_hf(save_family("llama", tmp_path / "m"))
    text = Passage(np.arange(20, 40), 3)
    assert gives_the_same(model, text)
    forward = model.forward

    def other(input_ids: torch.Tensor, *, logits_to_keep: Any = 0, **more: Any) -> Any:
        answer = forward(input_ids=input_ids, logits_to_keep=logits_to_keep, **more)
        return SimpleNamespace(logits=answer.logits + input_ids.sum())

    monkeypatch.setattr(model, "forward", other)
    monkeypatch.setattr(type(model), "__call__", lambda self, **more: self.forward(**more))
    assert not gives_the_same(model, text)
    monkeypatch.setattr(store_module, "LARGE", 0)
    assert isinstance(rows_of(model, [text], tmp_path)[0], LogitSpool)


def test_a_vocabulary_of_262144_takes_less_than_100_mb_for_12_chunks_of_512(tmp_path: Path) -> None:
    """Bytes on disk are positions x width x 4: reckoned for the rows of 12 x 512 tokens and the run modes."""
    head: Any = SimpleNamespace(width=2560, hidden=lambda tokens, first, stop: np.zeros((stop - first, 2560), "f4"))
    with HiddenSpool(tmp_path, head, rows=3596, vocab=262144) as spool:
        spool.keep(Passage(np.zeros(256, dtype=np.int64), 100))
        spool._file._file.seek(0, 2)
        assert spool._file._file.tell() == 155 * 2560 * 4
    assert 3596 * 2560 * 4 < 100e6
