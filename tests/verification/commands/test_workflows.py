""".github/workflows: valid, in the right order, and every `run:` line does here what it says, or names what exists."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from policy_reports import released

ROOT = Path(__file__).parents[3]
FLOWS: dict[str, Any] = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in (ROOT / ".github" / "workflows").glob("*.yml")
}
ENVIRONMENTS = configparser.ConfigParser()
ENVIRONMENTS.read(ROOT / "tox.ini")


def steps(flow: str) -> list[dict[str, Any]]:
    return [step for job in FLOWS[flow]["jobs"].values() for step in job["steps"]]


def runs(flow: str) -> list[str]:
    """Every shell line, with each value of the matrix in its place."""
    lines = []
    for job in FLOWS[flow]["jobs"].values():
        matrix = job.get("strategy", {}).get("matrix", {})
        for step in job["steps"]:
            texts = [step.get("run", "")]
            for key, values in matrix.items():
                texts = [re.sub(rf"\$\{{\{{ matrix\.{key} \}}\}}", str(v), text) for text in texts for v in values]
            lines += [line for text in dict.fromkeys(texts) for line in text.splitlines() if line.strip()]
    return lines


@pytest.mark.parametrize("flow", ["ci", "release"])
def test_every_job_is_whole(flow: str) -> None:
    found = FLOWS[flow]
    assert True in found, "`on:` (YAML 1.1 reads it as true)"
    assert found["permissions"] == {"contents": "read"}
    for name, job in found["jobs"].items():
        assert job["runs-on"].startswith("ubuntu"), name
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), (name, step)
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step.get("uses", "a/b@v1")), step
        assert job.get("needs", name) in found["jobs"]


@pytest.mark.parametrize("line", sorted({line for flow in FLOWS for line in runs(flow) if line.startswith("tox ")}))
def test_each_tox_environment_exists(line: str) -> None:
    assert f"testenv:{line.split()[3]}" in ENVIRONMENTS.sections(), line
    assert "${{" not in line


def test_ci_covers_tests_lint_types_docs_and_benchmarks_on_every_python() -> None:
    assert {line.split()[3] for line in runs("ci") if line.startswith("tox ")} == {
        "tests",
        "lint",
        "type",
        "docs",
        "bench",
    }
    wanted = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert FLOWS["ci"]["jobs"]["tests"]["strategy"]["matrix"]["python"] == wanted


def shell(so8t: Path, script: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """A step as GitHub runs it: bash with -e and pipefail."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    (programs / "so8t").symlink_to(so8t)
    for name in ("gh", "python"):  # what leaves this machine, or changes it, is written down instead
        (programs / name).write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" >> "{folder}/calls"\n', encoding="utf-8")
        (programs / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), **more}
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def step_named(name: str) -> str:
    [found] = [step["run"] for step in steps("release") if step.get("name") == name]
    return str(found)


CASES = {"pass": {}, "fail": {"convert.mean_kld": 1e-3}, "inconclusive": {"evidence.positions": 10}}


@pytest.mark.parametrize("kind", CASES)
def test_the_gate_opens_for_a_pass_only(kind: str, so8t: Path, tmp_path: Path) -> None:
    from verification import decide
    from verification.show.write import write_report

    measured = released()
    for check in (check for leg in measured.legs for check in leg.checks if check.name in CASES[kind]):
        check.value = CASES[kind][check.name]
        check.interval = check.interval and (check.value, check.value)
    decided = decide(measured)
    assert decided.verdict == kind
    write_report(decided, tmp_path / "runs" / "demo" / "report")
    done = shell(so8t, step_named("gate"), tmp_path)
    assert done.returncode == (0 if kind == "pass" else 1), done.stdout + done.stderr


def test_nothing_is_released_past_the_gate() -> None:
    jobs = FLOWS["release"]["jobs"]
    assert jobs["release"]["needs"] == "gate"
    names = [step.get("name", step.get("run", "")) for step in jobs["gate"]["steps"]]
    assert names.index("the whole road with it") < names.index("gate")
    assert not any(step.get("continue-on-error") or "if" in step for step in jobs["gate"]["steps"] if "run" in step)
    assert "if" not in jobs["release"]
    writers = [name for name, job in jobs.items() if job.get("permissions", {}).get("contents") == "write"]
    assert writers == ["release"]


def test_what_is_installed_is_what_will_be_released(so8t: Path, tmp_path: Path) -> None:
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "so8t-0.1.0-py3-none-any.whl").touch()
    assert shell(so8t, step_named("install what will be released"), tmp_path).returncode == 0
    assert "dist/so8t-0.1.0-py3-none-any.whl[demo]" in (tmp_path / "calls").read_text().splitlines()


def test_the_release_has_files_digests_and_its_report(so8t: Path, tmp_path: Path) -> None:
    for name in (
        "dist/so8t.whl",
        "dist/so8t.tar.gz",
        "report/report.html",
        "report/report.json",
        "report/report.intoto.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    done = shell(so8t, step_named("publish"), tmp_path, GITHUB_REF_NAME="v1", GITHUB_REPOSITORY="a/b")
    assert done.returncode == 0, done.stderr
    named = [call for call in (tmp_path / "calls").read_text().splitlines() if (tmp_path / call).is_file()]
    assert {"dist/so8t.whl", "dist/so8t.tar.gz", "SHA256SUMS", "report/report.json"} <= set(named)
    assert len(named) == 6
    check = ["sha256sum", "-c", "../SHA256SUMS"]
    assert subprocess.run(check, cwd=tmp_path / "dist", capture_output=True, check=False).returncode == 0


def test_every_so8t_line_parses() -> None:
    import typer

    from pipeline.cli.main import app

    verbs: Any = typer.main.get_command(app)
    lines = [line for flow in FLOWS for line in runs(flow) if line.startswith("so8t ")]
    assert len(lines) == 2
    for line in lines:
        _, verb, *arguments = line.split()
        verbs.commands[verb].make_context(verb, arguments)
