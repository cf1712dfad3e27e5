"""The contract's exit codes: a pass alone is 0, and each of the others is what its reader expects."""

from __future__ import annotations

import signal

import pytest

from pipeline.cli import exit_codes


def test_the_numbers_are_the_contracts() -> None:
    assert (exit_codes.PASSED, exit_codes.NOT_RELEASED, exit_codes.BAD_INPUT, exit_codes.READER_GONE) == (0, 1, 2, 141)


@pytest.mark.parametrize("verdict", ["fail", "inconclusive", "incomplete", "", "PASS", "pass ", "passed", "a pass"])
def test_a_pass_alone_ends_with_0(verdict: str) -> None:
    assert exit_codes.of_verdict(verdict) == 1
    assert exit_codes.of_verdict("pass") == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, 137)])
def test_a_signal_gives_the_code_that_a_shell_gives(number: int, code: int) -> None:
    assert exit_codes.of_signal(number) == code
