"""Choosing a file type: domains, the cheap order, the limits, and a whole choice on a miniature."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.choose.choose import Choice, Limits, _candidates, choose
from pipeline.choose.domains import Domain, built_in, given
from pipeline.choose.ladder import Rung, check_types, undominated
from pipeline.choose.measure import Measured
from pipeline.choose.page import answer, frontier, table, write_choice
from so8t_core.errors import InputError
from verification.gate.policy import make_policy
from verification.gate.report import Divergence
from verification.logit_parity.kl import DivergenceAccumulator
from verification.logit_parity.text import read_corpus
from verification.reference.tokenizer import load_tokenizer


def a_rung(kind: str, size: int, error: float) -> Rung:
    return Rung(kind=kind, path=Path(f"{kind}.gguf"), bytes=size, weight_error=error)


def measured(kind: str, size: int, kld: float, upper: float) -> Measured:
    empty = DivergenceAccumulator(reference="r", candidate=kind, n_ctx=8, vocab=9).result()
    macro: Divergence = empty.model_copy(
        update={"mean_kld": kld, "mean_kld_interval": (kld / 2, upper), "tokens": 10, "chunks": 2}
    )
    return Measured(kind=kind, bytes=size, weight_error=0.1, macro=macro, domains={"English": kld})


def test_a_type_that_another_one_dominates_is_not_measured() -> None:
    rungs = [a_rung("A", 10, 0.3), a_rung("B", 12, 0.4), a_rung("C", 20, 0.1), a_rung("D", 30, 0.01)]
    assert [one.kind for one in undominated(rungs)] == ["A", "C", "D"]
    near = [*rungs, a_rung("E", 21, 0.13), a_rung("F", 22, 0.134), a_rung("twin of A", 10, 0.3)]
    assert [one.kind for one in undominated(near)] == ["A", "C", "E", "D"]
    assert [one.kind for one in undominated(rungs, max_size=25)] == ["A", "C"]
    with pytest.raises(InputError, match="the smallest file, A, has 10"):
        undominated(rungs, max_size=9)


def test_the_smallest_file_whose_upper_end_keeps_the_limit_comes_first() -> None:
    """Quality is not monotonic in size: B passes, the larger C does not."""
    ladder = [measured("A", 10, 0.3, 0.5), measured("B", 12, 0.04, 0.05), measured("C", 20, 0.045, 0.06)]
    policy = make_policy({"quality": {"A": {"mean_kld": 0.6, "top1": 0.1}}})
    assert [one.kind for one in _candidates(ladder, Limits(max_kld=0.05), policy)] == ["B"]
    assert [one.kind for one in _candidates(ladder, Limits(max_size=30), policy)] == ["B", "C", "A"]
    assert [one.kind for one in _candidates(ladder, Limits(policy="gate.yaml"), policy)] == ["A"]


def test_unknown_types_and_missing_limits_are_refused(tiny_dir: Path, tmp_path: Path) -> None:
    assert check_types(["q8_0", " Q8_0", "q2_k"]) == ["Q8_0", "Q2_K"]
    with pytest.raises(InputError, match="unknown quantisation type"):
        check_types(["Q9"])
    with pytest.raises(InputError, match="needs a limit"):
        choose(tiny_dir, tmp_path, Limits())


def test_the_halves_of_a_domain_share_no_paragraph_and_are_long_enough(tiny_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_dir)
    domains = built_in(chat=True)
    assert [domain.name for domain in domains] == ["English", "Japanese", "code", "mathematics", "chat"]
    for domain in domains:
        halves = domain.halves()
        assert not set(domain.paragraphs[0::2]) & set(domain.paragraphs[1::2]), domain.name
        for text, chunks in zip(halves, (2, 4), strict=True):
            path = tmp_path / f"text{domain.suffix}"
            path.write_text(text, encoding="utf-8")
            assert len(read_corpus(path, tokenizer, n_ctx=256, chunks=chunks).chunks) == chunks


def test_a_file_of_the_users_own_is_a_domain(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("one\n\ntwo\n\nthree", encoding="utf-8")
    assert given({"mine": path}) == [Domain("mine", ["one", "two", "three"])]
    path.write_text("one", encoding="utf-8")
    with pytest.raises(InputError, match="has 1 paragraphs; at least 2"):
        given({"mine": path})


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default policy without what a random model and two thousand positions cannot keep."""
    path = tmp_path_factory.mktemp("policy") / "gate.yaml"
    path.write_text(
        "convert: {top1: 0.9}\nevidence: {positions: 100, chunks: 4, entropy_share: 1.0}\n"
        "cells: {F16: {mean_kld: 1.0e-3, top1: 0.5}}\n",
        encoding="utf-8",
    )
    return path


def test_a_choice_is_proven_on_other_text_and_goes_on_where_it_stopped(
    tiny_dir: Path, tmp_path: Path, gate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[str] = []
    asked: dict[str, Any] = {
        "types": ["Q8_0", "Q2_K"],
        "n_ctx": 64,
        "threads": 1,
        "corpora": None,
        "tell": lambda stage, done, total: stages.append(stage),
    }

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "inputs" or stage == "oracle":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # inside the proof: everything before it is kept
        choose(tiny_dir, tmp_path, Limits(max_kld=0.2, policy=gate), **{**asked, "tell": stop})
    monkeypatch.setattr("pipeline.choose.choose.rung", lambda *_: pytest.fail("a weight error was reckoned twice"))
    choice = choose(tiny_dir, tmp_path, Limits(max_kld=0.2, policy=gate), **asked)
    assert "checkpoint" not in stages
    assert not {"Q2_K"} & set(stages)
    assert choice.report is not None
    assert choice.chosen == "Q8_0", choice.report.summary
    ranked = (tmp_path / "text" / "0-rank.txt").read_text(encoding="utf-8")
    proven = [a for a in choice.report.artefacts if a.role == "corpus"]
    assert proven
    assert all("prove" in a.path for a in proven)
    assert ranked not in (tmp_path / "text" / "0-prove.txt").read_text(encoding="utf-8")
    assert frontier(choice) == {"Q8_0", "Q2_K"}
    write_choice(choice, tmp_path)
    record = json.loads((tmp_path / "choose.json").read_text(encoding="utf-8"))
    assert (record["chosen"], record["tried"]) == ("Q8_0", ["Q8_0"])
    assert (tmp_path / "choose.svg").read_text(encoding="utf-8").startswith("<")
    assert "proven on text that did not rank it" in (tmp_path / "choose.md").read_text(encoding="utf-8")


def test_choose_json_is_json_whatever_the_numbers(tmp_path: Path) -> None:
    broken = measured("A", 10, 0.3, float("inf"))
    write_choice(Choice([a_rung("A", 10, 0.3)], [broken], None, None, None, []), tmp_path)
    text = (tmp_path / "choose.json").read_text(encoding="utf-8")
    record = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert record["measured"][0]["macro"]["mean_kld_interval"][1] == "Infinity"


def test_nothing_that_keeps_the_limit_is_no_choice() -> None:
    choice = Choice([a_rung("A", 10, 0.3)], [measured("A", 10, 0.3, 0.5)], None, None, None, [])
    assert answer(choice).startswith("No file keeps the limits")
    assert table(choice)[1][0] == "A"
