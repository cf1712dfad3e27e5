"""docs/ci.md: every command in it runs and does what it says, on a healthy file and on a broken one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sample_report import sample_report
from test_action import run as run_step
from verification_models import Family, rewrite
from warm_programs import program

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
SHELL: list[str] = re.findall(r"```sh\n(.*?)```", TEXT, re.S)


def recipe() -> list[str]:
    """The commands of the workflow that are ours."""
    jobs = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", TEXT, re.S)[0])["jobs"]
    lines = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    return [line for line in lines if line.startswith("so8t ")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, family: Family, so8t: Path) -> Path:
    folder = tmp_path_factory.mktemp("ci")
    (folder / "checkpoint").symlink_to(family.reference)
    (folder / "f16.gguf").symlink_to(family.files["F16"])
    shutil.copyfile(family.files["Q8_0"], folder / "model-Q8_0.gguf")
    # a random model: its logits depend on every weight alike, so roundings show more than in a trained one
    bounds = "quality: {Q8_0: {mean_kld: 0.5, top1: 0.5}}\nconvert: {mean_kld: 1.0e-3, top1: 0.9}\n"
    bounds += (
        "evidence: {positions: 60, chunks: 2}\ncells: {F16: {mean_kld: 1, top1: 0}, Q8_0: {mean_kld: 2, top1: 0}}\n"
    )
    (folder / "gate.yaml").write_text(bounds, encoding="utf-8")
    programs = folder / "bin"
    programs.mkdir()
    (programs / "so8t").symlink_to(so8t)
    program(programs / "pytest", [sys.executable, "-m", "pytest", "-p", "verification.commands.pytest_plugin"])
    return folder


def run(place: Path, script: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A script of the document as it stands there, on fewer tokens."""
    script = re.sub(r"^so8t verify .*", r"\g<0> --chunks 2 --n-ctx 64 --threads 1", script, flags=re.M)
    script = re.sub(r"^pytest .*", r"\g<0> --so8t-chunks=2 --so8t-n-ctx=64 --so8t-threads=1", script, flags=re.M)
    paths = {"PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    env = {**os.environ, **paths, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **more}
    return subprocess.run(["bash", "-euc", script], cwd=place, env=env, capture_output=True, text=True)


def test_the_recipe_passes_a_healthy_file_and_writes_the_jobs_summary(place: Path) -> None:
    assert len(recipe()) == 1
    done = run(place, recipe()[0], GITHUB_STEP_SUMMARY=str(place / "summary.md"))
    assert done.returncode == 0, done.stdout + done.stderr
    written = (place / "summary.md").read_text(encoding="utf-8")
    assert written.strip() == (place / "report" / "report.md").read_text(encoding="utf-8").strip()


def test_the_action_measures_a_healthy_file(place: Path) -> None:
    """The whole step with the real program; what it passes on, and how it ends otherwise: test_action.py."""
    given = {"reference": "checkpoint", "candidates": "model-*.gguf", "policy": "gate.yaml", "out": "of-the-action"}
    code, outputs, said = run_step("verify", place, {**given, "arguments": "--chunks=2\n--n-ctx=64\n--threads=1"})
    assert (code, outputs) == (0, {"exit-code": "0", "report": "of-the-action"}), said
    assert (place / "of-the-action" / "report.html").is_file()


@pytest.mark.parametrize("number", range(len(SHELL)))
def test_each_command_runs(place: Path, number: int) -> None:
    if "ssh-keygen" in SHELL[number] and shutil.which("ssh-keygen") is None:
        pytest.skip("no ssh-keygen")
    done = run(place, SHELL[number])
    assert done.returncode == 0, done.stdout + done.stderr
    if "pytest" in SHELL[number]:
        assert re.search(r"\d+ passed", done.stdout)
    if "kld" in SHELL[number]:
        assert "Same top p:" in done.stdout


def test_a_signature_does_not_fit_an_edited_statement(place: Path) -> None:
    block = next(block for block in SHELL if "-Y verify" in block)
    statement = place / "report" / "report.intoto.json"
    before = statement.read_bytes()
    statement.write_bytes(before.replace(b'"pass"', b'"fail"'))
    assert run(place, block.splitlines()[-1]).returncode != 0
    statement.write_bytes(before)


def test_the_recipe_shuts_the_gate_on_a_broken_file(place: Path, tmp_path: Path) -> None:
    """o_proj transposed, in a float file of the same name: exit code 1; and the old report no longer fits the file."""
    candidate = place / "model-Q8_0.gguf"
    kept = shutil.copyfile(candidate, tmp_path / "kept.gguf")
    try:
        rewrite(place / "f16.gguf", candidate, tensors={"blk.1.attn_output.weight": np.transpose})
        gate = run(place, "so8t gate report/report.json")
        assert (gate.returncode, "model-Q8_0.gguf changed since" in gate.stderr) == (2, True)
        done = run(place, recipe()[0])
        assert done.returncode == 1, done.stdout + done.stderr
    finally:
        shutil.copyfile(kept, candidate)


def test_the_document_names_what_exists() -> None:
    for name in re.findall(r"`((?:tests|scripts)/[\w./]+)`", TEXT):
        assert (ROOT / name).is_file(), name
    from verification.gate.statement import PREDICATE_TYPE

    assert PREDICATE_TYPE in TEXT


def test_the_summary_is_optional_and_bounded(tmp_path: Path, monkeypatch: Any) -> None:
    from verification.show.github import append_step_summary

    report = sample_report("fail")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    assert append_step_summary(report) is None
    path = tmp_path / "s.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))
    path.write_bytes(b"x" * ((1 << 20) - 300))
    assert append_step_summary(report) == path
    assert path.stat().st_size < 1 << 20
    assert "too long for a step summary" in path.read_text(encoding="utf-8")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))  # a directory: nothing to write to, nothing to fail on
    assert append_step_summary(report) is None
