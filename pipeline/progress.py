"""The progress of long work: a bar with time left on a terminal, a line every few seconds in a log.

Every step gets the same `Reporter`; a step opens a task, advances it and closes it by leaving the block.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from verification.engines import distributed

LOG_EVERY = 10.0  # seconds between two lines when the output is no terminal


class Advance(Protocol):
    """Move a task forward by `amount`; `info` is a short text beside the bar."""

    def __call__(self, amount: float = 1, info: str = "") -> None: ...


class Reporter:
    """Progress of one command on standard error; none with `quiet`, nor in any process of a launch but the first."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet or not distributed.is_first(), highlight=False)

    def note(self, text: str) -> None:
        """Write one plain line."""
        self.console.print(text, markup=False)

    @contextmanager
    def task(self, title: str, total: float) -> Iterator[Advance]:
        """Show `title` and its progress towards `total` while the block runs."""
        if self.console.is_terminal and not self.console.quiet:
            columns = (
                TextColumn("{task.description:<26}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[info]}", markup=False),
            )
            with Progress(*columns, console=self.console, transient=False) as bars:
                bar = bars.add_task(title, total=total, info="")
                yield lambda amount=1, info="": bars.update(bar, advance=amount, info=info)
            return
        yield _LogTask(self.console, title, total)


class _LogTask:
    def __init__(self, console: Console, title: str, total: float) -> None:
        self._console, self._title, self._total = console, title, total
        self._done = 0.0
        self._started = self._shown = time.monotonic()

    def __call__(self, amount: float = 1, info: str = "") -> None:
        self._done += amount
        now = time.monotonic()
        finished = self._done >= self._total
        if now - self._shown < LOG_EVERY and not finished:
            return
        self._shown = now
        elapsed = now - self._started
        left = elapsed / self._done * (self._total - self._done) if self._done else 0.0
        state = f"{elapsed:.0f} s" if finished else f"{elapsed:.0f} s, about {left:.0f} s left"
        text = f"  {self._title}: {self._done:.0f}/{self._total:.0f} ({state}) {info}".rstrip()
        self._console.print(text, markup=False)


class StageProgress:
    """Turns calls of (stage, done, total) into one bar for each stage; a context manager."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._stack = ExitStack()
        self._stage: str | None = None
        self._advance: Advance | None = None
        self._done = 0

    def __enter__(self) -> StageProgress:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._stack.close()
            self._stage, self._done = stage, 0
            self._advance = self._stack.enter_context(self._reporter.task(stage, total))
        if self._advance is not None and done > self._done:
            self._advance(done - self._done)
            self._done = done
