"""No road to exit code 0 without a printed pass: launch variables, reports that were cut, checks that nobody knows."""

from __future__ import annotations

import ast
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf_mutations import bpe, llama
from policy_reports import healthy, released, report
from test_attestation import edit, written
from verification_models import Family

from pipeline.cli.main import main
from so8t_core.errors import InputError
from so8t_core.files import sha256_file
from verification import Report, decide, verify
from verification.engines import distributed
from verification.gate.policy import make_policy
from verification.gate.report import Check
from verification.gate.statement import statement_path
from verification.gate.stored import REPORT_FILES
from verification.show.write import load_report, write_report

ROOT = Path(__file__).parents[3]
Json = dict[str, Any]


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
    variables: dict[str, str],
    speaks: bool,
    verdict: str,
    code: int,
    tmp_path: Path,
    capfd: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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


def passed(folder: Path, **changes: Any) -> Path:
    """A whole report that passes, with its statement and a candidate file that is really there."""
    folder.mkdir(parents=True, exist_ok=True)
    candidate = folder / "m.gguf"
    candidate.write_bytes(b"GGUF")
    made = released(str(candidate), sha256_file(candidate), 4)
    write_report(made.model_copy(update=changes), folder)
    return folder / "report.json"


def test_the_report_of_these_tests_passes(tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or everything below would prove nothing."""
    assert exit_code(monkeypatch, "gate", passed(tmp_path)) == 0
    assert "Pass: ready to release" in capfd.readouterr().out


@contextlib.contextmanager
def unusable(name: str, place: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A standard stream that the caller closed, on a full disk, or a pipe whose reader is gone."""
    if place == "gone":
        read, write = os.pipe()
        os.close(read)
        stream: Any = os.fdopen(write, "w")
    else:
        stream = None if place == "closed" else open("/dev/full", "w")  # noqa: SIM115 (it is a standard stream)
    with monkeypatch.context() as patch:
        patch.setattr(sys, name, stream)
        yield
    if stream is not None:
        stream.close()


def good(verb: str, folder: Path) -> tuple[object, ...]:
    """A command line of each verb that answers at once, and whose end would be 0."""
    if verb == "lint":
        return verb, llama(bpe()).write(folder / "f16.gguf")
    given = {"gate": (passed(folder),), "report": (folder,), "lint --explain": ()}
    return *verb.split(), *given.get(verb, ())


@pytest.mark.parametrize("verb", ["gate", "report", "lint", "lint --explain", "report-schema", "doctor"])
@pytest.mark.parametrize("place", ["closed", "full", "gone"])
def test_a_result_that_nobody_can_read_is_no_exit_0(
    place: str, verb: str, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = good(verb, tmp_path)
    with unusable("stdout", place, monkeypatch):
        code = exit_code(monkeypatch, *given)
    assert code == {"closed": 2, "full": 2, "gone": 141}[place]
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert {"closed": "standard output is closed", "full": "No space left", "gone": ""}[place] in said


@pytest.mark.parametrize("place", ["closed", "full", "gone"])
def test_standard_error_that_takes_nothing_changes_no_exit_code(
    place: str, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of a pass that names absent files there, of a refusal, a mistake, nor of a step summary that fails."""
    path = passed(tmp_path)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))
    for given, code in (("gate", path), 0), (("gate", tmp_path / "gone"), 2), (("gaet",), 2):
        with unusable("stderr", place, monkeypatch):
            assert exit_code(monkeypatch, *given) == code
    assert capfd.readouterr().out.count("Pass: ready to release") == 1


def test_the_place_of_a_closed_stream_goes_to_no_other_file(tmp_path: Path) -> None:
    """Or what a C library prints would stand in a report; and the end is 2 before any work is thrown away."""
    words = "import os,sys; from pipeline.cli.main import main; sys.argv = ['so8t', 'report-schema']\n"
    words += "try: main()\nfinally: open(sys.__stderr__.fileno(), 'w').write(os.readlink('/proc/self/fd/1'))"
    done = subprocess.run(["sh", "-c", 'exec "$0" -c "$1" >&-', sys.executable, words], capture_output=True, text=True)
    assert done.returncode == 2
    assert "standard output is closed" in done.stderr
    assert done.stderr.endswith("/dev/null")


def test_memory_that_is_not_enough_is_one_line(tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(*_: object) -> Report:
        raise MemoryError

    monkeypatch.setattr("verification.show.write.load_report", hungry)
    assert exit_code(monkeypatch, "gate", passed(tmp_path)) == 2
    said = capfd.readouterr().err
    assert "memory" in said
    assert len(said.splitlines()) == 1


class Panic(BaseException):
    """As Rust code raises it: no Exception."""


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), Panic("index out of bounds")])
def test_an_error_that_cannot_be_explained_is_2_and_one_line(
    error: BaseException, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no file can be opened, the words for the message cannot be imported: Python's own end would be 1."""

    def fail(*_: object) -> Report:
        raise error

    def unimportable(*_: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("verification.show.write.load_report", fail)
    monkeypatch.setattr("pipeline.cli.main._explained", unimportable)
    assert exit_code(monkeypatch, "gate", passed(tmp_path)) == 2
    said = capfd.readouterr().err
    assert str(error) in said
    assert len(said.splitlines()) == 1


def test_every_verb_says_its_result_by_one_way() -> None:
    """`pipeline.cli.saying` alone writes to standard output; `serve` announces lines while it works."""
    for path in (ROOT / "pipeline" / "cli").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and path.name != "saying.py":
                name, words = ast.unparse(node.func), ast.unparse(node)
                assert name != "print" or "so8t serve: {line}" in words, f"{path.name}: {words}"
                assert name != "Console" or "stderr=True" in words, f"{path.name}: {words}"


def test_an_output_of_another_encoding_takes_the_verdict(
    tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = passed(tmp_path)
    with open(tmp_path / "out.txt", "w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        code = exit_code(monkeypatch, "gate", path)
        monkeypatch.undo()
    assert code == 0
    assert "Pass: ready to release" in (tmp_path / "out.txt").read_text()


def _raise(*_: object) -> str:
    raise RecursionError("too deep")


@pytest.mark.parametrize("kind", ["drawing", "folder", "pipe", "full", "null"])
@pytest.mark.parametrize("verdict", ["pass", "fail"])
def test_a_step_summary_that_fails_changes_no_exit_code_and_hides_no_verdict(
    kind: str, verdict: str, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = passed(tmp_path / "r")
    policy = tmp_path / "gate.yaml"
    policy.write_text("bake: {max_abs_logit: 1.0e-9}\n" if verdict == "fail" else "{}\n", encoding="utf-8")
    os.mkfifo(tmp_path / "pipe")
    places = {"drawing": tmp_path / "s.md", "folder": tmp_path, "pipe": tmp_path / "pipe", "full": Path("/dev/full")}
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(places.get(kind, "x" * 5000)))
    if kind == "drawing":
        monkeypatch.setattr("verification.show.github.to_markdown", _raise)
    assert exit_code(monkeypatch, "gate", path, "--policy", policy) == (0 if verdict == "pass" else 1)
    said = capfd.readouterr()
    assert f"{verdict.capitalize()}: " in said.out
    assert "so8t: no step summary was written" in said.err
    assert "Traceback" not in said.err


def test_which_policy_decided_is_said_and_what_it_lets_pass(
    tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weakened policy inside a report decides, because the report is what is asked; it does not do so unseen."""
    weak = make_policy({"bake": {"max_abs_logit": 2.0e-3}, "waivers": [{"check": "a", "reason": "b"}]})
    path = passed(tmp_path / "r", policy=weak.model_dump(mode="json"))
    assert exit_code(monkeypatch, "gate", path) == 0
    said = capfd.readouterr().out
    assert "Policy: the report's own, sha256 " in said
    assert "weaker than the default: bake.max_abs_logit 0.002 for 0.001, waiver of a" in said
    strict = tmp_path / "strict.yaml"
    strict.write_text("evidence: {positions: 1001}\n", encoding="utf-8")
    assert exit_code(monkeypatch, "gate", path, "--policy", strict) == 0
    said = capfd.readouterr().out
    assert f"Policy: {strict}, sha256 " in said
    assert "nowhere weaker than the default" in said


def stale(monkeypatch: pytest.MonkeyPatch, out: Path, *more: object) -> int:
    """A verification into a directory that holds the pass of an earlier one."""
    passed(out)
    code = exit_code(monkeypatch, "verify", "--out", out, "-q", *more)
    assert [name for name in REPORT_FILES if (out / name).exists()] == []
    assert exit_code(monkeypatch, "gate", out) == 2
    return code


@pytest.mark.parametrize("what", ["reference", "candidate", "policy", "launch", "level", "gguf", "killed"])
def test_an_earlier_pass_does_not_outlive_a_run_that_fails(
    what: str, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stops the new run, before or while it measures: the old report is not there to be taken for its."""
    (tmp_path / "ref").mkdir()
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    given = {"--reference": tmp_path / "ref", "--candidate": tmp_path / "m.gguf"}
    code = 2
    if what in ("reference", "candidate"):
        given[f"--{what}"] = tmp_path / "gone"
    elif what == "policy":
        given["--policy"] = tmp_path / "gone.yaml"
    elif what == "level":
        given["--cells"] = Path("some")
    elif what == "launch":
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "7")
    elif what == "killed":
        code = 130

        def killed(*_: object, **__: object) -> Report:
            raise KeyboardInterrupt

        monkeypatch.setattr("verification.verify", killed, raising=False)
    assert stale(monkeypatch, tmp_path / "out", *[part for pair in given.items() for part in pair]) == code
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "mistake", [("--chunks", "many"), ("--chunks=1",), ("--polcy", "x"), (), ("--self-test", "--reference", "gone")]
)
def test_an_earlier_pass_does_not_outlive_a_mistake_on_the_command_line(
    mistake: tuple[str, ...], tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stale(monkeypatch, tmp_path / "out", *mistake) == 2
    passed(tmp_path / "other")
    assert exit_code(monkeypatch, "verify", f"--out={tmp_path / 'other'}", *mistake) == 2
    assert not (tmp_path / "other" / "report.json").exists()


def test_a_refused_lint_takes_its_earlier_result_away_and_nothing_else(
    tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for mistake in (("--bas", "x"), ("--reference", tmp_path / "gone")):
        passed(tmp_path)
        (tmp_path / "lint.json").write_text("{}")
        assert exit_code(monkeypatch, "lint", tmp_path / "m.gguf", "--out", tmp_path, *mistake) == 2
        assert not (tmp_path / "lint.json").exists()
        assert (tmp_path / "report.json").exists()
    assert exit_code(monkeypatch, "lint", tmp_path / "m.gguf", "--nothing", "--out", tmp_path / "new") == 2
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=["TERM", "HUP", "INT"])
def test_a_signal_in_the_middle_leaves_what_was_measured_and_no_pass(
    number: signal.Signals, family: Family, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*paths: Any, **options: Any) -> Report:
        def stop(stage: str, done: int, total: int) -> None:
            if stage == "files":
                os.kill(os.getpid(), number)

        return verify(*paths, **{**options, "progress": stop, "work_dir": family.work})

    monkeypatch.setattr("verification.verify", measure, raising=False)
    out, before = tmp_path / "out", signal.signal(signal.SIGINT, signal.default_int_handler)
    hangs_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and stays so
    passed(out)
    given = ("verify", "--reference", family.reference, "--candidate", family.files["F16"], "--out", out, "-q")
    try:
        assert exit_code(monkeypatch, *given, "--chunks", 2, "--n-ctx", 64, "--threads", 1) == 128 + number
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGHUP, hangs_up)
    said = capfd.readouterr()
    how = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
    assert said.err.strip().endswith(f"{how}; what was measured is in {out / 'report.html'}")
    assert "Pass" not in said.out
    assert load_report(out).verdict == "incomplete"
    assert exit_code(monkeypatch, "gate", out) == 1
    assert signal.getsignal(number) in (signal.SIG_DFL, before, hangs_up)  # our handlers are gone with the command


def test_a_signal_whose_exception_got_lost_still_ends_without_a_pass(
    tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception inside a callback out of C is printed and forgotten; the request to end is not."""

    def swallow(*_: object, **__: object) -> Report:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            return measured("pass")
        raise AssertionError("the signal did not arrive")

    monkeypatch.setattr("verification.verify", swallow, raising=False)
    (tmp_path / "m.gguf").touch()
    given = ("verify", "--reference", tmp_path, "--candidate", tmp_path / "m.gguf", "--out", tmp_path / "out", "-q")
    assert exit_code(monkeypatch, *given) == 128 + signal.SIGTERM


def test_a_signal_that_the_caller_ignores_stays_ignored(
    tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hung_up(*_: object, **__: object) -> Report:
        signal.raise_signal(signal.SIGHUP)
        return measured("pass")

    monkeypatch.setattr("verification.verify", hung_up, raising=False)
    (tmp_path / "m.gguf").touch()
    given = ("verify", "--reference", tmp_path, "--candidate", tmp_path / "m.gguf", "--out", tmp_path / "out", "-q")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert exit_code(monkeypatch, *given) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


EDITED: dict[str, tuple[Callable[[Json], object], int]] = {
    "two files of one label": (lambda r: r["artefacts"][1].update(label="Q8_0"), 2),
    "a file without a label": (lambda r: r["artefacts"][1].update(label=""), 2),
    "a quant that is labelled a float": (
        lambda r: (r["artefacts"][2].update(label="F16 x"), [c.update(subject="F16 x") for c in of(r, "Q8_0")]),
        1,
    ),
    "a quant whose type says float": (lambda r: r["artefacts"][2].update(type="F16"), 1),
    "a float whose type says quant": (lambda r: r["artefacts"][1].update(type="Q8_0"), 1),
    "a type that nobody knows": (lambda r: r["artefacts"][2].update(type="Q99_Z"), 1),
    "a file without a digest": (lambda r: r["artefacts"][2].update(sha256=""), 2),
    "a digest that is none": (lambda r: r["artefacts"][2].update(sha256="g" * 64), 2),
    "a file that is not what was measured": (lambda r: r["artefacts"][2].update(sha256="0" * 64), 2),
    "another size": (lambda r: r["artefacts"][2].update(bytes=5), 2),
    "the whole disk as the adapter": (lambda r: r["artefacts"][0].update(path="/"), 2),
    "an endless device": (lambda r: r["artefacts"][2].update(path="/dev/zero"), 2),
    "no tensors": (lambda r: r.update(tensors=[]), 1),
    "a tensor of another type": (lambda r: r["tensors"][1].update(actual_type="Q2_K", nominal_type="Q2_K"), 1),
    "true as a value": (lambda r: one(r, "quantise.tensors_differ").update(value=False), 2),
    "true in an interval": (lambda r: one(r, "convert.top1").update(value=1, interval=[True, True]), 2),
    "a text in an interval": (lambda r: one(r, "convert.top1").update(interval=["0.99", "1"]), 2),
    "a text as a value": (lambda r: one(r, "quality.top1").update(value="0.99"), 1),
    "NaN": (lambda r: one(r, "quality.mean_kld").update(value="NaN"), 1),
    "NaN as an interval": (lambda r: one(r, "quality.mean_kld").update(interval=["NaN", "NaN"]), 1),
    "an interval turned round": (lambda r: one(r, "quality.mean_kld").update(interval=[0.012, 0.008]), 1),
    "no interval": (lambda r: one(r, "quality.mean_kld").update(interval=None), 1),
    "a divergence below zero": (lambda r: one(r, "quality.mean_kld").update(value=-1, interval=[-2, 0]), 1),
    "a share above one": (lambda r: one(r, "quality.top1").update(value=2, interval=[1.9, 2.1]), 1),
    "a check twice, once failed": (lambda r: leg(r, "quality").append({**one(r, "quality.top1"), "value": 0.1}), 1),
    "a leg twice, once failed": (
        lambda r: r["legs"].append({**r["legs"][0], "checks": [{**r["legs"][0]["checks"][0], "value": 9.0}]}),
        1,
    ),
    "the saved type's divergence is gone": (lambda r: leg(r, "dtype").remove(one(r, "dtype.mean_kld.bfloat16")), 1),
    "nothing required, and the leg is gone": (
        lambda r: (r["policy"].update(required=[]), r.update(legs=[x for x in r["legs"] if x["name"] != "quality"])),
        1,
    ),
    "nothing required, and every leg is gone": (lambda r: (r["policy"].update(required=[]), r.update(legs=[])), 1),
    "no policy": (lambda r: r.update(policy={}), 0),  # then the default decides
    "a policy of nonsense": (lambda r: r["policy"]["bake"].update(max_abs_logit=True), 2),
    "a policy with an endless number": (lambda r: r["policy"]["bake"].update(max_abs_logit="Infinity"), 2),
    "another verdict": (lambda r: r.update(verdict="fail"), 0),  # what a report says of itself counts for nothing
    "another schema": (lambda r: r.update(schema_version="2.0"), 2),
    "another schema, with escapes": (lambda r: r.update(schema_version="\x1b[31m\n\n7"), 2),
    "an unknown key": (lambda r: r.update(extra=1), 2),
    "a key of escapes": (lambda r: r.update({"\x1b[2J\n\n\n": 1}), 2),
    "a path of escapes": (lambda r: r["artefacts"][2].update(path="\x1b[2J\n\n\n"), 0),
    "a path that no system has": (lambda r: r["artefacts"][2].update(path="\0" + "x" * 9999), 0),
    "a surrogate": (lambda r: r["artefacts"][2].update(path="\ud800"), 0),
}


def leg(report: Json, name: str) -> list[Json]:
    return next(leg["checks"] for leg in report["legs"] if leg["name"] == name)


def one(report: Json, name: str) -> Json:
    return next(check for leg in report["legs"] for check in leg["checks"] if check["name"] == name)


def of(report: Json, subject: str) -> list[Json]:
    return [check for leg in report["legs"] for check in leg["checks"] if check["subject"] == subject]


@pytest.mark.parametrize("what", EDITED)
def test_an_edited_report_without_its_statement_passes_only_by_its_values(
    what: str, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--no-statement` gives the bytes up; what a report has to hold stays."""
    path = passed(tmp_path)
    change, code = EDITED[what]
    edit(path, change)
    assert exit_code(monkeypatch, "gate", path, "--no-statement") == code
    said = capfd.readouterr()
    assert "Traceback" not in said.err
    assert "\x1b" not in said.err
    if code == 2:
        assert len(said.err.strip().splitlines()) <= 2
        assert len(said.err) < 1500
    assert exit_code(monkeypatch, "gate", path) == 2  # with the statement nothing of it is taken


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[" * 100_000, "nested deeper"),
        (b'{"_type": 1, "_type": 2}', "the key '_type' stands twice"),
        (b'{"_type": NaN}', "NaN is not a JSON number"),
        (b"9" * 5000, "more than 64 bits"),
        (b'"' + b"x" * (5 << 20) + b'"', "bytes, at most"),
        (b'{"_type": "' + b"x" * 5000 + b'"}', "no in-toto statement"),
        (b"\xef\xbb\xbf{}", "BOM"),
    ],
    ids=["deep", "twice", "NaN", "number", "size", "type", "BOM"],
)
@pytest.mark.parametrize("which", ["report", "statement"])
def test_a_file_that_no_reader_should_take_is_refused(
    which: str, data: bytes, message: str, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = passed(tmp_path)
    if which == "report":
        data = data if b"x" * 5000 not in data or len(data) > 1 << 20 else b'{"schema_version": "' + b"x" * 5000 + b'"}'
        data = data if len(data) < 1 << 20 else data + b" " * (28 << 20)
    (path if which == "report" else statement_path(path)).write_bytes(data)
    assert exit_code(monkeypatch, "gate", path) == 2
    said = capfd.readouterr()
    assert message in said.err or (which == "report" and "report schema 'xxxx" in said.err)
    assert "Traceback" not in said.err
    assert len(said.err.strip().splitlines()) <= 2
    assert said.out == ""


def test_no_assert_guards_a_verdict() -> None:
    """`python -O` takes them away."""
    rooms = [*(ROOT / "verification" / "gate").glob("*.py"), ROOT / "pipeline" / "cli" / "main.py"]
    rooms += [ROOT / "verification" / "commands" / f"{name}.py" for name in ("verify", "stages", "pytest_plugin")]
    rooms += [ROOT / "verification" / "engines" / "distributed.py"]
    for path in rooms:
        found = [node.lineno for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Assert)]
        assert found == [], path
    assert ast.parse("assert 1").body[0].__class__ is ast.Assert
