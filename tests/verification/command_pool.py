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
import tempfile
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
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(root)}
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
    from transformers import AutoTokenizer  # noqa: F401 - seconds of every command that has a reference

    from pipeline.cli import main as program
    from verification.commands import lint, lint_terminal  # noqa: F401 - what the verbs import when they are called
    from verification.gguf.key_types import wanted

    program._quiet_transformers()
    wanted("llama.block_count")  # makes the table

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            begin = time.monotonic()
            child = os.fork()
            if child == 0:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.argv = ["so8t", *json.loads(line)]
                code = 99
                try:
                    program.main()
                except SystemExit as ended:
                    code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            _, status, usage = os.wait4(child, 0)
            seconds = time.monotonic() - begin
            found = []
            for stream in (err, out):
                stream.seek(0)
                found.append(stream.read().decode("utf-8", "replace"))
            answer = {
                "status": os.WEXITSTATUS(status) if os.WIFEXITED(status) else 0,
                "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
                "seconds": seconds,
                "cpu": usage.ru_utime + usage.ru_stime,
                "megabytes": usage.ru_maxrss / 1024,
                "error": found[0],
                "output": found[1],
            }
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


if __name__ == "__main__":
    _serve()
