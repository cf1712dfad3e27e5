"""Run a function in a fork of the test's process: it can be killed like a program, and needs no new imports.

The function must compute with one thread: threads do not survive a fork, and OpenMP would wait for them for ever.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable


class Ended(subprocess.CompletedProcess[str]):
    """The end of a child (`returncode` below 0: the signal), its two streams, and its resources."""

    usage: resource.struct_rusage  # of the child and its own children


def forked(work: Callable[[], object]) -> Ended:
    """Run `work` in a child; `returncode` is 0 if it returned, 1 if it raised, or the code that it exited with."""
    return begin(work)()


def begin(work: Callable[[], object]) -> Callable[[], Ended]:
    """Start a child; the function waits for its end."""
    streams = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - `end` closes them
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for number, stream in enumerate(streams, start=1):
                os.dup2(stream.fileno(), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            work()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def end() -> Ended:
        _, status, usage = os.wait4(child, 0)
        said = []
        for stream in streams:
            with stream:
                stream.seek(0)
                said.append(stream.read().decode("utf-8", "replace"))
        ended = Ended([], os.waitstatus_to_exitcode(status), *said)
        ended.usage = usage
        return ended

    return end
