"""Peak memory of one piece of work: in a forked process, above what the process already held.

The fork starts with the parent's imports and data, and with its high-water mark at what is resident then (Linux sets
it anew at a fork), so the difference at the end is the work's own. Call it from a process that has not yet used torch
with more than one thread, nor run a backward: neither survives a fork.
"""

from __future__ import annotations

import gc
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Cost(NamedTuple):
    """What one piece of work took."""

    seconds: float
    megabytes: float
    value: Any


def forked(work: Callable[[], Any]) -> Cost:
    """Run `work` in a fork and measure it; what it returns is pickled.

    Raises:
        RuntimeError: the work failed; its traceback went to stderr.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reading)
            gc.collect()
            gc.freeze()  # what the parent holds and drops is no part of the work
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
            before, start = resident("VmRSS"), time.perf_counter()
            value = work()
            cost = Cost(time.perf_counter() - start, max(resident("VmHWM") - before, 0.1), value)
            with os.fdopen(writing, "wb") as pipe:
                pickle.dump(tuple(cost), pipe)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)  # nothing of the parent's is cleaned up twice
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    if status != 0 or not data:
        raise RuntimeError(f"the forked work ended with status {status}")
    return Cost(*pickle.loads(data))


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process, MB."""
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(field)) * 1024 / 1e6
