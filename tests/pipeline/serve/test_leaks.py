"""Laws of the server on its socket: against a hostile upstream no byte of thinking leaves, wherever one looks."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from fake_replies import friendly, hostile
from fake_upstream import ANSWER, CANARY, STEPS, FakeUpstream, generation, no_canary, text
from running_server import AUDIT_KEY, RunningServer, answer_of, error, status

from pipeline.data.think_form import ANSWER_MARKER
from pipeline.serve.audit_log import thinking_hmac, verify

InFront = Callable[..., RunningServer]


@pytest.mark.parametrize("stream", [False, True])
def test_answer_arrives_and_thinking_does_not(in_front: InFront, stream: bool) -> None:
    server = in_front()
    response = server.ask(stream=stream, model="m")
    assert status(response) == 200
    assert answer_of(response, stream) == ANSWER
    [record] = server.records()
    assert record["verdict"] == "released"
    assert record["thinking_hmac"] == thinking_hmac(AUDIT_KEY, STEPS.encode())
    no_canary(response, server.audit.read_bytes())
    verify(server.audit)


@pytest.mark.parametrize("stream", [False, True])
def test_hostile_upstream_gets_nothing_through(in_front: InFront, upstream: FakeUpstream, stream: bool) -> None:
    server = in_front()
    for count, (name, script) in enumerate(hostile().items(), start=1):
        upstream.script = lambda _, script=script: script
        response = server.ask(stream=stream)
        assert status(response) == (200 if stream else 502), name
        assert error(response)["code"] in ("answer_withheld", "engine_failed"), name
        assert ANSWER.encode() not in response, name
        assert ANSWER_MARKER.encode() not in response, name
        no_canary(response)
        assert len(server.records()) == count, name
    assert {record["verdict"] for record in server.records()} == {"withheld"}
    no_canary(server.audit.read_bytes())
    verify(server.audit)
    upstream.script = lambda _: generation(text())
    assert answer_of(server.ask(stream=stream), stream) == ANSWER  # it is still up


@pytest.mark.parametrize("stream", [False, True])
def test_different_thinkings_with_one_answer_give_byte_identical_responses(
    in_front: InFront, upstream: FakeUpstream, stream: bool
) -> None:
    server = in_front(fixed=True)
    seen = {}
    for name, script in friendly().items():
        upstream.script = lambda _, script=script: script
        seen[name] = server.ask(stream=stream)
        no_canary(seen[name])
    assert answer_of(seen["plain"], stream) == ANSWER
    assert {name for name, response in seen.items() if response != seen["plain"]} == set()
    upstream.script = lambda _: generation(text(answer="another"))
    assert server.ask(stream=stream) != seen["plain"]


@pytest.mark.parametrize("stream", [False, True])
def test_reasons_of_withholding_cannot_be_told_apart(in_front: InFront, upstream: FakeUpstream, stream: bool) -> None:
    server = in_front(fixed=True)
    seen = set()
    for name in (
        "finish_reason length",
        "preamble",
        "answer copies",
        "think tags",
        "thinking only",
        "replacement character",
    ):
        upstream.script = lambda _, name=name: hostile()[name]
        seen.add(server.ask(stream=stream))
    assert len(seen) == 1
    assert len({record["reason"] for record in server.records()}) == 6 - 1  # two of them miss the same line


def test_canary_tests_can_fail(upstream: FakeUpstream, start: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The control: an engine that puts the text into its exception, behind a server that forwards such messages."""
    from pipeline.serve.engine import EngineError
    from pipeline.serve.engine_upstream import UpstreamEngine

    class Leaky(UpstreamEngine):
        async def generate(self, job: Any, feed: Any) -> str | None:
            raise EngineError(STEPS)  # an upstream's words, where a fixed word belongs

    server = start(lambda: Leaky(upstream.url, model_id="m", n_ctx=4096, max_new_tokens=9))
    response = server.ask()
    no_canary(response)  # the client gets fixed words even so
    with pytest.raises(AssertionError):
        no_canary(server.audit.read_bytes())
    with pytest.raises(AssertionError):
        no_canary(json.dumps({"x": CANARY}).encode())


def test_faults_inside_say_their_type_and_nothing_else(upstream: FakeUpstream, start: Any, caplog: Any) -> None:
    from pipeline.serve.engine_upstream import UpstreamEngine

    class Faulty(UpstreamEngine):
        async def generate(self, job: Any, feed: Any) -> str | None:
            raise ValueError(STEPS)

        def check(self, messages: Any) -> int | None:
            if messages[-1]["content"] == "break":
                raise KeyError(STEPS)
            return None

    server = start(lambda: Faulty(upstream.url, model_id="m", n_ctx=4096, max_new_tokens=9))
    assert error(server.ask())["code"] == "engine_failed"
    assert server.records()[-1]["reason"] == "fault: ValueError"
    response = server.ask(messages=[{"role": "user", "content": "break"}])
    assert (status(response), error(response)["code"]) == (500, "internal_error")
    assert any("KeyError" in record.getMessage() for record in caplog.records)
    no_canary(response, server.audit.read_bytes())
