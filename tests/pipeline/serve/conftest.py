"""A fake upstream and the real server in front of it; every test's log is searched."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_upstream import FakeUpstream, no_canary
from running_server import RunningServer

from pipeline.serve.engine import Engine
from pipeline.serve.engine_upstream import UpstreamEngine
from pipeline.serve.forms.form import Form
from pipeline.serve.forms.registry import SO8T
from pipeline.serve.tokens import Tokens


@pytest.fixture(autouse=True)
def every_log_line(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No test here may log a canary, at any level, by any library."""
    caplog.set_level(logging.DEBUG)
    yield
    lines = [record.getMessage() + str(record.exc_info) + str(record.__dict__) for record in caplog.records]
    no_canary("\n".join(lines).encode())


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    fake = FakeUpstream()
    yield fake
    fake.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., RunningServer]]:
    """Start a server; all are stopped at the end."""
    running: list[RunningServer] = []

    def one(engine: Callable[[], Engine], **options: Any) -> RunningServer:
        running.append(RunningServer(engine, tmp_path / f"audit{len(running)}.jsonl", **options))
        return running[-1]

    yield one
    for server in running:
        server.close()


@pytest.fixture
def in_front(upstream: FakeUpstream, start: Callable[..., RunningServer]) -> Callable[..., RunningServer]:
    """Start a server in front of the fake upstream."""

    def one(*, tokens: Tokens | None = None, form: Form = SO8T, **options: Any) -> RunningServer:
        def make() -> Engine:
            return UpstreamEngine(upstream.url, model_id="m", n_ctx=4096, max_new_tokens=512, tokens=tokens, form=form)

        return start(make, **options)

    return one
