"""No road to exit code 0 without a printed pass: launch variables, reports that were cut, checks that nobody knows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from policy_reports import healthy, report
from test_attestation import edit, written

from pipeline.cli.main import main
from so8t_core.errors import InputError
from verification import Report, decide
from verification.engines import distributed
from verification.gate.report import Check


def exit_code(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["so8t", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def measured(verdict: str) -> Report:
    return report(*healthy()).model_copy(update={"verdict": verdict})


@pytest.mark.parametrize(
    ("variables", "speaks"),
    [
        ({}, True),
        ({"RANK": "1"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
    ],
)
@pytest.mark.parametrize(("verdict", "code"), [("pass", 0), ("fail", 1), ("inconclusive", 1), ("incomplete", 1)])
def test_every_process_exits_by_the_verdict_and_the_first_one_speaks(
    variables: dict[str, str], speaks: bool, verdict: str, code: int, tmp_path: Path, capfd: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("verification.verify", lambda *a, **k: measured(verdict), raising=False)
    (tmp_path / "m.gguf").touch()
    given = ("verify", "--reference", tmp_path, "--candidate", tmp_path / "m.gguf", "--out", tmp_path / "out", "-q")
    assert exit_code(monkeypatch, *given) == code
    assert ("Report: " in capfd.readouterr().out) == speaks


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK is '-1'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", "RANK": "\u00b2"}, "RANK is"),
    ],
)
def test_launch_variables_that_contradict_are_refused(
    variables: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=named):
        distributed.rank()


def test_a_report_without_a_candidate_is_refused(tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path)
    edit(path, lambda stored: stored.update(artefacts=[a for a in stored["artefacts"] if a["role"] != "candidate"]))
    assert exit_code(monkeypatch, "gate", path, "--no-statement") == 2
    assert "names no candidate file" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["convert.mean_kld2", "bake.looks_right", "nothing.known", "cells"])
def test_a_check_that_nobody_knows_never_passes(name: str) -> None:
    """Not even with a bound of its own: a stored bound is what an edited report says."""
    unknown = Check(name=name, title="", status="pass", value=0, bound=1, relation="<=")
    found = report(*healthy())
    legs = [
        leg.model_copy(update={"checks": [*leg.checks, unknown]}) if leg.name == "convert" else leg
        for leg in found.legs
    ]
    decided = decide(found.model_copy(update={"legs": legs}))
    status = [check.status for leg in decided.legs for check in leg.checks if check.name == name]
    assert status == ["not evaluated"]
    assert decided.verdict == "incomplete"
