"""Peak memory of one piece of work in a forked process, above the memory that the process held before.

The fork starts with the parent's imports and data, and its peak mark is reset to its resident memory, so the difference
at the end belongs to the work. `_settle` first removes three disturbances. A fork inherits no page of a mapped file
(59 MB of a training step were the code of libraries). It inherits heap that the parent has freed, which the work can
fill without growth. And glibc keeps freed blocks of up to 32 MB or not, by the layout of the process (one step: 97 to
134 MB in seven processes before, 86 to 87 MB in five since). Call it from a process that has not yet used torch with
more than one thread or run a backward: neither survives a fork.
"""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MADV_POPULATE_READ = 22  # Linux 5.14, linux/mman.h; an older kernel refuses it, and then libraries' pages count


def forked(work: Callable[[], Any]) -> Any:
    """Run `work` in a fork and return what it returns, which is pickled.

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
            value = work()
            with os.fdopen(writing, "wb") as pipe:
                pickle.dump(value, pipe)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)  # skips the parent's clean-up
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    if status != 0 or not data:
        raise RuntimeError(f"the forked work ended with status {status}")
    return pickle.loads(data)


def peak(work: Callable[[], Any]) -> float:
    """Run `work` in a fork and return the growth of its resident memory at the peak, MB (at least 0.1).

    Not for timing: with a heap that returns all freed memory at once, a training step took up to twice as long.

    Raises:
        RuntimeError: as `forked`.
    """

    def measured() -> float:
        gc.collect()
        gc.freeze()  # the parent's objects are no part of the work
        _settle()
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = resident("VmRSS")
        work()
        return max(resident("VmHWM") - before, 0.1)

    return float(forked(measured))


def _settle() -> None:
    """Return freed heap to the system, now and later, and make the pages of every mapped file resident."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 17)  # the default, but fixed: otherwise it grows with freed blocks
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 17)
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
