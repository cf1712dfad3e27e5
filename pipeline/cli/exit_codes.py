"""Exit codes of every command: 0, 1 and 2 belong to the contract, the others are the shell's codes for a signal.

Only `of_verdict` turns a verdict into a code, so that no verdict but a pass ends with 0.
"""

from __future__ import annotations

PASSED = 0  # passed, or done
NOT_RELEASED = 1  # fail, inconclusive or incomplete: the report says which
BAD_INPUT = 2  # or it could not run
READER_GONE = 141  # 128 + SIGPIPE; Windows has no such signal


def of_verdict(verdict: str) -> int:
    """The exit code for a verdict of `verify`, `lint`, `gate` or the self-test."""
    return PASSED if verdict == "pass" else NOT_RELEASED


def of_signal(number: int) -> int:
    """The exit code of a process that ends because of a signal, as shells count it."""
    return 128 + number
