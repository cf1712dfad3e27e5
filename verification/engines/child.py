"""A child process for work on untrusted files, with limits on time, memory and output, and a reason if it dies.

Questions and answers are JSON, one a line, over the child's stdin and stdout. The memory limit is RLIMIT_DATA; the
child sets it before it imports anything large, and a mapped model file does not count. The time limits are RLIMIT_CPU,
counted anew for every question, and a longer limit of wall clock time, so that a busy machine does not kill the child.
The child is a new program (`exec`), never a fork: torch and OpenMP may run threads in this process. This module uses
the standard library only.
"""

from __future__ import annotations

import json
import math
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from verification.engines.closing import Closing

Message = dict[str, Any]
_ROOT = Path(__file__).resolve().parents[2]  # the child imports this package from here
_SAID = 1 << 16  # last bytes of the child's stderr that are kept


@dataclass(frozen=True)
class Limits:
    """The limits of one child."""

    memory: int  # bytes of data (RLIMIT_DATA)
    cpu: float  # seconds of processor time a question
    wall: float  # seconds on the clock a question
    answer: int = 1 << 26  # bytes of one answer
    files: int = 0  # bytes of one file that the child writes (RLIMIT_FSIZE)


class ChildDied(Exception):
    """The child ended or was ended; the text gives the reason and one line of the child's stderr, if there is one."""


class Child(Closing):
    """A running child; a context manager.

    Args:
        script: a Python file that calls `serve`.
        name: name of the child's program for error texts: "llama.cpp".
    """

    def __init__(self, script: Path, limits: Limits, *, name: str) -> None:
        self.limits, self.name = limits, name
        self._said = bytearray()
        calm = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "GGML_NO_BACKTRACE": "1", "PYTHONHASHSEED": "0"}
        command = [sys.executable, str(script), json.dumps(asdict(limits)), str(_ROOT)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, env={**os.environ, **calm}, bufsize=0
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._in, self._out, self._err = self._process.stdin, self._process.stdout, self._process.stderr
        self._speaks = True  # its stderr is open
        os.set_blocking(self._in.fileno(), False)

    def ask(self, question: Message) -> Message:
        """The child's answer.

        Raises:
            ChildDied: the child ended by itself or by a signal, took too long, or answered too much.
        """
        deadline = time.monotonic() + self.limits.wall
        left = memoryview(json.dumps(question).encode() + b"\n")
        answer = bytearray()
        while not answer.endswith(b"\n"):
            waiting = select.poll()  # `select` cannot watch a file number above 1023
            waiting.register(self._out, select.POLLIN)
            if self._speaks:
                waiting.register(self._err, select.POLLIN)
            if left:
                waiting.register(self._in, select.POLLOUT)
            ready = {number for number, _ in waiting.poll(1000 * max(deadline - time.monotonic(), 0))}
            readable, writable = self._out.fileno() in ready, self._in.fileno() in ready
            if not ready:
                raise self._died(f"no answer within {self.limits.wall:g} s")
            if self._err.fileno() in ready:
                self._hear()
            if writable:
                try:
                    left = left[os.write(self._in.fileno(), left[: 1 << 16]) :]
                except BrokenPipeError:
                    left = left[:0]  # the child has ended; its stdout shows that below
            if readable:
                piece = os.read(self._out.fileno(), 1 << 16)
                if not piece:
                    raise self._died("")
                answer += piece
                if len(answer) > self.limits.answer:
                    raise self._died(f"an answer of more than {self.limits.answer} bytes")
        found: Message = json.loads(answer)
        return found

    def _hear(self) -> None:
        """Read the child's stderr, so that the child never waits for a reader; keep the last bytes."""
        piece = os.read(self._err.fileno(), 1 << 16)
        self._speaks = bool(piece)
        self._said += piece
        del self._said[:-_SAID]

    def _died(self, why: str) -> ChildDied:
        """End the child if it still runs; return the exception that says how it ended."""
        if not why:
            deadline = time.monotonic() + 10
            waiting = select.poll()
            waiting.register(self._err, select.POLLIN)
            while self._speaks and waiting.poll(1000 * max(deadline - time.monotonic(), 0)):
                self._hear()
            try:
                code = self._process.wait(timeout=max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                why = "it closed its output"
            else:
                why = _reason(code, self.limits)
        said = self._last_words()
        self.close()
        return ChildDied(f"{self.name} ended: {why}" + (f": {said}" if said else ""))

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._said.decode("utf-8", "replace").splitlines()]
        lines = [line for line in lines if line]
        found = next((line for line in lines if "ASSERT" in line), lines[-1] if lines else "")
        return found[max(found.find("GGML_ASSERT"), 0) :][:400]  # without the path of the build

    def close(self) -> None:
        """End the child; safe to call twice."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._in, self._out, self._err):
            stream.close()


def _reason(code: int, limits: Limits) -> str:
    """How a process ended, from its exit status."""
    if code >= 0:
        return f"exit status {code}"
    name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
    return f"{name}, over {limits.cpu:g} s of processor time" if name == "SIGXCPU" else name


def serve(prepare: Callable[[], Callable[[Message], Message]]) -> None:
    """Run in the child: set the limits, prepare, answer questions until stdin ends.

    Args:
        prepare: imports what it needs, and returns the function that answers.
    """
    limits = Limits(**json.loads(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits.files, limits.files))
    resource.setrlimit(resource.RLIMIT_DATA, (limits.memory, limits.memory))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # text that a library prints must not be an answer
    answer = prepare()
    for line in sys.stdin.buffer:
        until = math.ceil(time.process_time() + limits.cpu)
        resource.setrlimit(resource.RLIMIT_CPU, (until, resource.RLIM_INFINITY))
        reply = json.dumps(answer(json.loads(line))).encode() + b"\n"
        resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        answers.write(reply)
        answers.flush()
