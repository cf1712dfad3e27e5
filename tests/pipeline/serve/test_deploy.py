"""The deployment files: valid for the programs that read them, and with options that the command has."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
import yaml
from fake_upstream import ANSWER, FakeUpstream

from pipeline.cli import main as cli
from pipeline.serve.keys import new_api_key

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


# Options of llama-server that its own README names (ggml-org/llama.cpp, tools/server/README.md, read 2026-11).
DOCUMENTED = {"--model", "--host", "--port", "--jinja", "--reasoning-format", "--no-slots"}


def test_the_engine_gets_documented_options_alone() -> None:
    command = compose()["services"]["engine"]["command"]
    assert {word for word in command if word.startswith("--")} <= DOCUMENTED
    assert command[command.index("--reasoning-format") + 1] in ("none", "deepseek", "deepseek-legacy", "auto")


def test_ports_addresses_and_health_checks_are_of_one_mind() -> None:
    engine, guard = (compose()["services"][name] for name in ("engine", "guard"))
    ports = {name: one["command"][one["command"].index("--port") + 1] for name, one in (("e", engine), ("g", guard))}
    upstream = guard["command"][guard["command"].index("--upstream") + 1]
    assert upstream == f"http://engine:{ports['e']}"
    assert f":{ports['e']}/health" in engine["healthcheck"]["test"][-1]
    assert f":{ports['g']}/healthz" in guard["healthcheck"]["test"][-1]
    assert [port.rsplit(":", 1)[1] for port in guard["ports"]] == [ports["g"]]
    assert guard["depends_on"] == {"engine": {"condition": "service_healthy"}}
    mounted = {volume.split(":")[1] for volume in guard["volumes"]} | {
        f"/run/secrets/{name}" for name in guard["secrets"]
    }
    for path in (word for word in guard["command"] if word.startswith("/")):
        assert any(path.startswith(place) for place in mounted), path


@contextmanager
def running(command: list[str], folder: Path, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A command of the files with its places moved here; (process, address) once it serves."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://[\d.]+:(\d+)/v1", line)
        assert found, line + (process.communicate()[1] if process.poll() is not None else "")
        yield process, f"http://127.0.0.1:{found[1]}"
    finally:
        process.kill()
        process.communicate()


ASKED = {"messages": [{"role": "user", "content": "what is it?"}]}


def moved(words: list[str], places: dict[str, str]) -> list[str]:
    """The words of a command with parts of them replaced."""
    for old, new in places.items():
        words = [word.replace(old, new) for word in words]
    return words


def test_the_units_command_runs_answers_and_stops(tmp_path: Path, upstream: FakeUpstream) -> None:
    """As systemd would start it: its credential in a directory of its own, its state in another, SIGTERM to stop."""
    (tmp_path / "audit.key").write_text("k" * 64)
    (tmp_path / "audit.key").chmod(0o400)
    places = {
        "http://127.0.0.1:8081": upstream.url,
        "${CREDENTIALS_DIRECTORY}": str(tmp_path),
        "/var/lib/so8t": str(tmp_path),
    }
    so8t = [sys.executable, "-m", "pipeline.cli.main", "serve"]
    with running([*so8t, *moved(commands()["systemd"], places), "--port", "0"], tmp_path) as (process, url):
        reply = httpx.post(f"{url}/v1/chat/completions", json=ASKED, timeout=60)
        assert reply.json()["choices"][0]["message"]["content"] == ANSWER
        assert httpx.get(f"{url}/healthz", timeout=60).status_code == 200
        process.send_signal(getattr(signal, re.findall(r"^KillSignal=(\w+)$", unit(), re.MULTILINE)[0]))
        assert process.wait(int(re.findall(r"^TimeoutStopSec=(\d+)$", unit(), re.MULTILINE)[0])) == 0
    assert (tmp_path / "audit.jsonl").read_text().count('"event":"request"') == 1


def test_the_guards_command_and_its_health_check_run(tmp_path: Path, upstream: FakeUpstream, tiny_gguf: Path) -> None:
    guard = compose()["services"]["guard"]
    (tmp_path / "audit_key").write_text("k" * 64)
    (tmp_path / "audit_key").chmod(0o400)
    key = new_api_key(tmp_path / "api_keys", "alice")
    places = {
        "http://engine:8081": upstream.url,
        "/run/secrets": str(tmp_path),
        "/var/lib/so8t": str(tmp_path),
        "/models/model.gguf": str(tiny_gguf),
        "8080": "0",
    }
    so8t = [sys.executable, "-m", "pipeline.cli.main", "serve"]
    with running([*so8t, *moved(guard["command"], places)], tmp_path) as (process, url):
        check = [word.replace("http://127.0.0.1:8080", url) for word in guard["healthcheck"]["test"][1:]]
        assert subprocess.run([sys.executable, *check[1:]], timeout=60).returncode == 0
        bearer = {"authorization": f"Bearer {key}"}
        reply = httpx.post(f"{url}/v1/chat/completions", json=ASKED, headers=bearer, timeout=60)
        assert reply.json()["choices"][0]["message"]["content"] == ANSWER
        assert reply.json()["usage"]["completion_tokens"] > 0
        process.terminate()
        assert process.wait(20) == 0
        assert subprocess.run([sys.executable, *check[1:]], timeout=60, stderr=subprocess.DEVNULL).returncode != 0


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
