"""Laws of what the server tells about itself: metrics without a thinking, reasons for operators, refusals elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_replies import hostile
from fake_upstream import FakeUpstream, generation, no_canary, text
from running_server import RunningServer, body, error, status

from pipeline.serve.keys import load_api_keys, load_operators, new_api_key

InFront = Callable[..., RunningServer]


def sample(response: bytes, name: str) -> float:
    """One value of a response in Prometheus' text form."""
    [value] = re.findall(rf"^{re.escape(name)} (\S+)$".encode(), response, re.M)
    return float(value)


def bearer(key: str) -> str:
    return f"authorization: Bearer {key}\r\n"


def test_metrics_count_and_tell_nothing_of_a_thinking(in_front: InFront, upstream: FakeUpstream) -> None:
    server = in_front()
    server.ask()
    counted = server.get("/metrics")
    assert status(counted) == 200
    assert b"content-type: text/plain" in counted.lower()
    assert sample(counted, 'so8t_decisions_total{verdict="released"}') == 1
    assert sample(counted, 'so8t_decisions_total{verdict="withheld"}') == 0
    assert sample(counted, "so8t_request_seconds_count") == 1
    assert sample(counted, "so8t_audit_records") == 2
    assert sample(counted, "so8t_audit_failed") == 0
    assert sample(counted, "so8t_requests_running") == 0
    for name in ("preamble", "answer copies", "status 500"):
        upstream.script = lambda _, name=name: hostile()[name]
        server.ask()
    server.ask(stream=True)
    counted = server.get("/metrics")
    assert sample(counted, 'so8t_decisions_total{verdict="withheld"}') == 4
    assert sample(counted, 'so8t_responses_total{status="502"}') == 3
    assert sample(counted, 'so8t_responses_total{status="200"}') == 3
    for reason in {record["reason"] for record in server.records()} - {"released"}:
        assert reason.encode() not in counted
    no_canary(counted)


def test_metrics_do_not_grow_with_the_thinking(in_front: InFront, upstream: FakeUpstream) -> None:
    seen = set()
    for steps in ("a", "αβγ " * 2000):
        upstream.script = lambda _, steps=steps: generation(text(steps), size=10_000)
        server = in_front()
        server.ask()
        lines = server.get("/metrics").split(b"\r\n\r\n")[1].splitlines()
        seen.add(b"\n".join(line for line in lines if b"_seconds" not in line and b"_created" not in line))
    assert len(seen) == 1


def test_reasons_are_told_to_operators_only(in_front: InFront, upstream: FakeUpstream, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    boss, user = new_api_key(file, "boss", operator=True), new_api_key(file, "user")
    assert load_operators(file) == {"boss"}
    server = in_front(keys=load_api_keys(file), operators=load_operators(file))
    upstream.script = lambda _: hostile()["answer copies"]
    response = server.ask(headers=bearer(user))
    assert b"copied" not in response
    for path in ("/metrics", "/v1/decisions"):
        assert error(server.get(path))["code"] == "invalid_api_key"
        assert (status(server.get(path, headers=bearer(user))), status(server.get(path, headers=bearer(boss)))) == (
            403,
            200,
        )
    found = body(server.get("/v1/decisions", headers=bearer(boss)))["data"]
    assert [(one["client"], one["verdict"], one["reason"]) for one in found] == [("user", "withheld", "copied run")]
    assert set(found[0]) == {"id", "time", "client", "verdict", "reason"}
    no_canary(json.dumps(found).encode())


def test_without_keys_nobody_is_an_operator(in_front: InFront) -> None:
    response = in_front().get("/v1/decisions")
    assert (status(response), error(response)["code"]) == (403, "operator_only")
    assert "--operator" in error(response)["message"]


def test_only_the_last_decisions_are_kept(in_front: InFront, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.serve import request

    monkeypatch.setattr(request, "REMEMBERED", 3)
    server = in_front()
    for _ in range(5):
        server.ask()
    assert [one["id"] for one in server.decider.recent] == [record["id"] for record in server.records()[:1:-1]]


def test_other_hosts_see_neither_page_nor_metrics(in_front: InFront) -> None:
    server = in_front()
    for path in ("/", "/metrics", "/v1/decisions"):
        response = server.raw(f"GET {path} HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n".encode())
        assert error(response)["code"] == "unknown_host", path


def test_the_page_has_one_source(in_front: InFront) -> None:
    response: Any = in_front().get("/")
    head, _, page = response.partition(b"\r\n\r\n")
    assert status(response) == 200
    [policy] = re.findall(rb"(?im)^content-security-policy: (.*)$", head)
    assert b"default-src 'none'" in policy
    assert b"unsafe" not in policy
    assert page.count(b"http") == 0  # no other address at all
    assert b"innerHTML" not in page
    assert len(page) < 10_000
