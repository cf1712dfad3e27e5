"""Laws under strain: queues, disconnects, slow and silent clients, a full disk; the server stays up."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from fake_upstream import ANSWER, OK, FakeUpstream, chunk, generation, no_canary, text
from running_server import RunningServer, answer_of, error, read_all, request, status

from pipeline.serve.audit_log import verify
from pipeline.serve.request import Limits

InFront = Callable[..., RunningServer]


def test_keys_are_asked_for_and_counted(in_front: InFront, upstream: FakeUpstream, tmp_path: Any) -> None:
    from pipeline.serve.keys import load_api_keys, new_api_key

    key, other = new_api_key(tmp_path / "keys", "alice"), new_api_key(tmp_path / "keys", "bob")
    server = in_front(keys=load_api_keys(tmp_path / "keys"), limits=Limits(per_key=1, in_flight=2))
    for header in ("", "authorization: Bearer x\r\n", f"authorization: Basic {key}\r\n", f"x-api-key: {key}\r\n"):
        response = server.ask(headers=header)
        assert (status(response), error(response)["code"]) == (401, "invalid_api_key")
    assert upstream.requests == []
    upstream.script = lambda _: [OK, 1.0, *generation(text())[1:]]
    first = threading.Thread(target=server.ask, kwargs={"headers": f"authorization: Bearer {key}\r\n"})
    first.start()
    server.wait_for(lambda: upstream.running == 1)
    response = server.ask(headers=f"authorization: bearer {key}\r\n")
    assert (status(response), error(response)["code"]) == (429, "too_many_requests")
    assert b"retry-after: 5" in response
    assert status(server.ask(headers=f"authorization: Bearer {other}\r\n")) == 200
    first.join()
    assert [record["client"] for record in server.records()] in (["alice", "bob"], ["bob", "alice"])
    for secret in (key, other):
        assert secret.encode() not in server.audit.read_bytes()


def test_full_queue_refuses_politely(in_front: InFront, upstream: FakeUpstream) -> None:
    server = in_front(limits=Limits(in_flight=2))
    upstream.script = lambda _: [OK, 0.5, *generation(text())[1:]]
    responses: list[bytes] = []
    threads = [threading.Thread(target=lambda: responses.append(server.ask())) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    codes = sorted(map(status, responses))
    assert codes[:2] == [200, 200]
    assert set(codes) == {200, 503}
    refused = next(r for r in responses if status(r) == 503)
    assert error(refused)["code"] == "queue_full"
    assert b"retry-after: 5\r\n" in refused
    assert status(server.ask()) == 200


def test_nothing_is_answered_while_the_audit_log_cannot_be_written(
    in_front: InFront, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    server = in_front()
    real = os.fdatasync

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fdatasync", full)
    for stream in (False, True):
        response = server.ask(stream=stream)
        assert error(response)["code"] == "audit_unavailable"
        assert ANSWER.encode() not in response
        no_canary(response)
    assert len(upstream.requests) == 1  # the second was refused before any work
    health = server.raw(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    assert status(health) == 503
    monkeypatch.setattr(os, "fdatasync", real)
    assert status(server.ask()) == 200
    verify(server.audit)


def test_late_upstreams_get_504(in_front: InFront, upstream: FakeUpstream) -> None:
    server = in_front(limits=Limits(seconds=0.3))
    upstream.script = lambda _: [OK, chunk(text()), *([b": still here\n\n", 0.05] * 1000)]  # never ends
    response = server.ask()
    assert (status(response), error(response)["code"]) == (504, "timeout")
    assert server.records()[-1]["reason"] == "timeout"
    server.wait_for(lambda: upstream.running == 0)  # cancelled upstream as well


def test_stream_carries_comments_while_the_model_thinks(in_front: InFront, upstream: FakeUpstream) -> None:
    server = in_front(limits=Limits(keep_alive=0.05))
    thought = threading.Event()
    upstream.script = lambda _: [OK, thought, *generation(text())[1:]]
    with server.connect() as connection:
        connection.sendall(request({"messages": [{"role": "user", "content": "q"}], "stream": True}))
        response = b""
        while response.count(b": thinking\n\n") < 3:
            response += connection.recv(65536)
        thought.set()
        response += read_all(connection)
    assert answer_of(response, True) == ANSWER
    no_canary(response)


def lines(response: bytes) -> list[bytes]:
    """The lines of a stream's body that are not empty, without the framing of its transport."""
    found = [line for line in response.split(b"\r\n\r\n", 1)[1].replace(b"\r\n", b"\n").split(b"\n") if line]
    return [line for line in found if not re.fullmatch(rb"[0-9a-f]+", line)]


def test_a_strict_parser_lives_with_empty_chunks(in_front: InFront, upstream: FakeUpstream) -> None:
    """CASES F1: a client that takes every line for JSON, and one that gives up without a chunk for 0.2 seconds."""
    server = in_front(limits=Limits(keep_alive=0.05, empty_chunks=True), fixed=True)
    seen = set()
    for steps in ("a", "αβγ" * 3000):
        upstream.script = lambda _, steps=steps: [OK, 0.4, *generation(text(steps))[1:]]
        response = server.ask(stream=True)
        *events, end = [line.removeprefix(b"data: ") for line in lines(response)]
        first, *waiting, answer, finish = [json.loads(event)["choices"][0] for event in events]
        assert end == b"[DONE]"
        assert first["delta"] == {"role": "assistant", "content": ""}
        assert len(waiting) >= 3
        assert all(sign == {"index": 0, "delta": {}, "finish_reason": None} for sign in waiting)
        assert (answer["delta"], finish["finish_reason"]) == ({"content": ANSWER}, "stop")
        seen |= set(events)
    assert len(seen) == 4  # whatever the thinking, the same events


def test_the_role_is_sent_at_once_and_says_nothing(in_front: InFront, upstream: FakeUpstream) -> None:
    server = in_front()
    thought = threading.Event()
    upstream.script = lambda _: [OK, thought, *generation(text())[1:]]
    with server.connect() as connection:
        connection.sendall(request({"messages": [{"role": "user", "content": "q"}], "stream": True}))
        first = b""
        while b'"role":"assistant"' not in first:
            first += connection.recv(65536)
        assert not server.records()  # no verdict yet
        thought.set()
        assert answer_of(first + read_all(connection), True) == ANSWER


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_goes_away_cancels_its_generation(in_front: InFront, upstream: FakeUpstream, stream: bool) -> None:
    server = in_front(limits=Limits(in_flight=1))
    upstream.script = lambda _: [OK, chunk(text()), *([0.05] * 400)]
    with server.connect() as connection:
        connection.sendall(request({"messages": [{"role": "user", "content": "q"}], "stream": stream}))
        server.wait_for(lambda: upstream.running == 1)
    server.wait_for(lambda: upstream.running == 0)
    server.wait_for(lambda: len(server.records()) == 1)
    assert (server.records()[0]["verdict"], server.records()[0]["reason"]) == ("withheld", "cancelled")
    upstream.script = lambda _: generation(text())
    server.wait_for(lambda: not server.decider.running)
    assert status(server.ask()) == 200  # its place is free again


def test_unreachable_upstream_is_503(in_front: InFront, upstream: FakeUpstream) -> None:
    server = in_front()
    server.engine._url = "http://127.0.0.1:1/v1/chat/completions"  # type: ignore[attr-defined]
    response = server.ask()
    assert (status(response), error(response)["code"]) == (503, "engine_busy")


def test_an_upstream_that_accepts_no_connection_is_503(in_front: InFront) -> None:
    import httpx

    server = in_front()
    with socket.create_server(("127.0.0.1", 0), backlog=0) as deaf:
        waiting = []  # they fill the queue of a listener that accepts nobody
        for _ in range(4):
            waiting.append(socket.socket())
            waiting[-1].setblocking(False)
            waiting[-1].connect_ex(deaf.getsockname())
        server.engine._url = f"http://127.0.0.1:{deaf.getsockname()[1]}/v1"  # type: ignore[attr-defined]
        server.engine._client.timeout = httpx.Timeout(None, connect=0.3)  # type: ignore[attr-defined]
        response = server.ask()
        for connection in waiting:
            connection.close()
    assert (status(response), error(response)["code"]) == (503, "engine_busy")


def test_busy_upstream_is_503_with_a_time_to_wait(in_front: InFront, upstream: FakeUpstream) -> None:
    server = in_front()
    for line in (b"429 Slow down", b"503 Busy"):
        upstream.script = lambda _, line=line: [b"HTTP/1.1 " + line + b"\r\ncontent-length: 0\r\n\r\n"]
        response = server.ask()
        assert (status(response), error(response)["code"]) == (503, "engine_busy")
        assert b"retry-after: 5\r\n" in response


def test_slow_and_silent_connections_hinder_nobody(in_front: InFront, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.serve import start as module

    monkeypatch.setattr(module, "HEADER_SECONDS", 0.3)
    server = in_front()
    silent = [server.connect() for _ in range(100)]
    for connection in silent[:50]:
        connection.sendall(b"POST /v1/chat/comp")
    assert status(server.ask()) == 200
    for connection in silent:
        assert connection.recv(100) in (b"",)  # closed by the server
        connection.close()
    assert status(server.raw(b"GET / HTTP/1.1\r\nhost: x\r\nx-fill: " + b"x" * 40_000)) == 400  # an endless header
    assert status(server.ask()) == 200


def test_half_a_second_header_is_not_waited_for(in_front: InFront, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.serve import start as module

    monkeypatch.setattr(module, "HEADER_SECONDS", 0.5)
    server = in_front()
    get = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with server.connect() as connection:
        connection.settimeout(10)
        for _ in range(3):  # whole requests within the time keep the connection
            connection.sendall(get)
            response = b""
            while not response.endswith(b'{"status":"ok"}'):
                response += connection.recv(65536)
            time.sleep(0.2)

        def trickle() -> None:
            for _ in range(40):
                connection.sendall(b"G")
                time.sleep(0.05)

        with pytest.raises(ConnectionError):  # bytes that trickle in do not put the end off
            trickle()
    assert status(server.ask()) == 200


def test_body_that_breaks_off_is_no_fault_of_the_server(in_front: InFront, caplog: pytest.LogCaptureFixture) -> None:
    server = in_front()
    whole = request({"messages": [{"role": "user", "content": "q"}]})
    for _ in range(20):
        with server.connect() as connection:
            connection.sendall(whole[:-5])
    assert status(server.ask()) == 200
    time.sleep(0.1)
    assert not [record for record in caplog.records if record.name == "so8t.serve"]


def test_long_generations_are_judged_beside_the_loop(
    in_front: InFront, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.serve.guard import Guard

    real, judging, answered = Guard.close, threading.Event(), threading.Event()

    def slow(self: Guard, finish: str | None) -> Any:
        judging.set()
        assert answered.wait(60), "the loop stood still"
        return real(self, finish)

    monkeypatch.setattr(Guard, "close", slow)
    server = in_front()
    upstream.script = lambda _: generation(text(steps="z" * 20_000), size=5_000)
    asking = threading.Thread(target=server.ask)
    asking.start()
    judging.wait(20)
    server.raw(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    answered.set()
    asking.join()
    assert server.records()[-1]["verdict"] == "released"


def test_reader_that_never_reads_hinders_nobody(in_front: InFront, upstream: FakeUpstream) -> None:
    upstream.script = lambda _: generation(text(answer="long " * 20_000), size=5000)
    server = in_front()
    idle = server.connect()
    idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    idle.sendall(request({"messages": [{"role": "user", "content": "q"}]}))
    server.wait_for(lambda: len(server.records()) == 1)
    assert status(server.ask()) == 200
    idle.close()
    assert status(server.ask()) == 200


def test_no_exporter_of_exceptions_is_armed(in_front: InFront) -> None:
    """FastAPI's own telemetry would send exception messages to a collector named in the environment."""
    found: list[Any] = []
    in_front(wrap=lambda app: found.append(app) or app)
    telemetry = getattr(found[0].app, "_native_telemetry", None)
    assert telemetry is None or not telemetry.enabled()
