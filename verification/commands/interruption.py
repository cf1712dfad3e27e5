"""Ctrl-C and signals while a verification finishes: they wait until the report is written.

Every Python signal handler is wrapped. A signal that the process ignores, or that has no Python handler, is unchanged.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


def stop_signals() -> list[signal.Signals]:
    """The signals that ask a program to end. Some systems have no SIGHUP."""
    return [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interruption:
    """Context manager: while `held` is False signals reach their handlers, later they wait until the block has ended.

    CPython runs signal handlers only at calls and at backward jumps. So no handler runs between the last call of a
    `try` block and a `held = True` at the end of that block, or between the start of an `except` block and a
    `held = True` on its first line.
    """

    def __init__(self) -> None:
        self.held = False
        self.asked = False  # whether a request to end came
        self._waiting: list[int] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # Python sets handlers in the main thread only
            for number in stop_signals():
                handler = signal.getsignal(number)
                if callable(handler) and not isinstance(handler, signal.Handlers):
                    self._before[number] = handler
                    signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.held = True
        for number, handler in self._before.items():
            signal.signal(number, handler)
        for number in self._waiting:
            signal.raise_signal(number)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self.held:
            self._waiting.append(number)
        else:
            self._before[number](number, frame)
