"""One request from admission to a decision that is on disk: engine, guard, audit, then the answer's own limits.

The order is the guarantee: the verdict on the whole generation is recorded before anything is returned, and `stop` and
`max_tokens` cut what was released, so they cannot ask questions about the thinking.
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
REMEMBERED = 50  # decisions that an operator may look at
LONG = (
    16 * 1024
)  # bytes; a longer generation is judged outside the event loop (0.2 s at the full 256 KiB, 4 s at worst)


@dataclass(frozen=True)
class Limits:
    """The limits of one server."""

    body_bytes: int = 256 * 1024
    body_seconds: float = 10.0  # to send a request's body
    in_flight: int = 9  # requests that are generating or waiting for their turn
    per_key: int = 4  # the same for each API key
    seconds: float = 300.0  # for one request, its waiting included
    keep_alive: float = 10.0  # seconds between two signs of life on a stream
    copy_run: int = COPY_RUN  # characters in a row that an answer may not share with its thinking
    empty_chunks: bool = False  # these are chunks without a text; otherwise comments


def withheld() -> Refusal:
    """One error for every reason: which one it was is known to the audit log only."""
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
    """Everything a request needs; `clock` and `new_id` are replaced in tests."""

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
        """A place in the queue; full queues refuse at once instead of growing.

        Raises:
            Refusal: 429 this key has too many requests running, 503 the server has.
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
        """The engine's job and the prompt's tokens; everything a request can be refused for, before any work.

        Raises:
            Refusal: 404 another model, 422 what the messages or limits lack, 503 the audit log cannot be written.
        """
        if chat.model not in (None, self.engine.model_id):
            message = f"there is no such model here; this server has `{self.engine.model_id}`"
            raise Refusal(404, "invalid_request_error", "model_not_found", message, param="model")
        messages = conversation(chat.messages, instructs=self.engine.form.instructs)
        if chat.limit is not None:
            try:
                self.engine.cut("", chat.limit)  # refuses where there is nothing to count tokens with
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
        """Generate, judge, record; the reply holds nothing but the released answer.

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
        except Exception as error:  # whatever its message says may quote the generation
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
            tokens = min(tokens, chat.limit)  # a text cut within a character may tokenise anew, into one more
        finish: Literal["stop", "length"] = "stop" if cut == shown else "length"
        return Reply(ticket, cut, finish, prompt_tokens, tokens)


def engine_failed(*, busy: bool) -> Refusal:
    """The engine's own failure, without its words."""
    if busy:
        return Refusal(503, "server_error", "engine_busy", "the engine is not available", retry_after=RETRY_AFTER)
    return Refusal(502, "server_error", "engine_failed", "the engine failed")
