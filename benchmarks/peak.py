"""Peak memory of one piece of work: in a forked process, above what the process already held.

The fork starts with the parent's imports and data, and with its high-water mark at what is resident then, so the
difference at the end is the work's own. Two things would hide or feign it, and are settled first (`_settle`): a fork
inherits no page of a mapped file (the first step of a training showed 59 MB of libraries' code and nothing else), and
it does inherit heap that the parent has freed, which work can fill without growing. Call it from a process that has not
yet used torch with more than one thread, nor run a backward: neither survives a fork.
"""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

_MADV_POPULATE_READ = 22  # Linux 5.14, linux/mman.h; an older kernel refuses it, and libraries' pages count again


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
            _settle()
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


def _settle() -> None:
    """Give freed heap back to the system, and make every mapped file's pages resident."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)
    for line in Path("/proc/self/maps").read_text().splitlines():
        words = line.split(maxsplit=5)
        if len(words) == 6 and words[5].startswith("/") and words[1].startswith("r") and words[1].endswith("p"):
            start, end = (int(part, 16) for part in words[0].split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_POPULATE_READ)


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process, MB."""
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(field)) * 1024 / 1e6
