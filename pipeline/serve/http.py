"""HTTP: chat completions, models, health, metrics, the chat page, and OpenAI's error form for everything else.

A stream opens at once with the role and sends keep-alive signs while the model thinks; the whole answer follows once
its verdict is on disk. A client that goes away cancels its generation. No exception leaves this module, because its
message could quote a text. Only operators see why an answer was withheld (`/v1/decisions`), but never the thinking.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from pipeline.serve.engine import Job
from pipeline.serve.keys import who
from pipeline.serve.page import page
from pipeline.serve.protocol import ROLE, ChatRequest, Reply, Ticket, chunks, completion, dumps, event, parse_request
from pipeline.serve.request import Decider
from pipeline.serve.request_error import Refusal, invalid

log = logging.getLogger("so8t.serve")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
# FastAPI 0.165 exports exception messages and stack traces where the environment names a collector.
_NO_TELEMETRY: Any = dict.fromkeys(("tracing", "metrics", "logs", "operation_spans", "auto_configure"), False)
_JSON = {"cache-control": "no-store", "content-type": "application/json"}
DRAINED = 16  # up to so many times the limit is read and dropped, so that the client sees its 413
# OpenAI's addresses that clients try, and why this server does not have them.
_ELSEWHERE = {
    "/v1/completions": "a text completion would be begun by the client, and no thinking could be told from an answer",
    "/v1/responses": "the Responses API is not spoken here",
    "/v1/embeddings": "this server answers chats only",
}
_FAULT = Refusal(500, "server_error", "internal_error", "internal fault; the server's log has its type and place")


def refusal_response(refusal: Refusal) -> Response:
    """OpenAI's error form; for a withheld answer it tells clients not to send the same request again."""
    headers = dict(_JSON)
    if refusal.retry_after is not None:
        headers["retry-after"] = str(refusal.retry_after)
    if refusal.code == "answer_withheld":
        headers["x-should-retry"] = "false"
    if refusal.status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(dumps(refusal.body()), refusal.status, headers)


def _json(value: dict[str, Any], status: int = 200) -> Response:
    return Response(dumps(value), status, _JSON)


class _Decision(Response):
    """A response whose decision is awaited while the client may go away."""

    def __init__(self, decider: Decider, chat: ChatRequest, client: str | None) -> None:
        super().__init__()
        self._decider, self._chat, self._client = decider, chat, client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._decider.admitted(self._client), self._decider.metrics.seconds.time():
                job, prompt_tokens = await self._decider.prepare(self._chat)
                await self._decide(job, prompt_tokens, scope, receive, send)
        except Refusal as refusal:
            await refusal_response(refusal)(scope, receive, send)
        except OSError:
            pass  # the client went away during the response

    async def _decide(self, job: Job, prompt_tokens: int | None, scope: Scope, receive: Receive, send: Send) -> None:
        ticket = self._decider.ticket()
        decision = asyncio.create_task(self._decider.decide(self._chat, job, prompt_tokens, self._client, ticket))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            if self._chat.stream:
                await self._stream(decision, gone, ticket, send)
            elif await self._decided(decision, gone, None):
                await _json(completion(decision.result()))(scope, receive, send)
        finally:
            gone.cancel()
            decision.cancel()
            await asyncio.wait([decision])  # the task records its cancellation
            if not decision.cancelled():
                decision.exception()  # reads it, so that asyncio does not warn

    async def _decided(
        self, decision: asyncio.Task[Reply], gone: asyncio.Task[None], seconds: float | None
    ) -> bool | None:
        """True: decided; False: the client is gone; None: neither within `seconds`."""
        done, _ = await asyncio.wait({decision, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        return True if decision in done else False if gone in done else None

    async def _stream(
        self, decision: asyncio.Task[Reply], gone: asyncio.Task[None], ticket: Ticket, send: Send
    ) -> None:
        limits = self._decider.limits
        alive = event(ticket.chunk({})) if limits.empty_chunks else b": thinking\n\n"
        await send({"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM})
        await send({"type": "http.response.body", "body": event(ticket.chunk(ROLE)), "more_body": True})
        while (state := await self._decided(decision, gone, limits.keep_alive)) is None:
            await send({"type": "http.response.body", "body": alive, "more_body": True})
        if not state:
            return
        try:
            reply = decision.result()
            parts = chunks(reply, include_usage=self._chat.stream_options.include_usage)
            data = b"".join(map(event, parts)) + b"data: [DONE]\n\n"
        except Refusal as refusal:
            data = event(refusal.body())
        await send({"type": "http.response.body", "body": data})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request, limit: int, seconds: float) -> bytes:
    """The body, read no further than its limits.

    Raises:
        Refusal: 413 too large, 408 too slow, 400 broken off (no client reads it, but the log must not show a fault).
    """
    too_large = invalid(f"the body is larger than {limit} bytes", code="body_too_large", status=413)
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or len(declared) > 18 or int(declared) > DRAINED * limit:
        raise too_large
    data, total = bytearray(), 0
    try:
        async with asyncio.timeout(seconds):
            async for piece in request.stream():
                total += len(piece)
                if total > DRAINED * limit:
                    raise too_large
                if total <= limit:
                    data += piece
        if total > limit:  # read to the end first: a client that is still sending would not see the answer
            raise too_large
    except TimeoutError:
        raise invalid(f"the body took longer than {seconds:g} seconds", code="body_too_slow", status=408) from None
    except ClientDisconnect:
        raise invalid("the body broke off", code="body_broken_off", status=400) from None
    return bytes(data)


def make_app(
    decider: Decider,
    *,
    keys: Mapping[str, str] | None = None,
    operators: frozenset[str] = frozenset(),
    hosts: frozenset[str] | None = None,
) -> Sealed:
    """The ASGI application.

    Args:
        keys: {name: SHA-256}; None = no key is needed (loopback only).
        operators: names of keys whose owners may see metrics and the reasons of decisions.
        hosts: allowed names in the Host header; this refuses a web page that rebinds its own name to loopback.
    """
    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        title="so8t serve",
        telemetry=_NO_TELEMETRY,
    )

    def check_host(request: Request) -> None:
        if hosts is not None and _host_name(request.headers.get("host", "")) not in hosts:
            raise Refusal(403, "invalid_request_error", "unknown_host", "this server answers on its own address only")

    def client_of(request: Request) -> str | None:
        check_host(request)
        if keys is None:
            return None
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        name = who(dict(keys), key.strip()) if scheme.lower() == "bearer" else None
        if name is None:
            raise Refusal(401, "authentication_error", "invalid_api_key", "give a valid key: Authorization: Bearer KEY")
        return name

    def check_operator(request: Request) -> None:
        if client_of(request) not in operators:
            way_out = "so8t serve --new-key NAME --operator --keys FILE makes one"
            raise Refusal(403, "permission_error", "operator_only", f"this takes an operator's key; {way_out}")

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        client = client_of(request)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise invalid("the content type must be application/json", code="unsupported_media_type", status=415)
        body = await _body(request, decider.limits.body_bytes, decider.limits.body_seconds)
        return _Decision(decider, parse_request(body), client)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        client_of(request)
        model = {"id": decider.engine.model_id, "object": "model", "created": 0, "owned_by": "so8t"}
        return _json({"object": "list", "data": [model]})

    @app.get("/healthz")
    async def healthz() -> Response:
        failed = decider.recorder.log.failed
        return _json({"status": "audit log unavailable" if failed else "ok"}, 503 if failed else 200)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        check_operator(request) if keys is not None else check_host(request)
        return Response(decider.metrics.text(), 200, {**_JSON, "content-type": decider.metrics.content_type})

    @app.get("/v1/decisions")
    async def decisions(request: Request) -> Response:
        check_operator(request)
        return _json({"object": "list", "data": list(decider.recent)})

    @app.get("/")
    async def chat_page(request: Request) -> Response:
        check_host(request)
        return page()

    async def elsewhere(request: Request) -> Response:
        message = f"{_ELSEWHERE[request.url.path]}; use POST /v1/chat/completions"
        raise Refusal(404, "invalid_request_error", "unsupported_endpoint", message)

    for address in _ELSEWHERE:
        app.add_api_route(address, elsewhere, methods=["GET", "POST"])

    @app.exception_handler(Refusal)
    async def refused(_: Request, refusal: Refusal) -> Response:
        return refusal_response(refusal)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        words = {404: "there is nothing at this address", 405: "this address does not take this method"}
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        message = words.get(error.status_code, "the request cannot be served")
        return refusal_response(Refusal(error.status_code, "invalid_request_error", code, message))

    @app.exception_handler(Exception)  # answered here; Starlette raises it again, and `Sealed` stops it
    async def fault(_: Request, error: Exception) -> Response:
        return refusal_response(_FAULT)

    watch = decider.metrics.watch
    watch("so8t_requests_running", "Requests that generate or wait", lambda: decider.running.total())
    watch("so8t_audit_records", "Records in the audit log", lambda: decider.recorder.log.head.seq + 1)
    watch("so8t_audit_failed", "1 while the audit log cannot be written", lambda: float(decider.recorder.log.failed))
    return Sealed(app, decider.metrics.responded)


def _host_name(host: str) -> str:
    """The Host header without its port."""
    return host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0].lower()


class Sealed:
    """The outermost layer: it keeps exceptions, whose messages could quote a text, out of the server's log."""

    def __init__(self, app: FastAPI, responded: Callable[[int], None] = lambda status: None) -> None:
        self.app, self.responded = app, responded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self.responded(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as error:
            where = error.__traceback__
            while where is not None and where.tb_next is not None:
                where = where.tb_next
            place = f"{where.tb_frame.f_code.co_filename}:{where.tb_lineno}" if where is not None else "?"
            log.error("internal fault: %s at %s", type(error).__name__, place)
            if scope["type"] == "http" and not started:
                await refusal_response(_FAULT)(scope, receive, watched)
