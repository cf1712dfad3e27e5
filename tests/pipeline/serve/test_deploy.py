"""The deployment files: valid for the programs that read them, and with options that the command has."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from pipeline.cli import main as cli

FOLDER = Path(__file__).parents[3] / "deploy"


def compose() -> Any:
    return yaml.safe_load((FOLDER / "docker-compose.yml").read_text(encoding="utf-8"))


def unit() -> str:
    """The systemd unit with continued lines joined."""
    return (FOLDER / "so8t.service").read_text(encoding="utf-8").replace("\\\n", " ")


def commands() -> dict[str, list[str]]:
    [start] = [line for line in unit().splitlines() if line.startswith("ExecStart=")]
    return {"compose": compose()["services"]["guard"]["command"], "systemd": shlex.split(start)[2:]}


@pytest.mark.parametrize("where", ["compose", "systemd"])
def test_the_command_takes_these_options(where: str) -> None:
    serve = typer.main.get_command(cli.app).commands["serve"]  # type: ignore[attr-defined]
    context = serve.make_context("so8t serve", list(commands()[where]))
    assert context.params["upstream"].startswith("http://")
    assert context.params["audit_key_file"] is not None


def test_the_engine_is_reached_by_the_guard_alone() -> None:
    file = compose()
    engine, guard = file["services"]["engine"], file["services"]["guard"]
    assert "ports" not in engine
    assert engine["networks"] == ["inside"]
    assert file["networks"]["inside"] == {"internal": True}
    assert all(port.startswith("127.0.0.1:") for port in guard["ports"])
    assert "--keys" in guard["command"]
    assert set(guard["secrets"]) == set(file["secrets"])


@pytest.mark.skipif(shutil.which("docker") is None, reason="docker is not installed")
def test_docker_compose_accepts_its_file(tmp_path: Path) -> None:
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode != 0:
        pytest.skip("docker has no compose here")
    done = subprocess.run(
        ["docker", "compose", "-f", str(FOLDER / "docker-compose.yml"), "config", "--quiet"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("planted", [False, True])
def test_systemd_accepts_its_unit(tmp_path: Path, planted: bool) -> None:
    """Verified with a program that exists here; a planted fault is found."""
    text = unit().replace("/opt/so8t/bin/so8t", "/bin/true").replace("User=so8t", "User=root")
    if planted:
        text = text.replace("PrivateTmp=yes", "PrivateTmp=maybe").replace("[Service]", "[Service]\nNoSuchKey=1")
    (tmp_path / "so8t.service").write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", str(tmp_path / "so8t.service")], capture_output=True, text=True)
    found = [line for line in done.stderr.splitlines() if "so8t.service" in line]
    assert bool(found) == planted, done.stderr
