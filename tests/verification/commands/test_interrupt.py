"""Ctrl-C: a real SIGINT at the start of every stage, and to the whole process group at any time."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from policy_reports import released
from verification_models import Family

from pipeline.cli.stopping import StopRequests
from verification import decide, verify
from verification.commands.stage import Run
from verification.gate.decide import LEG_TITLES
from verification.gate.stored import REPORT_FILES
from verification.show.write import load_report

# stage: legs that were finished when it began, with base, adapter and one F16 and one Q8_0 file
BAKED = {"contract", "bake", "dtype", "controls"}
STAGES = {
    "oracle": set(),
    "files": set(),
    "reference": {"contract"},
    "bake": {"contract"},
    "saved precision": {"contract", "bake"},
    "F16": BAKED,
    "Q8_0": BAKED,
    "noise floor": BAKED | {"quantise", "cells"},
    "base": BAKED | {"quantise", "cells"},
    "base Q8_0": BAKED | {"quantise", "cells"},
}
QUICK = ("oracle", "files")  # the rest in `tox -e soak`


@pytest.mark.parametrize(
    "stage", [pytest.param(s, id=s.replace(" ", "-"), marks=[] if s in QUICK else [pytest.mark.soak]) for s in STAGES]
)
def test_sigint_in_a_stage_leaves_a_report_without_a_verdict(stage: str, family: Family, tmp_path: Path) -> None:
    def stop(now: str, done: int, total: int) -> None:
        if now == stage:
            os.kill(os.getpid(), signal.SIGINT)

    files = [family.files["F16"], family.files["Q8_0"]]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            verify(
                family.reference,
                files,
                base=family.base,
                adapter=family.adapter,
                work_dir=family.work,
                out=tmp_path,
                chunks=2,
                n_ctx=64,
                threads=1,
                base_damage=True,
                progress=stop,
            )
    finally:
        signal.signal(signal.SIGINT, before)
    stored = load_report(tmp_path)
    assert stored.verdict == decide(stored).verdict != "pass"
    assert "Interrupted: only the legs shown were measured." in stored.notes
    found = {leg.name: leg for leg in stored.legs}
    assert STAGES[stage] <= {name for name, leg in found.items() if leg.status == "pass"}
    open_legs = set(LEG_TITLES) - STAGES[stage]
    assert {leg for leg in open_legs & set(found) if found[leg].status == "pass"} == set()
    assert any(check.detail == "interrupted" for check in found["evidence"].checks)


# what works after the last stage
LATE = {
    "verification.commands.verify.changed_artefacts": "the inputs are hashed again",
    "verification.commands.verify.decide": "the report is decided",
    "verification.show.write.to_json": "its source is written",
    "verification.show.write.to_html": "its page is drawn",
    "verification.show.write.junit_xml": "its last form is drawn",
}


def _finishing(monkeypatch: pytest.MonkeyPatch, family: Family, out: Path) -> None:
    """Verify with measurements that are at hand already: those of a report that passes."""

    def measured(stages: Any, run: Run) -> None:
        found = released()
        run.tensors = found.tensors
        for leg in found.legs:
            run.add(leg.name, leg.checks)

    monkeypatch.setattr("verification.commands.verify.carry_out", measured)
    files = [family.files["F16"], family.files["Q8_0"]]
    verify(family.reference, files, base=family.base, adapter=family.adapter, work_dir=family.work, out=out)


@pytest.mark.parametrize("place", [None, *LATE], ids=["undisturbed", *LATE.values()])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_a_request_to_end_after_the_measuring_keeps_it_and_never_passes(
    place: str | None, number: signal.Signals, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place is not None:
        module, _, name = place.rpartition(".")
        work = getattr(importlib.import_module(module), name)

        def stop(*given: Any) -> Any:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            return work(*given)

        monkeypatch.setattr(place, stop)
    with StopRequests() as requests:
        requests.listen()
        if place is None:
            _finishing(monkeypatch, family, tmp_path)
        else:
            with pytest.raises(KeyboardInterrupt):
                _finishing(monkeypatch, family, tmp_path)
        requests.raises = False
    stored = load_report(tmp_path)
    assert len([check for leg in stored.legs for check in leg.checks if check.status == "pass"]) > 20
    assert stored.verdict == decide(stored).verdict == ("pass" if place is None else "incomplete")
    assert {path.name for path in tmp_path.iterdir()} == set(REPORT_FILES)


@pytest.mark.soak
def test_ctrl_c_at_any_time_of_a_process_leaves_no_pass_and_no_litter(wide_family: Family, tmp_path: Path) -> None:
    """To the whole group, as a terminal sends it: the converter's process gets it too."""
    seen: list[str] = []
    for tick in range(1, 60):
        out, temporary = tmp_path / f"out-{tick}", tmp_path / f"tmp-{tick}"
        temporary.mkdir()
        command = [sys.executable, "-m", "pipeline.cli.main", "verify", "--reference", wide_family.reference]
        command += ["--out", out, "--candidate", wide_family.files["Q8_0"]]
        command += ["--chunks", "2", "--n-ctx", "64", "--threads", "1"]
        process = subprocess.Popen(
            [str(part) for part in command],
            env={**os.environ, "TMPDIR": str(temporary)},
            text=True,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores ctrl-C
        )
        time.sleep(1 + 0.75 * tick)
        finished = process.poll() is not None
        if not finished:
            os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=120)
        # torch makes its compiler's folder as soon as transformers is imported; it stays empty
        assert [p for p in temporary.rglob("*") if not p.name.startswith("torchinductor_")] == [], error
        report: Any = load_report(out) if (out / "report.json").exists() else None
        if process.returncode != 130:
            assert process.returncode in ((0, 1) if finished or report else (-signal.SIGINT,)), error
        elif report is not None:
            assert report.verdict != "pass"
        seen.append("finished" if finished else "report" if report else "nothing yet")
        if finished:
            break
    print(seen)
    assert seen[-1] == "finished"
    assert "report" in seen
