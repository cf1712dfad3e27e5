"""Start the server: make every check that needs no request, then run uvicorn on one socket until it is stopped.

Loopback needs no API keys; any other address does. The server does not start without a deployment key, or if its audit
log was changed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from pydantic import BaseModel, ConfigDict, Field
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeline.config import ConvertConfig
from pipeline.serve.audit_log import AuditLog
from pipeline.serve.audit_writer import Recorder
from pipeline.serve.counter import Counter
from pipeline.serve.engine import Engine
from pipeline.serve.engine_upstream import UpstreamEngine, check_url, is_loopback
from pipeline.serve.forms.form import Form
from pipeline.serve.forms.registry import SO8T, describe, form_named, form_of_template
from pipeline.serve.guard import COPY_RUN
from pipeline.serve.http import make_app
from pipeline.serve.keys import load_api_keys, load_audit_key, load_operators
from pipeline.serve.request import Decider, Limits
from so8t_core.errors import InputError

UPSTREAM_KEY_VARIABLE = "SO8T_UPSTREAM_KEY"
HEADER_SECONDS = 10.0  # in which a connection must send a request's whole header
BACKLOG = 1024
HEADER_BYTES = 16 * 1024
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


class ServeConfig(BaseModel):
    """The options of `so8t serve`."""

    model_config = ConfigDict(extra="forbid")
    model: Path | None = None
    upstream: str | None = None
    name: str | None = None  # the model's name for clients and upstream; default: the file's name, or so8t
    tokenizer: Path | None = None  # with upstream: a GGUF file or a directory; counts tokens, names the form
    allow_remote_upstream: bool = False
    think_form: str | None = None  # default: the model's, see `pipeline.serve.forms.of_model`
    host: str = "127.0.0.1"
    port: int = Field(8080, ge=0, le=65535)
    keys: Path | None = None
    audit_log: Path = Path("so8t-audit.jsonl")
    audit_key_file: Path | None = None
    n_ctx: int | None = Field(None, ge=256)
    max_new_tokens: int = Field(1024, ge=1)
    queue: int = Field(8, ge=0)
    per_key: int = Field(4, ge=1)
    timeout: float = Field(300.0, gt=0)
    keep_alive: float = Field(10.0, gt=0)
    empty_chunks: bool = False
    copy_run: int = Field(COPY_RUN, ge=COPY_RUN)
    threads: int | None = Field(None, ge=1)


class TimedHeaders(H11Protocol):
    """uvicorn's own protocol, but a connection that does not send its whole header in time is closed.

    The time runs from the connection or the last response, and single bytes do not extend it.
    """

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_header()

    def on_response_complete(self) -> None:
        self._await_header()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _await_header(self) -> None:
        self._stop_waiting()
        self._patience = self.loop.call_later(HEADER_SECONDS, self._close_if_silent, self.cycle)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()

    def _close_if_silent(self, last: object) -> None:
        if self.cycle is last and not self.transport.is_closing():
            self.transport.close()


def make_engine(config: ServeConfig) -> Engine:
    """The engine of the configuration.

    Raises:
        InputError: neither or both of --model and --upstream, or the named file or server cannot be used.
    """
    forced = None if config.think_form is None else form_named(config.think_form)
    if (config.model is None) == (config.upstream is None):
        raise InputError("give either --model FILE.gguf (llama.cpp, here) or --upstream URL (another server)")
    if config.model is not None:
        if config.tokenizer is not None:
            raise InputError("--tokenizer goes with --upstream; a --model has its own")
        if forced is not None and not forced.markers:
            raise InputError(f"--think-form {forced.name} goes with --upstream; a --model separates nothing itself")
        from pipeline.serve.engine_llama import LlamaEngine

        engine = LlamaEngine(
            config.model, n_ctx=config.n_ctx, max_new_tokens=config.max_new_tokens, threads=config.threads, form=forced
        )
        engine.model_id = config.name or engine.model_id
        return engine
    url = check_url(config.upstream or "", allow_remote=config.allow_remote_upstream)
    tokens, form = (None, SO8T) if config.tokenizer is None else read_tokenizer(config.tokenizer)
    return UpstreamEngine(
        url,
        model_id=config.name or "so8t",
        n_ctx=config.n_ctx or ConvertConfig().n_ctx,
        max_new_tokens=config.max_new_tokens,
        tokens=tokens,
        key=os.environ.get(UPSTREAM_KEY_VARIABLE),
        connections=config.queue + 1,
        form=forced or form,
    )


def read_tokenizer(path: Path) -> tuple[Counter, Form]:
    """A model's tokenizer and form of thinking, from a GGUF file or a checkpoint directory; no weights are loaded.

    Raises:
        InputError: the path cannot be used, or the file's key names no form.
    """
    if path.is_dir():
        from pipeline.serve.checkpoint_tokens import CheckpointTokens

        known = CheckpointTokens(path)
        return known, form_of_template(known.chat_template)
    if not path.is_file():
        raise InputError(f"--tokenizer {path} does not exist; give the model's GGUF file or checkpoint directory")
    from pipeline.serve.forms.of_model import form_of_file
    from pipeline.serve.tokens import Tokens
    from verification.gguf.reader import read_gguf

    file, tokens = read_gguf(path), Tokens.load(path)
    return tokens, form_of_file(file, tokens.model.chat_template() or "")


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address.

    Raises:
        InputError: the address does not belong to this machine, or is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise InputError(f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port") from None
    return listener


def uvicorn_config(app: Any) -> uvicorn.Config:
    """uvicorn without access log, Date and Server headers, proxies or WebSockets."""
    return uvicorn.Config(
        app,
        http=TimedHeaders,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=5,
        backlog=BACKLOG,
    )


def serve(config: ServeConfig, *, announce: Callable[[str], None]) -> None:
    """Run until SIGINT or SIGTERM.

    Raises:
        InputError: the server cannot start; the message says why.
    """
    loopback = is_loopback(config.host)
    if not loopback and config.keys is None:
        raise InputError(
            f"--host {config.host} is reachable from other machines, so API keys are needed: "
            "so8t serve --new-key NAME --keys keys.json, then --keys keys.json"
        )
    keys = None if config.keys is None else load_api_keys(config.keys)
    if keys is not None and not keys:
        raise InputError(f"{config.keys} holds no key; make one: so8t serve --new-key NAME --keys {config.keys}")
    operators = frozenset() if config.keys is None else load_operators(config.keys)
    audit_key = load_audit_key(config.audit_key_file)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("uvicorn.error").setLevel(
        logging.ERROR
    )  # it writes a line for each malformed request: anyone could flood it
    listener = bind(config.host, config.port)
    engine = make_engine(config)
    log = AuditLog(config.audit_log, opened={"model": engine.digest})
    hosts = LOOPBACK_NAMES | {config.host} if loopback else None
    limits = Limits(
        in_flight=config.queue + 1,
        per_key=config.per_key,
        seconds=config.timeout,
        keep_alive=config.keep_alive,
        empty_chunks=config.empty_chunks,
        copy_run=config.copy_run,
    )

    async def run() -> None:
        recorder = Recorder(log)
        app = make_app(Decider(engine, recorder, audit_key, limits), keys=keys, operators=operators, hosts=hosts)
        listener.listen(BACKLOG)  # before the announcement, whose reader may connect at once
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        server = uvicorn.Server(uvicorn_config(app))

        def stop(*_: object) -> None:  # until uvicorn sets its handlers, and when it raises the signal again
            server.should_exit = True

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        where = f"{engine.model_id} at http://{shown}:{port}/v1, thinking as {describe(engine.form)}"
        announce(f"{where}, audit log {config.audit_log} at {log.head}")
        try:
            await server.serve(sockets=[listener])
        finally:
            await engine.close()
            await recorder.close()
            announce(f"stopped, audit log {config.audit_log} at {log.head}")

    asyncio.run(run())
