"""Cooperation of several processes of one command, started by `accelerate launch` or `torchrun`.

The launcher's environment variables give the number of processes. Without them there is one process, and every function
here returns at once. The first process writes all files; the others compute their share. Objects are pickled between
the user's own processes. There is no timeout: a process may wait for hours of work, and if one process dies, its
launcher ends the others.
"""

from __future__ import annotations

import atexit
import os
import pickle
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar, cast

from so8t_core.errors import InputError

T = TypeVar("T")
_PATIENCE = timedelta(days=30)


def count() -> int:
    """The number of processes that work on this command.

    Raises:
        InputError: WORLD_SIZE is not a positive number.
    """
    return _number("WORLD_SIZE", 1, least=1)


def rank() -> int:
    """This process' number, 0 .. count() - 1, over all machines; 0 if WORLD_SIZE says that there is one process.

    Raises:
        InputError: RANK is not a number below WORLD_SIZE.
    """
    if (processes := count()) == 1:
        return 0
    number = _number("RANK", 0)
    if number >= processes:
        raise InputError(
            f"RANK={number} is not below WORLD_SIZE={processes}; unset both, or start the command with "
            "`accelerate launch`"
        )
    return number


def local_rank() -> int:
    """This process' number on its machine, which is the number of its GPU."""
    return _number("LOCAL_RANK", 0) if count() > 1 else 0


def _number(variable: str, default: int, *, least: int = 0) -> int:
    """A whole number from the launcher's environment."""
    text = os.environ.get(variable, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        raise InputError(
            f"the environment variable {variable} is {text!r}, a whole number from {least} on is expected; "
            "unset it, or start the command with `accelerate launch`"
        )
    return int(text)


def is_first() -> bool:
    """Whether this process owns the run directory and the report."""
    return rank() == 0


def join() -> None:
    """Connect to the other processes; returns at once if there are none, or if they are connected already."""
    if count() == 1:
        return
    import torch  # imported here: a single process does not need it
    import torch.distributed as dist

    if dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
    atexit.register(dist.destroy_process_group)


def wait() -> None:
    """Return when every process has called this function."""
    everyones(None)


def from_first(make: Callable[[], T]) -> T:
    """The result of `make` in the first process, returned in every process; only the first process calls `make`.

    Raises:
        Exception: the error of `make` in the first process, in every process, so that no process waits for ever.
    """
    if count() == 1:
        return make()
    import torch.distributed as dist

    join()
    value: T | None = None
    error: Exception | None = None
    if is_first():
        try:
            value = make()
        except Exception as failure:
            error = failure
    box = [value, None if error is None else _portable(error)]
    dist.broadcast_object_list(box, src=0)
    if error is not None or box[1] is not None:
        raise error or cast(Exception, box[1])
    return cast(T, box[0])


def _portable(error: Exception) -> Exception:
    """The error, or an error with the same text that can be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an error's __reduce__ may raise anything
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def everyones(value: T) -> list[T]:
    """The values of all processes in their order, returned in every process."""
    if count() == 1:
        return [value]
    import torch.distributed as dist

    join()
    box: list[T | None] = [None] * count()
    dist.all_gather_object(box, value)
    return box  # type: ignore[return-value]


def agree(what: str, value: str) -> None:
    """Check that every process has the same `value`.

    Raises:
        InputError: another process has another value, usually on a machine with a separate disk.
    """
    found = everyones(value)
    other = next((number for number, theirs in enumerate(found) if theirs != found[0]), None)
    if other is not None:
        raise InputError(
            f"process {other} of {count()} sees other {what} than process 0: all machines must share the run directory "
            "and the inputs"
        )


def shared_out(items: Sequence[T]) -> dict[int, T]:
    """This process' share of a list of work, every count()-th item: place in the list -> item."""
    return {place: item for place, item in enumerate(items) if place % count() == rank()}


def together(mine: dict[int, T]) -> list[T]:
    """All shares of a list, in the list's order, returned in every process."""
    whole: dict[int, T] = {}
    for share in everyones(mine):
        whole |= share
    return [whole[place] for place in sorted(whole)]


def threads_each(cores: int) -> int:
    """Threads for each process on a machine with `cores`, if the user gave no number."""
    return max(1, cores // (_number("LOCAL_WORLD_SIZE", 1, least=1) if count() > 1 else 1))
