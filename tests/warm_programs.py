"""Programs started many times as forks of one process that has imported what they import: 0.1 s instead of seconds.

`Warm(entry)` starts that process at the first use. `Warm.words(...)` is a command line for `subprocess`: a small client
that hands its arguments, environment, working directory, standard streams, ignored signals and cores to a fork, passes
on the signals that it gets, and ends as the fork ends: by its exit code or by its signal. A fork whose client is killed
is killed too. `entry` is "so8t"; "python": `-c CODE`, with the large packages imported and nothing of this project's;
"children": any script, with what the product's small children import; or the path of a script. A module reads its part
of the environment once, so a caller that changes such a variable (`READ_AT_IMPORT`) gets an ordinary start.

As a script: `serve ENTRY SOCKET`. The client is `warm_client.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from warm_client import PASSED_ON

READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "TORCH", "OMP_", "MKL_", "OPENBLAS_", "KMP_", "PYTHON", "LD_", "XDG_", "HOME")
CLIENT = Path(__file__).with_name("warm_client.py")
POSSIBLE = hasattr(os, "pidfd_open")  # Linux; elsewhere every program is started as usual
USUAL = {"so8t": ["-m", "pipeline.cli.main"], "python": [], "children": []}  # entry -> Python's words; or the script


def read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that has to be the process's own."""
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT)}


def program(path: Path, words: list[str]) -> Path:
    """An executable file that starts `words`, for shell scripts."""
    path.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', encoding="utf-8")
    path.chmod(0o755)
    return path


class Warm:
    """One process that has imported a program, and the command lines that start forks of it."""

    def __init__(self, entry: str, environment: Mapping[str, str] | None = None) -> None:
        # A socket's path must be short. No `TemporaryDirectory`: a fork of this process that ends as programs do would
        # remove it.
        self.entry, self._owner = entry, os.getpid()
        self.socket = Path(tempfile.mkdtemp(prefix="so8t-")) / "s"
        self.environment = dict(os.environ if environment is None else environment)
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def fits(self, environment: Mapping[str, str] | None = None) -> bool:
        """Whether a program with this environment would have imported the same."""
        given = os.environ if environment is None else environment
        return POSSIBLE and read_at_import(given) == read_at_import(self.environment)

    def words(self, *arguments: object) -> list[str]:
        """The command line of one start."""
        if not POSSIBLE:
            return [sys.executable, *USUAL.get(self.entry, [self.entry]), *map(str, arguments)]
        with self._lock:
            if self._process is None:
                command = [sys.executable, __file__, "serve", self.entry, str(self.socket)]
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self.environment, text=True
                )
                assert self._process.stdout is not None
                assert self._process.stdout.readline() == "ready\n", f"{self.entry} cannot be imported"
        return [sys.executable, "-I", "-S", str(CLIENT), str(self.socket), *map(str, arguments)]

    def run(self, *arguments: object, cwd: str | Path = "/") -> subprocess.CompletedProcess[str]:
        """The end of one start, and its two streams."""
        return subprocess.run(self.words(*arguments), capture_output=True, text=True, cwd=cwd)

    def close(self) -> None:
        """End the process; forks that still run go on. A fork of the owner ends nothing."""
        if os.getpid() != self._owner:
            return
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()
            self._process = None
        shutil.rmtree(self.socket.parent, ignore_errors=True)


class WarmConverter:
    """Takes the place of the module `subprocess` in `verification.engines.convert`: the pinned converter is warm."""

    def __init__(self) -> None:
        self._warm: Warm | None = None
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(subprocess, name)

    def run(self, command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
        """`subprocess.run`, by a fork where `command` starts the pinned converter."""
        from verification.engines.convert import cache_directory

        script, environment = command[1], more.get("env")
        if Path(script).parent == cache_directory() and environment is not None:
            with self._lock:
                self._warm = self._warm or Warm(script, environment)
            if self._warm.entry == script and self._warm.fits(environment):
                return subprocess.run([*self._warm.words(), *command[2:]], **more)
        return subprocess.run(command, **more)

    def close(self) -> None:
        if self._warm is not None:
            self._warm.close()


class WarmChildren:
    """Takes the place of the module `subprocess` in `verification.engines.child`."""

    def __init__(self) -> None:
        self._warm: dict[str, Warm] = {}
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(subprocess, name)

    def Popen(self, command: list[str], **more: Any) -> subprocess.Popen[bytes]:
        """`subprocess.Popen` of a Python script, by a fork."""
        kind = json.dumps(read_at_import(more["env"]), sort_keys=True)
        with self._lock:
            if kind not in self._warm:
                self._warm[kind] = Warm("children", more["env"])
        return subprocess.Popen(self._warm[kind].words(*command[1:]), **more)

    def close(self) -> None:
        for warm in self._warm.values():
            warm.close()


# --- the process that has imported everything


def _so8t() -> Callable[[], object]:
    """What the verbs import when they are called is imported before."""
    import llama_cpp  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    from pipeline.cli import main
    from verification.commands import lint, lint_terminal, verify  # noqa: F401
    from verification.gguf.key_types import wanted
    from verification.show import write  # noqa: F401

    main._quiet_transformers()
    wanted("llama.block_count")  # makes the table
    sys.modules["__main__"] = main
    return main.main


def _children() -> Callable[[], object]:
    """Runs the script that its first argument names."""
    import runpy

    sys.path.append(str(Path(__file__).parents[1]))
    import gguf  # noqa: F401
    import jinja2.sandbox  # noqa: F401
    import llama_cpp  # noqa: F401

    from verification.engines import quantise  # noqa: F401
    from verification.gguf import reader  # noqa: F401

    def main() -> None:
        del sys.argv[0]
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")

    return main


def _python() -> Callable[[], object]:
    """Runs the code behind `-c`."""
    import bitsandbytes  # noqa: F401
    import torch  # noqa: F401
    from transformers import modeling_utils  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    sys.path.remove(str(Path(__file__).parent))

    def main() -> None:
        del sys.argv[0]
        sys.path.insert(0, "")
        exec(sys.argv.pop(1), {"__name__": "__main__"})

    return main


def _script(path: str) -> Callable[[], object]:
    import runpy

    sys.path[0] = str(Path(path).parent)
    runpy.run_path(path, run_name="imported")
    # what upstream's converter imports when it meets a checkpoint
    import torch._dynamo  # noqa: F401
    from transformers import AutoConfig, AutoTokenizer  # noqa: F401
    from transformers.models.llama import configuration_llama  # noqa: F401

    return lambda: runpy.run_path(path, run_name="__main__")


def serve(entry: str, address: str) -> None:
    """Answer until the standard input ends."""
    import gc

    main = {"so8t": _so8t, "python": _python, "children": _children}.get(entry, lambda: _script(entry))()
    gc.collect()
    gc.freeze()  # or a fork's collector would copy every page
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        print("ready", flush=True)
        watchers: set[int] = set()
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [], 1.0 if watchers else None)
            watchers = {pid for pid in watchers if os.waitpid(pid, os.WNOHANG) == (0, 0)}
            if sys.stdin in ready:
                break
            if listener in ready:
                connection, _ = listener.accept()
                watcher = os.fork()
                if watcher == 0:
                    listener.close()
                    _watch(connection, main)
                    os._exit(0)
                watchers.add(watcher)
                connection.close()
    # Watchers that are left go on: their clients may be children that end with the process which waits for this one.


def _watch(connection: socket.socket, main: Callable[[], object]) -> None:
    """Start a fork as it is asked for, and say its end."""
    length, streams, _, _ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as reader:
        asked = json.loads(reader.read(int(length)))
    child = os.fork()
    if child == 0:
        connection.close()
        _become(asked, streams, main)
    for stream in streams:
        os.close(stream)
    with contextlib.suppress(OSError):
        connection.sendall(f"{child:8}".encode())
    handle = os.pidfd_open(child)
    ready, _, _ = select.select([handle, connection], [], [])
    if handle not in ready:  # the client is gone
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(OSError):
        connection.sendall(f"{status:8}".encode())


def _become(asked: dict[str, Any], streams: list[int], main: Callable[[], object]) -> None:
    """The program, from here to its end."""
    import atexit

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    replaced = {"errors": "backslashreplace", "buffering": 1}
    sys.stderr = sys.__stderr__ = open(2, "w", encoding="utf-8", closefd=False, **replaced)  # noqa: SIM115
    os.setpgid(0, 0)
    for number in PASSED_ON:
        ignored = number in asked["ignored"]
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if ignored else default)
    os.sched_setaffinity(0, asked["cores"])
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv[1:] = asked["arguments"]
    status: int | None = 1
    try:
        main()
        status = 0
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        else:
            status = ended.code or 0
    except KeyboardInterrupt:
        traceback.print_exc()
        status = None
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    if status is None:  # as Python ends
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status & 0xFF)


if __name__ == "__main__":
    serve(*sys.argv[2:4])
