"""Laws of a verification's stages: their order, what they complete, and that information never costs a report."""

from __future__ import annotations

import inspect
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_ladder import LOOSE, SMALL, statuses, values
from verification_models import Family

from so8t_core.errors import InputError
from verification import VerifyRequest, verify
from verification.commands import pytest_plugin
from verification.commands.stage import Run, Stage, carry_out, check_order
from verification.commands.stages import ORACLE_LABEL, stages
from verification.gate import decide as gate
from verification.gate.policy import make_policy
from verification.gate.report import Artefact, Report
from verification.gate.statement import check_statement
from verification.show.write import load_report, write_report

FAILURES = (
    KeyError("weight"),
    MemoryError(),
    OSError(28, "No space left on device"),
    RuntimeError("the model has no head"),
    torch.OutOfMemoryError("CUDA out of memory"),
    InputError("bitsandbytes is not installed"),
)


def run_of(request: VerifyRequest, labels: tuple[str, ...] = ("F16",)) -> Run:
    """A run whose stages can be listed; nothing in it can be measured."""
    files: Any = [SimpleNamespace(label=label, file=SimpleNamespace(is_float=label == "F16")) for label in labels]
    nothing: Any = None
    base = None if request.base is None else Path(request.base)
    return Run(request, make_policy({}), [], files, nothing, Path(), 1, lambda *_: None, base=base)


REQUESTS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({}, ("F16",)),
    ({}, ("Q8_0",)),
    ({"base": "base"}, ("F16", "Q8_0")),
    ({"base": "base", "adapter": "adapter", "base_damage": False}, ("Q4_K_M",)),
    ({"base": "base", "adapter": "adapter", "quantization": "8bit"}, ("F16", "Q8_0", "Q4_K_M")),
]


@pytest.mark.parametrize(("options", "labels"), REQUESTS)
def test_every_product_is_made_before_it_is_needed(options: dict[str, Any], labels: tuple[str, ...]) -> None:
    check_order(stages(run_of(VerifyRequest("reference", labels, **options), labels)))


@pytest.mark.parametrize(("options", "labels"), REQUESTS)
def test_the_stages_complete_what_the_gate_calls_for(options: dict[str, Any], labels: tuple[str, ...]) -> None:
    """The oracle's own file and a base without an adapter are measured beside that."""
    listed = stages(run_of(VerifyRequest("reference", labels, **options), labels))
    completed = {(name, stage.subject) for stage in listed for name in stage.checks if stage.subject != ORACLE_LABEL}
    roles: list[tuple[Any, str]] = [("reference", ""), *(("candidate", label) for label in labels)]
    roles += [(role, "") for role in ("base", "adapter") if role in options]
    inputs = [Artefact(role=role, path=label, sha256="0" * 64, bytes=0, label=label) for role, label in roles]
    empty: dict[str, Any] = {"legs": [], "policy": {}, "versions": {}, "durations": {}}
    report = Report(verdict="incomplete", summary="", created="", artefacts=inputs, **empty)
    wanted = set(gate._called_for(report))
    more = {("dtype.mean_kld", "")} if "adapter" in options else set()
    quants = [label for label in labels if label != "F16"]
    more |= {("quantise.output_error", "")} if quants else set()  # where a tensor's weights do not decide
    more |= {("quantise.kld_ratio", label) for label in quants}  # where tensors are judged
    more |= {("controls.differs_from_base", "")} if "base" in options else set()
    assert completed | more == wanted | more


def test_an_order_that_cannot_be_carried_out_is_seen() -> None:
    def nothing(run: Run) -> None: ...

    late = [Stage("first", nothing, needs=("text",)), Stage("second", nothing, yields=("text",))]
    with pytest.raises(AssertionError, match="first needs text, which no earlier stage yields"):
        check_order(late)
    vague = [Stage("plots", nothing, yields=("text",), informs=True), Stage("verdict", nothing, needs=("text",))]
    with pytest.raises(AssertionError, match="verdict decides on what plots informs of"):
        check_order(vague)


def failing(error: BaseException) -> Callable[..., Any]:
    def work(*arguments: Any, **more: Any) -> None:
        raise error

    return work


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_stage_that_informs_may_fail_in_any_way(error: Exception) -> None:
    done = []
    run = run_of(VerifyRequest("reference", ["F16"]))
    informing = Stage("noise floor", failing(error), yields=("plan",), checks=("evidence.repeat",), informs=True)
    after = Stage("more noise", failing(AssertionError), needs=("plan",), informs=True)
    carry_out([informing, after, Stage("evidence", lambda run: done.append(1))], run)
    assert done == [1]
    assert run.notes[0].startswith(f"Not evaluated: noise floor: {type(error).__name__}")
    assert " ".join(str(error).split()) in run.notes[0]
    assert run.notes[1] == "Not evaluated: more noise: InputError: plan was not made"
    [check] = run.checks["evidence"]
    assert (check.name, check.status, check.detail) == ("evidence.repeat", "not evaluated", run.notes[0])
    assert run.left == []


@pytest.mark.parametrize("informs", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), RuntimeError("no head")], ids=repr)
def test_a_stop_passes_through_and_so_does_a_failure_of_what_decides(error: BaseException, informs: bool) -> None:
    run = run_of(VerifyRequest("reference", ["F16"]))
    listed = [
        Stage("text", lambda run: setattr(run, "bos", 1), yields=("bos",)),
        Stage("logits F16", failing(error), needs=("bos",), checks=("convert.top1", "cells.mid.top1"), informs=informs),
        Stage("evidence", failing(AssertionError), checks=("evidence.chunks",), informs=True),
    ]
    if informs and isinstance(error, Exception):
        carry_out(listed, run)
        return
    with pytest.raises(type(error)):
        carry_out(listed, run)
    assert [stage.legs for stage in run.left] == [["convert", "cells"], ["evidence"]]
    assert not run.has("bos")


def test_a_product_is_released_after_the_last_stage_that_needs_it() -> None:
    held: dict[str, bool] = {}

    def look(name: str) -> Callable[[Run], None]:
        return lambda run: held.update({name: run.has("baked")})

    listed = [
        Stage("bake", lambda run: setattr(run, "baked", object()), yields=("baked",)),
        Stage("first", look("first"), needs=("baked",)),
        Stage("between", look("between")),
        Stage("last", look("last"), needs=("baked",)),
        Stage("after", look("after")),
    ]
    carry_out(listed, run_of(VerifyRequest("reference", ["F16"])))
    assert held == {"first": True, "between": True, "last": True, "after": False}


def test_every_road_has_the_requests_parameters_and_defaults() -> None:
    """`verify`, the command line and the pytest plugin."""
    from pipeline.cli import main

    asked = inspect.signature(VerifyRequest).parameters
    assert list(asked.values()) == list(inspect.signature(verify).parameters.values())
    options: dict[str, Any] = {}
    group = SimpleNamespace(addoption=lambda name, **more: options.update({name: more.get("default")}))
    pytest_plugin.pytest_addoption(SimpleNamespace(getgroup=lambda *_: group))  # type: ignore[arg-type]
    command = {name: parameter.default for name, parameter in inspect.signature(main.verify).parameters.items()}
    for name in ("chunks", "n_ctx", "cells"):
        assert options[f"--so8t-{name.replace('_', '-')}"] == asked[name].default == command[name]
    for name in ("base", "adapter", "policy", "imatrix", "threads", "ship_n_ctx"):
        assert options[f"--so8t-{name.replace('_', '-')}"] is asked[name].default is command[name] is None


def test_every_parameter_is_explained() -> None:
    assert all(f"\n    {name}: " in str(inspect.getdoc(verify)) for name in inspect.signature(verify).parameters)


INFORMING = {
    "commands.stages.base_damage_of": MemoryError(),
    "commands.stages.trained_function": KeyError("weight"),
    "show.write.to_html": torch.OutOfMemoryError("no memory for plots"),
    "show.write.to_markdown": OSError(28, "No space left on device"),
    "show.write.junit_xml": RuntimeError("not well-formed"),
}


def test_every_information_can_fail_and_the_verdict_and_its_report_stand(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for where, error in INFORMING.items():
        monkeypatch.setattr(f"verification.{where}", failing(error))
    options: dict[str, Any] = {**SMALL, "base_damage": True, "quantization": "8bit"}
    report = verify(
        family.reference,
        [family.files["F16"]],
        base=family.base,
        adapter=family.adapter,
        out=tmp_path,
        work_dir=family.work,
        policy=make_policy(LOOSE),
        **options,
    )
    assert report.verdict == "pass", report.summary
    stored = load_report(tmp_path)
    assert (stored.verdict, stored.notes) == (report.verdict, report.notes)
    check_statement(stored, tmp_path / "report.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.intoto.json", "report.json"]
    named = ("base damage", "trained function", "report.html", "report.md", "junit.xml")
    for name, error in zip(named, INFORMING.values(), strict=True):
        [note] = [note for note in report.notes if note.startswith(f"Not evaluated: {name}: {type(error).__name__}")]
        assert str(error) in note


def test_a_noise_floor_that_fails_leaves_the_report_without_a_pass(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate asks for it: without it nothing is released, and everything else that was measured is there."""
    monkeypatch.setattr("verification.commands.stages.noise_floor", failing(RuntimeError("llama_decode")))
    options: dict[str, Any] = dict(SMALL)
    files, policy = [family.files["F16"]], make_policy(LOOSE)
    report = verify(family.reference, files, out=tmp_path, work_dir=family.work, policy=policy, **options)
    assert load_report(tmp_path).verdict == report.verdict == "incomplete"
    found = values(report)
    for name in ("evidence.repeat", "evidence.noise_floor"):
        assert found[name, ""].status == "not evaluated"
        assert found[name, ""].detail == "Not evaluated: noise floor: RuntimeError: llama_decode"
    assert found["evidence.positions", ""].status == "pass"
    assert {leg for leg, status in statuses(report).items() if status != "pass"} == {"evidence"}


def test_no_page_of_an_earlier_report_stays_beside_one_that_could_not_be_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sample_report import sample_report

    write_report(sample_report("pass"), tmp_path)
    monkeypatch.setattr("verification.show.write.to_html", failing(ValueError("a plot of nothing")))
    written = write_report(sample_report("fail"), tmp_path)
    assert not (tmp_path / "report.html").exists()
    assert set(written) == {"json", "statement", "md", "junit"}
    assert "Not evaluated: report.html: ValueError: a plot of nothing" in load_report(tmp_path).notes
    check_statement(load_report(tmp_path), written["json"])


def test_what_the_first_process_cannot_do_is_raised_in_all_of_them() -> None:
    """Instead of a wait for ever: the others would wait for what the first one never sends."""
    code = (
        "from verification.engines import distributed\n"
        "class Odd(Exception):\n    def __reduce__(self): raise TypeError\n"
        "for make in (lambda: 1 // 0, lambda: (_ for _ in ()).throw(Odd('odd'))):\n"
        "    try: distributed.from_first(make)\n"
        "    except Exception as error: print(type(error).__name__, error, flush=True)\n"
        "print(distributed.from_first(lambda: 'together'))\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], env={**shared, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[0].splitlines() for process in processes]
    zero = "ZeroDivisionError integer division or modulo by zero"
    assert said == [[zero, "Odd odd", "together"], [zero, "RuntimeError Odd: odd", "together"]]
