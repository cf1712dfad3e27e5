"""Requests to end (ctrl-C, SIGTERM, SIGHUP) of one command: work stops, and the exit code is 128 + the signal's number.

While `raises` is True, a handler raises `Stopped` at every request; otherwise requests are only counted. A signal
that the caller ignores (`nohup`) stays ignored. Handlers can be set in the main thread only; other threads set none.
Python drops an exception that is raised in a destructor or in a function that C code calls: the handler then raises
again a moment later.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from verification.commands.interruption import stop_signals

_AGAIN = 0.1  # seconds until a dropped exception is raised again


class Stopped(KeyboardInterrupt):
    """A request to end.

    It is a separate class because of `exec(text)`, where dataclasses compile their methods: when a plain
    KeyboardInterrupt leaves it, CPython ends the process as if by SIGINT, and `python -m` ignores every exit code.
    """


class StopRequests:
    """Context manager that receives the requests to end."""

    def __init__(self) -> None:
        self.asked: list[int] = []  # signals so far; Python may have dropped an exception
        self.raises = False
        self._before: dict[int, Any] = {}
        self._hook: Callable[[sys.UnraisableHookArgs], object] | None = None

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for number in stop_signals():
                found = signal.getsignal(number)
                if found in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = found
                    signal.signal(number, self._stop)
            self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.raises = False
        if self._hook is not None:
            sys.unraisablehook = self._hook
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        """Raise `Stopped` from now on, and at once if a request has come already."""
        self.raises = True
        if self.asked:
            raise Stopped

    def ignore(self) -> None:
        """Ignore further requests until the process ends: its exit code is decided and it cleans up."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)
        self._before.clear()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.asked.append(number)
        if self.raises:
            raise Stopped

    def _unraisable(self, what: sys.UnraisableHookArgs) -> None:
        if isinstance(what.exc_value, Stopped):
            again = threading.Timer(_AGAIN, os.kill, (os.getpid(), self.asked[-1]))
            again.daemon = True
            again.start()
        elif self._hook is not None:
            self._hook(what)


def is_program(main: object) -> bool:
    """Whether this process was started to run `main` and ends with it, as `so8t` and `python -m` do."""
    return getattr(sys.modules.get("__main__"), "main", None) is main
