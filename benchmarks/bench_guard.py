"""The time that the guard adds to a request: `so8t serve` and a bare proxy, each a process, before the same upstream.

The upstream answers at once, so that only the two servers are measured; both use the same web server and client
library. The parts come from the guard's tests (tests/pipeline/serve).
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

SERVE = Path(__file__).parents[1] / "tests" / "pipeline" / "serve"
REQUESTS = 20


@contextmanager
def _server(command: list[str], folder: Path) -> Iterator[int]:
    """Start a server process that prints its address; yields its port."""
    path = os.pathsep.join([str(SERVE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "SO8T_AUDIT_KEY": "6b" * 32}
    with open(folder / "stderr", "ab") as errors:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert " at http://" in line, (folder / "stderr").read_text()
        port = urlsplit(line.split(" at ")[1].split(",")[0]).port
        assert port is not None
        yield port
    finally:
        process.kill()
        process.communicate()


def _ask(port: int, data: bytes) -> None:
    for _ in range(REQUESTS):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(data)
            parts = []
            while part := connection.recv(65536):
                parts.append(part)
        assert parts[0].startswith(b"HTTP/1.1 200 OK"), parts[0][:300]


@pytest.mark.parametrize("characters", [100, 4000])
def bench_guard(figures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, characters: int) -> None:
    """Sequential requests; the thinking has `characters` characters, three in each event of the stream."""
    monkeypatch.syspath_prepend(str(SERVE))
    from fake_upstream import FakeUpstream, generation, text
    from running_server import request

    data = request({"messages": [{"role": "user", "content": "what is it?"}]})
    reply = b"".join(generation(text(steps="a step " * (characters // 7)), size=3))
    with ExitStack() as stack:
        upstream = FakeUpstream()
        stack.callback(upstream.close)
        upstream.keep = False
        upstream.script = lambda _: [reply]
        serve = ["-m", "pipeline.cli.main", "serve", "--port", "0", "--upstream", upstream.url, "--name", "m"]
        commands = {"so8t serve": serve, "bare proxy": [str(SERVE / "bare_proxy.py"), upstream.url]}
        ports = {
            name: stack.enter_context(_server([sys.executable, *words], tmp_path)) for name, words in commands.items()
        }
        figures(
            f"guard, {REQUESTS} requests, {characters} characters of thinking",
            {name: lambda port=port: _ask(port, data) for name, port in ports.items()},
            rounds=15,
            lower_is_better=True,
        )
