"""The whole `so8t` program, run many times in children that are forked after its imports; run as a script.

Reads one command a line from stdin (JSON, the arguments), answers one JSON object a line: exit status, signal, seconds
on the clock, largest memory, standard error. Each command has a child of its own, so one that dies takes nothing with
it. The parent starts no thread before a fork (OMP_NUM_THREADS=1, set by `command_pool`).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ended:
    """How one command ended."""

    status: int  # exit status; 0 where a signal ended it
    signal: int
    seconds: float
    cpu: float  # processor time, with the command's own children
    megabytes: float  # the largest resident memory of the command or of one of its children
    error: str
    output: str


Run = Callable[[Iterable[list[str]]], Iterator[Ended]]  # each command's end, in order


@contextlib.contextmanager
def command_pool() -> Iterator[Run]:
    """The process of the children, as a function that has it run commands."""
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join(map(str, (root, root / "tests")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": path}
    with subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as pool:

        def run(commands: Iterable[list[str]]) -> Iterator[Ended]:
            assert pool.stdin is not None
            assert pool.stdout is not None
            for command in commands:
                pool.stdin.write(json.dumps(command) + "\n")
                pool.stdin.flush()
                yield Ended(**json.loads(pool.stdout.readline()))

        yield run
        assert pool.stdin is not None
        pool.stdin.close()


def _serve() -> None:
    from forked import forked
    from transformers import AutoTokenizer  # noqa: F401 - seconds of every command that has a reference

    from pipeline.cli import main as program
    from verification.commands import lint, lint_terminal  # noqa: F401 - what the verbs import when they are called
    from verification.gguf.key_types import wanted

    program._quiet_transformers()
    wanted("llama.block_count")  # makes the table

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:

        def work(words: list[str] = json.loads(line)) -> None:  # noqa: B008 - the words of this line
            sys.argv = ["so8t", *words]
            try:
                program.main()
            except Exception:
                sys.exit(99)  # no command ends so

        begin = time.monotonic()
        ended = forked(work)
        answer = {
            "status": max(ended.returncode, 0),
            "signal": max(-ended.returncode, 0),
            "seconds": time.monotonic() - begin,
            "cpu": ended.usage.ru_utime + ended.usage.ru_stime,
            "megabytes": ended.usage.ru_maxrss / 1024,
            "error": ended.stderr,
            "output": ended.stdout,
        }
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
