"""Work in a child ends as a program does, and leaves the test's process as it was."""

from __future__ import annotations

import os
import signal
import sys

from forked import forked


def test_a_child_ends_by_return_error_exit_code_or_signal() -> None:
    def killed() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def fails() -> None:
        print("before")
        raise ValueError("mine")

    assert forked(lambda: None).returncode == 0
    assert forked(lambda: sys.exit(3)).returncode == 3
    assert forked(lambda: sys.exit("words")).returncode == 1
    assert forked(killed).returncode == -signal.SIGKILL
    done = forked(fails)
    assert (done.returncode, done.stdout) == (1, "before\n")
    assert done.stderr.endswith("ValueError: mine\n")


def test_what_a_child_changes_is_the_childs() -> None:
    values = [1]
    here = os.getpid()
    done = forked(lambda: (values.append(2), print(values, os.getpid() != here)))
    assert done.stdout == "[1, 2] True\n"
    assert values == [1]
