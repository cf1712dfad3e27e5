"""Exit codes of every command: 0, 1 and 2 are those of the contract, the others are the shell's for a signal.

A verdict has one way to a code, `of_verdict`, so that nothing but a pass ends with 0.
"""

from __future__ import annotations

import signal

PASSED = 0  # passed, or done
NOT_RELEASED = 1  # fail, inconclusive or incomplete: the report says which
BAD_INPUT = 2  # or it could not run
READER_GONE = 128 + signal.SIGPIPE if hasattr(signal, "SIGPIPE") else 141


def of_verdict(verdict: str) -> int:
    """The code that a verdict of `verify`, `lint`, `gate` or the self-test ends with."""
    return PASSED if verdict == "pass" else NOT_RELEASED


def of_signal(number: int) -> int:
    """The code of a process that ends at a signal's request, as shells count it."""
    return 128 + number
