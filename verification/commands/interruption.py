"""Requests to end while a verification finishes: the report of what was measured is written before they take effect.

Signal handlers of Python are wrapped, whoever set them; a signal that is ignored, or that ends the process, stays so.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


def stop_signals() -> list[signal.Signals]:
    """The signals that ask a program to end; SIGHUP is not on every system."""
    return [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interruption:
    """Context manager: while `held` is False signals reach their handlers, later they wait until the block has ended.

    `held = True` is an assignment, and CPython runs handlers only at calls and at jumps back. So no signal can come
    between a `try` that ends with it, or an `except` that begins with it, and the assignment.
    """

    def __init__(self) -> None:
        self.held = False
        self.asked = False  # whether a request to end came
        self._waiting: list[int] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
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
