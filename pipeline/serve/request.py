"""One request from admission to a decision on disk: engine, guard, audit log, then the limits of the answer.

The verdict on the whole generation is recorded before anything is returned. `stop` and `max_tokens` cut only the
released answer, so that they reveal nothing about the thinking.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from pipeline.serve.audit_log import Unavailable, bucket, thinking_hmac
from pipeline.serve.audit_writer import Recorder
from pipeline.serve.engine import Engine, EngineError, Job
from pipeline.serve.guard import COPY_RUN, Guard, TooLong, Verdict
from pipeline.serve.history import conversation
from pipeline.serve.metrics import Metrics
from pipeline.serve.protocol import ChatRequest, Reply, Ticket, cut_at_stops
from pipeline.serve.request_error import Refusal

RETRY_AFTER = 5  # seconds
REMEMBERED = 50  # last decisions that an operator can see
LONG = (
    16 * 1024
)  # bytes; a longer generation is judged outside the event loop (0.2 s at the full 256 KiB, 4 s at worst)


@dataclass(frozen=True)
class Limits:
    """The limits of one server."""

    body_bytes: int = 256 * 1024
    body_seconds: float = 10.0  # to send a request's body
    in_flight: int = 9  # requests that generate or wait for their turn
    per_key: int = 4  # the same for each API key
    seconds: float = 300.0  # for one request, with its time in the queue
    keep_alive: float = 10.0  # seconds between two keep-alive signs on a stream
    copy_run: int = COPY_RUN  # an answer may not share so many characters in a row with its thinking
    empty_chunks: bool = False  # keep-alive signs are chunks without a text; otherwise comments


def withheld() -> Refusal:
    """The refusal for a withheld answer, the same for every reason; only the audit log has the reason."""
    return Refusal(502, "answer_withheld", "answer_withheld", "the model's reply was not in a form that may be shown")


def unaudited() -> Refusal:
    """The refusal while the audit log cannot be written."""
    return Refusal(
        503,
        "server_error",
        "audit_unavailable",
        "the audit log cannot be written, so nothing is answered",
        retry_after=RETRY_AFTER,
    )


@dataclass
class Decider:
    """The parts that serve a request; tests replace `clock` and `new_id`."""

    engine: Engine
    recorder: Recorder
    audit_key: bytes = field(repr=False)
    limits: Limits = Limits()
    clock: Callable[[], float] = time.time
    new_id: Callable[[], str] = lambda: f"chatcmpl-{secrets.token_hex(12)}"
    running: Counter[str | None] = field(default_factory=Counter)
    metrics: Metrics = field(default_factory=Metrics)
    recent: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=REMEMBERED), repr=False)
    judging: Executor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="judge"), repr=False)

    @contextmanager
    def admitted(self, client: str | None) -> Iterator[None]:
        """Hold a place in the queue; a full queue refuses at once.

        Raises:
            Refusal: 429 the key has too many running requests, 503 the server has too many.
        """
        if client is not None and self.running[client] >= self.limits.per_key:
            message = f"this key has {self.limits.per_key} requests running; wait for one of them"
            raise Refusal(429, "rate_limit_error", "too_many_requests", message, retry_after=RETRY_AFTER)
        if self.running.total() >= self.limits.in_flight:
            raise Refusal(503, "server_error", "queue_full", "the queue is full; try again", retry_after=RETRY_AFTER)
        self.running[client] += 1
        try:
            yield
        finally:
            self.running[client] -= 1
            if not self.running[client]:
                del self.running[client]

    async def prepare(self, chat: ChatRequest) -> tuple[Job, int | None]:
        """The engine's job and the prompt's tokens, after every check that needs no generation.

        Raises:
            Refusal: 404 another model, 422 wrong messages or limits, 503 the audit log cannot be written.
        """
        if chat.model not in (None, self.engine.model_id):
            message = f"there is no such model here; this server has `{self.engine.model_id}`"
            raise Refusal(404, "invalid_request_error", "model_not_found", message, param="model")
        messages = conversation(chat.messages, instructs=self.engine.form.instructs)
        if chat.limit is not None:
            try:
                self.engine.cut("", chat.limit)  # refuses if no tokenizer can count tokens
            except Refusal as refused:
                refused.param = "max_tokens" if chat.max_tokens is not None else "max_completion_tokens"
                raise
        check = self.engine.check
        prompt_tokens = check(messages) if self.engine.quick else await asyncio.to_thread(check, messages)
        try:
            await self.recorder.ready()
        except Unavailable:
            raise unaudited() from None
        return Job(messages, chat.temperature, chat.top_p, chat.seed), prompt_tokens

    def ticket(self) -> Ticket:
        """The first fields of the response to a request that arrives now."""
        return Ticket(self.new_id(), int(self.clock()), self.engine.model_id)

    async def decide(
        self, chat: ChatRequest, job: Job, prompt_tokens: int | None, client: str | None, ticket: Ticket
    ) -> Reply:
        """Generate, judge, record; the reply holds only the released answer.

        Raises:
            Refusal: 502 withheld or the engine failed, 503 not audited or the engine is busy, 504 too late.
        """
        arrival, guard = self.clock(), Guard(self.engine.form, run=self.limits.copy_run)
        failure: Refusal | None = None
        gone: asyncio.CancelledError | None = None
        try:
            async with asyncio.timeout(self.limits.seconds):
                verdict = await self._judged(guard, await self.engine.generate(job, guard.feed))
            if verdict.answer is None:
                failure = withheld()
        except TooLong:
            verdict, failure = self._failed(guard, "too long"), withheld()
        except EngineError as error:
            verdict, failure = self._failed(guard, error.kind), engine_failed(busy=error.busy)
        except TimeoutError:
            verdict = self._failed(guard, "timeout")
            failure = Refusal(504, "server_error", "timeout", f"no answer within {self.limits.seconds:g} seconds")
        except asyncio.CancelledError as error:
            verdict, gone = self._failed(guard, "cancelled"), error
        except Exception as error:  # its message may quote the generation
            verdict, failure = self._failed(guard, f"fault: {type(error).__name__}"), engine_failed(busy=False)
        record: dict[str, Any] = {
            "event": "request",
            "id": ticket.id,
            "model": self.engine.digest,
            "client": client,
            "time": datetime.fromtimestamp(arrival, UTC).isoformat(timespec="milliseconds"),
            "verdict": "withheld" if verdict.answer is None else "released",
            "reason": verdict.reason,
            "thinking_hmac": thinking_hmac(self.audit_key, verdict.thinking),
            "tokens": {
                "prompt": bucket(prompt_tokens),
                "thinking": bucket(self._count(verdict.thinking)),
                "answer": bucket(self._count((verdict.answer or "").encode())),
            },
        }
        try:
            await self.recorder.record(record)
            self.recent.appendleft({name: record[name] for name in ("id", "time", "client", "verdict", "reason")})
            self.metrics.decided(record["verdict"])
        except Unavailable:
            failure = unaudited()
        if gone is not None:
            raise gone
        if failure is not None or verdict.answer is None:
            raise failure or withheld()
        return self._reply(chat, ticket, verdict.answer, prompt_tokens)

    async def _judged(self, guard: Guard, finish: str | None) -> Verdict:
        if len(guard) <= LONG:
            return guard.close(finish)
        return await asyncio.get_running_loop().run_in_executor(self.judging, guard.close, finish)

    def _failed(self, guard: Guard, reason: str) -> Verdict:
        return Verdict(None, reason, guard.close(None).thinking)

    def _count(self, data: bytes) -> int | None:
        return self.engine.count(data.decode("utf-8", "replace"))

    def _reply(self, chat: ChatRequest, ticket: Ticket, answer: str, prompt_tokens: int | None) -> Reply:
        shown = cut_at_stops(answer, chat.stops)
        cut = shown if chat.limit is None else self.engine.cut(shown, chat.limit)
        tokens = self.engine.count(cut)
        if tokens is not None and chat.limit is not None:
            tokens = min(tokens, chat.limit)  # a cut text may tokenise into one more token
        finish: Literal["stop", "length"] = "stop" if cut == shown else "length"
        return Reply(ticket, cut, finish, prompt_tokens, tokens)


def engine_failed(*, busy: bool) -> Refusal:
    """The refusal after a failure of the engine, without the engine's message."""
    if busy:
        return Refusal(503, "server_error", "engine_busy", "the engine is not available", retry_after=RETRY_AFTER)
    return Refusal(502, "server_error", "engine_failed", "the engine failed")
