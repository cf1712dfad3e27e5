"""The laws of the server's socket can fail: each is run against a server with one planted fault and must catch it."""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Callable
from typing import Any

import pytest
import test_leaks
import test_load
import test_requests
from fake_upstream import FakeUpstream
from running_server import RunningServer

from pipeline.serve import engine_upstream, http, protocol, request
from pipeline.serve.audit_writer import Recorder
from pipeline.serve.guard import Guard, Verdict

InFront = Callable[..., RunningServer]
Plant = Callable[[pytest.MonkeyPatch], None]
close = Guard.close


def shows_everything(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Guard, "close", lambda self, finish: Verdict(self._data.decode("utf-8", "replace"), "released", b""))


def shows_what_was_cut_off(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Guard, "close", lambda self, finish: close(self, "stop"))


def counts_the_thinking(patch: pytest.MonkeyPatch) -> None:
    """Usage over the whole generation, as most servers state it."""
    seen = []
    patch.setattr(Guard, "close", lambda self, finish: seen.append(len(self._data)) or close(self, finish))
    patch.setattr(protocol.Reply, "usage", lambda self: {"completion_tokens": seen[-1]})


def limits_the_whole(patch: pytest.MonkeyPatch) -> None:
    """`max_tokens` on thinking and answer together: an oracle on the thinking's length."""
    patch.setattr(Guard, "close", lambda self, finish: close(self, finish if len(self._data) < 400 else "length"))


def tells_the_reason(patch: pytest.MonkeyPatch) -> None:
    def talkative(self: Guard, finish: str | None) -> Verdict:
        verdict = close(self, finish)
        if verdict.answer is None:
            raise protocol.Refusal(502, "answer_withheld", "answer_withheld", verdict.reason)
        return verdict

    patch.setattr(Guard, "close", talkative)
    patch.setattr(request, "Exception", ZeroDivisionError, raising=False)


def forwards_the_upstreams_words(patch: pytest.MonkeyPatch) -> None:
    def forward(*, busy: bool) -> protocol.Refusal:
        error = sys.exc_info()[1]
        return protocol.Refusal(502, "server_error", "engine_failed", str(getattr(error, "text", error)))

    read = engine_upstream._Reader.take

    def take(self: Any, data: str) -> None:
        try:
            read(self, data)
        except engine_upstream.EngineError as error:
            error.text = data  # type: ignore[attr-defined]
            raise

    patch.setattr(engine_upstream._Reader, "take", take)
    patch.setattr(request, "engine_failed", forward)


def answers_before_the_record(patch: pytest.MonkeyPatch) -> None:
    async def careless(self: Recorder, record: Any) -> None:
        if not self.log.failed:
            try:
                self.log.append([record])
            except Exception:
                return

    patch.setattr(Recorder, "record", careless)


def ignores_unknown_fields(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(protocol.ChatRequest.model_config, "extra", "ignore")
    protocol.ChatRequest.model_rebuild(force=True)


def never_refuses(patch: pytest.MonkeyPatch) -> None:
    original = request.Decider.admitted

    def all_in(self: request.Decider, client: str | None) -> Any:
        self.running.clear()
        return original(self, client)

    patch.setattr(request.Decider, "admitted", all_in)


def stays_when_the_client_goes(patch: pytest.MonkeyPatch) -> None:
    async def deaf(receive: Any) -> None:
        await asyncio.sleep(60)

    patch.setattr(http, "_disconnected", deaf)
    wait_for = RunningServer.wait_for
    patch.setattr(RunningServer, "wait_for", lambda self, condition, seconds=2: wait_for(self, condition, 2))


LEAKS, REQUESTS, LOAD = test_leaks, test_requests, test_load
INTERFERENCE = LEAKS.test_different_thinkings_with_one_answer_give_byte_identical_responses


@pytest.mark.parametrize(
    ("plant", "law", "options"),
    [
        (shows_everything, LEAKS.test_answer_arrives_and_thinking_does_not, {"stream": False}),
        (shows_everything, LEAKS.test_answer_arrives_and_thinking_does_not, {"stream": True}),
        (shows_what_was_cut_off, LEAKS.test_hostile_upstream_gets_nothing_through, {"stream": False}),
        (forwards_the_upstreams_words, LEAKS.test_hostile_upstream_gets_nothing_through, {"stream": False}),
        (counts_the_thinking, INTERFERENCE, {"stream": False}),
        (limits_the_whole, INTERFERENCE, {"stream": True}),
        (limits_the_whole, REQUESTS.test_stop_and_limit_cut_the_answer_only, {}),
        (tells_the_reason, LEAKS.test_reasons_of_withholding_cannot_be_told_apart, {"stream": False}),
        (ignores_unknown_fields, REQUESTS.test_every_other_parameter_is_refused_by_its_name, {}),
        (never_refuses, LOAD.test_full_queue_refuses_politely, {}),
        (stays_when_the_client_goes, LOAD.test_client_that_goes_away_cancels_its_generation, {"stream": False}),
    ],
)
def test_planted_fault_is_caught(
    plant: Plant,
    law: Callable[..., None],
    options: dict[str, Any],
    in_front: InFront,
    upstream: FakeUpstream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    given = {"in_front": in_front, "upstream": upstream, **options}
    try:
        with pytest.raises(AssertionError):
            law(**{name: given[name] for name in inspect.signature(law).parameters})
    finally:
        monkeypatch.undo()
        protocol.ChatRequest.model_rebuild(force=True)


def test_answering_before_the_record_is_caught(
    in_front: InFront, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers_before_the_record(monkeypatch)
    with pytest.raises((AssertionError, KeyError)):
        LOAD.test_nothing_is_answered_while_the_audit_log_cannot_be_written(in_front, upstream, monkeypatch)
