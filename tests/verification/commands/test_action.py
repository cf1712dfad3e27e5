"""action.yml: its steps run as GitHub runs them, pass on what they are given, and end by the verdict."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
STEPS = {step["name"]: step for step in ACTION["runs"]["steps"]}
RECORD = f"""#!{sys.executable}
import json, os, sys
with open("calls", "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
sys.exit(int(os.environ.get("CODE", "0")))
"""


def expand(text: str, inputs: dict[str, str]) -> str:
    """The expressions that the action uses, as GitHub evaluates them."""

    def value(match: re.Match[str]) -> str:
        for part in match[1].split("||"):
            name = part.strip()
            found = str(ROOT) if name == "github.action_path" else inputs[name.removeprefix("inputs.")]
            if found:
                return found
        return ""

    return re.sub(r"\$\{\{(.*?)\}\}", value, text)


def run(name: str, folder: Path, given: dict[str, str], **more: str) -> tuple[int, dict[str, str], str]:
    """A step of the action: (exit code, outputs, what it printed)."""
    inputs = {key: str(entry.get("default", "")) for key, entry in ACTION["inputs"].items()} | given
    step = STEPS[name]
    assert "${{" not in step["run"]  # an input inside the script would be executed
    output = folder / "output"
    output.touch()
    env = {key: expand(text, inputs) for key, text in step["env"].items()}
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "GITHUB_OUTPUT": str(output), **env, **more},
        capture_output=True,
        text=True,
    )
    outputs = dict(line.split("=", 1) for line in output.read_text().splitlines())
    return done.returncode, outputs, done.stdout + done.stderr


def program(folder: Path, name: str, text: str = RECORD) -> None:
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / name).write_text(text, encoding="utf-8")
    (folder / "bin" / name).chmod(0o755)


def called(folder: Path) -> list[list[str]]:
    import json

    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_the_step_ends_by_the_verdict_and_names_the_report(code: int, tmp_path: Path) -> None:
    program(tmp_path, "so8t")
    given = {"reference": "model", "candidates": "a.gguf", "out": "my report"}
    ended, outputs, _ = run("verify", tmp_path, given, CODE=str(code))
    assert (ended, outputs) == (code, {"exit-code": str(code), "report": "my report"})
    assert called(tmp_path) == [
        ["so8t", "verify", "--reference", "model", "--out", "my report", "--quiet", "--candidate", "a.gguf"]
    ]


def test_every_input_arrives_as_it_was_given_and_nothing_in_it_runs(tmp_path: Path) -> None:
    program(tmp_path, "so8t")
    for name in ("one Q8_0.gguf", "two.gguf"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).touch()
    evil = '"; touch pwned; $(touch pwned) `touch pwned` ${HOME}'
    given = {
        "reference": evil,
        "candidates": f"out/*.gguf\n\n  \nme/model:Q4_K_M\n{evil}\n",
        "policy": evil,
        "base": "me/base",
        "arguments": "--cells=full\n--chunks\n4\n",
    }
    assert run("verify", tmp_path, given)[0] == 0
    assert not (tmp_path / "pwned").exists()
    [words] = called(tmp_path)
    assert words[2:] == [
        *("--reference", evil, "--out", "so8t-report", "--quiet", "--policy", evil, "--base", "me/base"),
        *("--candidate", "out/one Q8_0.gguf", "--candidate", "out/two.gguf"),
        *("--candidate", "me/model:Q4_K_M", "--candidate", evil),
        *("--cells=full", "--chunks", "4"),
    ]


@pytest.mark.parametrize(("given", "package"), [("", str(ROOT)), ("so8t==0.1.0", "so8t==0.1.0")])
def test_the_action_installs_itself_or_what_is_asked_for(given: str, package: str, tmp_path: Path) -> None:
    program(tmp_path, "python")
    assert run("install", tmp_path, {"install": given})[0] == 0
    assert called(tmp_path) == [["python", "-m", "pip", "install", package]]


def test_every_input_is_used_and_every_option_exists() -> None:
    import typer

    from pipeline.cli.main import app

    text = (ROOT / "action.yml").read_text(encoding="utf-8")
    for name in ACTION["inputs"]:
        assert f"inputs.{name}" in text, name
    assert set(re.findall(r"inputs\.([\w-]+)", text)) == set(ACTION["inputs"])
    verbs: Any = typer.main.get_command(app)
    known = {option for parameter in verbs.commands["verify"].params for option in parameter.opts}
    assert set(re.findall(r"(?<=[( ])--[\w-]+", STEPS["verify"]["run"])) <= known
    for step in STEPS.values():
        assert ("uses" in step) != ("run" in step)
        assert "run" not in step or step["shell"] == "bash"
        assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step.get("uses", "a/b@v1"))


def test_the_report_is_kept_when_the_gate_is_shut() -> None:
    assert "always()" in STEPS["report"]["if"]
    assert list(STEPS) == ["install", "verify", "report"]
    assert not any(step.get("continue-on-error") for step in STEPS.values())
    for name, output in ACTION["outputs"].items():
        assert output["value"] == f"${{{{ steps.verify.outputs.{name} }}}}"
