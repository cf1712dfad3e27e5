"""The real application on a real socket, in a thread of the test's process, so that its log can be captured."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import uvicorn

from pipeline.serve.audit_log import AuditLog
from pipeline.serve.audit_writer import Recorder
from pipeline.serve.engine import Engine
from pipeline.serve.http import make_app
from pipeline.serve.request import Decider, Limits
from pipeline.serve.start import LOOPBACK_NAMES, bind, uvicorn_config

AUDIT_KEY = b"k" * 32


class RunningServer:
    """Serves until `close`; `ask` speaks raw HTTP and returns every byte that came back."""

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        audit: Path,
        *,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        keys: Mapping[str, str] | None = None,
        operators: frozenset[str] = frozenset(),
        fixed: bool = False,
        wrap: Callable[[Any], Any] = lambda app: app,
    ) -> None:
        self.audit = audit
        listener = bind("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        started = threading.Event()

        async def run() -> None:
            self.engine = make_engine()
            self.log = AuditLog(audit)
            recorder = Recorder(self.log)
            self.decider = Decider(self.engine, recorder, AUDIT_KEY, limits)
            if fixed:
                self.decider.clock, self.decider.new_id = (lambda: 1.5), (lambda: "chatcmpl-fixed")
            app = wrap(make_app(self.decider, keys=keys, operators=operators, hosts=LOOPBACK_NAMES))
            self.server = uvicorn.Server(uvicorn_config(app))
            started.set()
            await self.server.serve(sockets=[listener])
            await self.engine.close()
            await recorder.close()

        self._thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
        self._thread.start()
        started.wait()
        while not self.server.started:
            time.sleep(0.005)

    def close(self) -> None:
        self.server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def raw(self, data: bytes) -> bytes:
        """Every byte the server sends back to these bytes, until it closes."""
        with self.connect() as connection:
            connection.sendall(data)
            return read_all(connection)

    def ask(self, *, headers: str = "", **fields: Any) -> bytes:
        """The raw response to one chat request."""
        fields.setdefault("messages", [{"role": "user", "content": "what is it?"}])
        return self.raw(request(fields, headers))

    def get(self, path: str, *, headers: str = "", method: str = "GET") -> bytes:
        """The raw response to a request without a body."""
        return self.raw(f"{method} {path} HTTP/1.1\r\nhost: localhost\r\n{headers}connection: close\r\n\r\n".encode())

    def records(self) -> list[dict[str, Any]]:
        """The audit log's decisions."""
        lines = [json.loads(line) for line in self.audit.read_bytes().splitlines()]
        return [line for line in lines if line["event"] == "request"]

    def wait_for(self, condition: Callable[[], bool], seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not come about"
            time.sleep(0.01)


def request(fields: Any, headers: str = "", path: str = "/v1/chat/completions") -> bytes:
    body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
        f"content-length: {len(body)}\r\n{headers}\r\n"
    )
    return head.encode() + body


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def status(response: bytes) -> int:
    return int(response.split(b" ", 2)[1])


def body(response: bytes) -> Any:
    return json.loads(response.split(b"\r\n\r\n", 1)[1])


def error(response: bytes) -> dict[str, Any]:
    """OpenAI's error object, checked for its form; of a stream, the one in its event."""
    data = response.split(b"\r\n\r\n", 1)[1]
    if b"text/event-stream" in response.split(b"\r\n\r\n", 1)[0]:
        lines = [line for line in data.replace(b"\r\n", b"\n").split(b"\n") if line.startswith(b"data: ")]
        *signs, data = [line.removeprefix(b"data: ") for line in lines]
        assert all(not any(json.loads(sign)["choices"][0]["delta"].get("content", "")) for sign in signs)
    found = json.loads(data)["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return dict(found)


def answer_of(response: bytes, stream: bool) -> str:
    if not stream:
        return str(body(response)["choices"][0]["message"]["content"])
    payload = response.split(b"\r\n\r\n", 1)[1]
    events = [json.loads(e) for e in re.findall(rb"^data: (\{.*\})\r?$", payload, re.M)]
    assert b"data: [DONE]" in payload
    return "".join(c["delta"].get("content", "") for e in events for c in e["choices"])
