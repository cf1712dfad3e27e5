"""A report is bound to its statement: every kind of edit of either one is refused, an untouched pair is not."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sample_report import sample_report

from pipeline.cli.main import main
from so8t_core.errors import InputError
from so8t_core.files import sha256_file, write_text
from verification.commands.provenance import versions
from verification.gate.policy import make_policy
from verification.gate.report import Artefact, Report
from verification.gate.statement import check_policy, check_statement, policy_digest, statement_path, write_statement
from verification.show.write import load_report, to_json

Json = dict[str, Any]


def written(folder: Path, **changes: Any) -> Path:
    """A report with a real candidate file beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    candidate = folder / "m.gguf"
    candidate.write_bytes(b"GGUF and so on")
    made = Artefact(role="candidate", path=str(candidate), sha256=sha256_file(candidate), bytes=14, label="F16")
    report = sample_report("pass")
    others = [a for a in report.artefacts if a.role != "candidate"]
    fields = {
        "artefacts": [*others, made],
        "policy": make_policy({}).model_dump(mode="json"),
        "tokens_sha256": "7" * 64,
    }
    report, path = report.model_copy(update={**fields, **changes}), folder / "report.json"
    write_text(path, to_json(report))
    write_statement(report, path)
    return path


def check(path: Path) -> None:
    check_statement(load_report(path), path)


def edit(path: Path, change: Callable[[Json], object]) -> None:
    stored = json.loads(path.read_text(encoding="utf-8"))
    change(stored)
    path.write_text(json.dumps(stored, indent=2), encoding="utf-8")


def test_the_statement_is_in_toto_and_binds_everything(tmp_path: Path) -> None:
    path = written(tmp_path)
    stated = json.loads(statement_path(path).read_text(encoding="utf-8"))
    assert statement_path(path).name == "report.intoto.json"
    assert stated["_type"] == "https://in-toto.io/Statement/v1"
    assert stated["subject"] == [{"name": "m.gguf", "digest": {"sha256": sha256_file(tmp_path / "m.gguf")}}]
    claims = stated["predicate"]
    assert claims["report"]["digest"]["sha256"] == sha256_file(path)
    assert claims["policy"]["digest"]["sha256"] == policy_digest(make_policy({}).model_dump(mode="json"))
    assert claims["tokens"]["digest"]["sha256"] == "7" * 64
    assert {"reference", "candidate"} <= {entry["role"] for entry in claims["inputs"]}
    check(path)


def test_the_versions_name_the_cpus_features() -> None:
    found = versions()["cpu features"]
    assert "torch " in found
    assert "llama.cpp CPU" in found


def one_check(report: Json, **fields: Any) -> None:
    next(c for leg in report["legs"] for c in leg["checks"] if c["name"] == "quality.mean_kld").update(fields)


EDITS: dict[str, Callable[[Json], object]] = {
    "verdict": lambda r: r.update(verdict="fail"),
    "summary": lambda r: r.update(summary="all is well"),
    "a value": lambda r: one_check(r, value=1e-9),
    "a bound": lambda r: one_check(r, bound=9.0),
    "a status": lambda r: one_check(r, status="waived", reason="because"),
    "an interval": lambda r: one_check(r, interval=[0.0, 0.0]),
    "a leg taken away": lambda r: r["legs"].pop(),
    "a check taken away": lambda r: r["legs"][0]["checks"].pop(),
    "the policy": lambda r: r["policy"]["convert"].update(mean_kld=10.0),
    "the candidate's digest": lambda r: r["artefacts"][-1].update(sha256="0" * 64),
    "the reference's digest": lambda r: r["artefacts"][0].update(sha256="0" * 64),
    "the token ids": lambda r: r.update(tokens_sha256="8" * 64),
    "a version": lambda r: r["versions"].update(torch="9"),
    "a divergence": lambda r: r["divergences"][0].update(mean_kld=0.0),
    "a tensor": lambda r: r["tensors"][0].update(bytes_equal_oracle=True, rel_error=0.0),
    "a note": lambda r: r["notes"].append("fine"),
    "only its layout": lambda r: None,
}


@pytest.mark.parametrize("what", EDITS)
def test_an_edited_report_is_refused(tmp_path: Path, what: str) -> None:
    path = written(tmp_path)
    edit(path, EDITS[what])
    with pytest.raises(InputError, match="the report's bytes are not those that were stated"):
        check(path)


STATEMENT_EDITS: dict[str, tuple[Callable[[Json], object], str]] = {
    "subject": (lambda s: s["subject"][0]["digest"].update(sha256="0" * 64), "subjects"),
    "subject taken away": (lambda s: s["subject"].clear(), "subjects"),
    "subject added": (lambda s: s["subject"].append({"name": "x", "digest": {"sha256": "0" * 64}}), "subjects"),
    "verdict": (lambda s: s["predicate"].update(verdict="pass!"), "statement's verdict"),
    "policy": (lambda s: s["predicate"]["policy"]["digest"].update(sha256="0" * 64), "statement's policy"),
    "inputs": (lambda s: s["predicate"]["inputs"].pop(), "statement's inputs"),
    "tokens": (lambda s: s["predicate"].pop("tokens"), "statement's tokens"),
    "versions": (lambda s: s["predicate"]["versions"].update(torch="9"), "statement's versions"),
    "report": (lambda s: s["predicate"]["report"]["digest"].update(sha256="0" * 64), "report's bytes"),
    "predicate": (lambda s: s.pop("predicate"), "report's bytes"),
    "type": (lambda s: s.update(_type="https://in-toto.io/Statement/v0.1"), "no in-toto statement"),
    "predicate type": (lambda s: s.update(predicateType="https://slsa.dev/provenance/v1"), "no in-toto statement"),
    "more": (lambda s: s.update(extra=1), "form"),
}


@pytest.mark.parametrize("what", STATEMENT_EDITS)
def test_an_edited_statement_is_refused(tmp_path: Path, what: str) -> None:
    path = written(tmp_path)
    change, message = STATEMENT_EDITS[what]
    edit(statement_path(path), change)
    with pytest.raises(InputError, match=message):
        check(path)


@pytest.mark.parametrize(
    ("data", "message"), [(b"{", "cannot be read"), (b"\xff\xfe", "cannot be read"), (b"[]", "no in-toto")]
)
def test_a_statement_that_is_none_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = written(tmp_path)
    statement_path(path).write_bytes(data)
    with pytest.raises(InputError, match=message):
        check(path)


def test_another_reports_statement_is_refused(tmp_path: Path) -> None:
    path, other = written(tmp_path / "a"), written(tmp_path / "b", created="2026-11-22T00:00:00+00:00")
    shutil.copyfile(statement_path(other), statement_path(path))
    with pytest.raises(InputError, match="report's bytes"):
        check(path)


def test_the_policys_digest_is_of_its_bounds_not_of_its_text(tmp_path: Path) -> None:
    default, loose = (make_policy(o).model_dump(mode="json") for o in ({}, {"convert": {"mean_kld": 1.0}}))
    assert policy_digest(default) == policy_digest(json.loads(json.dumps(default, indent=8)))
    assert policy_digest(default) != policy_digest(loose)
    report = load_report(written(tmp_path))
    check_policy(report, policy_digest(default))
    with pytest.raises(InputError, match="decided under the policy"):
        check_policy(report, policy_digest(loose))


def so8t(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["so8t", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_gate_exits_2_on_each_kind_of_change(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)  # the report names runs/demo, which is there where the demo ran

    def decided(change: Callable[[Path], object], *options: object) -> tuple[int, str]:
        path = written(tmp_path / "r")
        change(path)
        code = so8t(monkeypatch, "gate", path, *options)
        return code, capsys.readouterr().err

    untouched = decided(lambda path: None)[0]
    assert untouched in (0, 1)  # a verdict, whatever it is
    code, err = decided(lambda path: edit(path, EDITS["a value"]))
    assert (code, "edited or replaced" in err, "Traceback" in err) == (2, True, False)
    code, err = decided(lambda path: statement_path(path).unlink())
    assert (code, "--no-statement" in err) == (2, True)
    assert decided(lambda path: statement_path(path).unlink(), "--no-statement")[0] == untouched
    code, err = decided(lambda path: path.with_name("m.gguf").write_bytes(b"GGUF and so no"))
    assert (code, "m.gguf changed since" in err) == (2, True)
    code, err = decided(lambda path: None, "--policy-sha256", "0" * 64)
    assert (code, "decided under the policy" in err) == (2, True)
    mine = policy_digest(make_policy({}).model_dump(mode="json"))
    assert decided(lambda path: None, "--policy-sha256", mine)[0] == untouched
    assert decided(lambda path: None, "--policy-sha256", mine.upper(), "--no-statement")[0] == untouched
    code, err = decided(lambda path: None, "--policy-sha256", "0" * 64, "--no-statement")
    assert (code, "decided under the policy" in err) == (2, True)


def test_writing_a_report_again_does_not_bless_an_edited_one(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    path = written(tmp_path)
    assert so8t(monkeypatch, "report", tmp_path) in (0, 1)
    check(path)  # written again, with a statement of its own
    edit(path, EDITS["a value"])
    before = statement_path(path).read_bytes()
    assert so8t(monkeypatch, "report", tmp_path) == 2
    assert "edited or replaced" in capsys.readouterr().err
    assert statement_path(path).read_bytes() == before


def test_a_report_without_token_ids_states_none(tmp_path: Path) -> None:
    path = written(tmp_path, tokens_sha256="")
    assert json.loads(statement_path(path).read_text(encoding="utf-8"))["predicate"]["tokens"] is None
    check(path)
    assert Report.model_validate_json(path.read_text(encoding="utf-8")).tokens_sha256 == ""
