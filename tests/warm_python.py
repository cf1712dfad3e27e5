"""A Python that has imported the large packages and nothing of ours, for code that needs a fresh interpreter.

Each piece of code runs in a child forked from it, so what one imports the next does not see. One thread: OpenMP's do
not survive a fork.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

IMPORTS = "import torch, bitsandbytes, transformers.modeling_utils, transformers.models.llama.modeling_llama"


class WarmPython:
    """Runs code as `python -c` does, in `cwd`, without the seconds of `IMPORTS`."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def run(self, code: str, *arguments: object, cwd: str | Path = "/") -> subprocess.CompletedProcess[str]:
        """How the code ended, and what it said."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([code, list(map(str, arguments)), str(cwd)]) + "\n")
        self._process.stdin.flush()
        status, out, err = json.loads(self._process.stdout.readline())
        return subprocess.CompletedProcess(code, status, out, err)

    def close(self) -> None:
        self._process.communicate()


def _serve() -> None:
    from forked import forked

    sys.path.remove(str(Path(__file__).parent))
    exec(IMPORTS, {})
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        code, arguments, folder = json.loads(line)

        def work(code: str = code, arguments: list[str] = arguments, folder: str = folder) -> None:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.chdir(folder)
            sys.argv = ["-c", *arguments]
            sys.path.insert(0, "")
            exec(code, {"__name__": "__main__"})

        done = forked(work)
        answers.write(json.dumps([done.returncode, done.stdout, done.stderr]) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
