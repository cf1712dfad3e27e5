"""Laws of a request to end: at any moment, and repeated, it ends with 128 + the signal's number and one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# Runs `so8t doctor` as `python -m` does; `doctor` is replaced by what stands in STOPS.
PROGRAM = """
import atexit, os, signal, sys, time
import pipeline.cli.doctor
from pipeline.cli.main import main

def me(number):
    os.kill(os.getpid(), number)
    for _ in range(9):
        pass

def examine():
    {body}

pipeline.cli.doctor.examine = examine
sys.argv = ["so8t", "doctor"]
main()
"""
STOPS = {
    "a plain request": "me({0})",
    "inside a text that is executed, as dataclasses are compiled": "exec('me({0})', globals())",
    "a second while the first one unwinds": "try: me({0})\n    finally: me({0})",
    "one whose exception got lost": "try: me({0})\n    except KeyboardInterrupt: raise SystemExit(0)",
    "one that is forgotten in a destructor": "class D:\n        def __del__(self): me({0})\n    D(); time.sleep(99)",
    "one that is forgotten in a callback out of C": (
        "import ctypes\n    call = ctypes.CFUNCTYPE(None)(lambda: me({0}))\n    call(); time.sleep(99)"
    ),
    "one that became another error": "try: me({0})\n    except KeyboardInterrupt: raise ImportError('half a module')",
    "a second while the interpreter ends": "atexit.register(me, {0}); me({0})",
    "many, all the time": "import threading\n    parent = os.getpid()\n    def hit():\n        while True:\n"
    "            os.kill(parent, {0}); time.sleep(0.0005)\n"
    "    threading.Thread(target=hit, daemon=True).start(); time.sleep(9)",
}


def ended(folder: Path, body: str) -> tuple[int, str]:
    """(exit code, standard error) of a program whose work is `body`, started with `python -m`."""
    (folder / "stopped_program.py").write_text(PROGRAM.format(body=body), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "stopped_program"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])},
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores ctrl-C
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("stop", STOPS)
def test_ctrl_c_ends_with_130_and_one_line(stop: str, tmp_path: Path) -> None:
    code, said = ended(tmp_path, STOPS[stop].format(int(signal.SIGINT)))
    assert (code, said) == (130, "interrupted; finished steps are kept\n")


def test_other_requests_end_alike(tmp_path: Path) -> None:
    code, said = ended(tmp_path, STOPS["inside a text that is executed, as dataclasses are compiled"].format(15))
    assert (code, said) == (143, "stopped by SIGTERM; finished steps are kept\n")


def test_a_request_after_the_end_changes_no_exit_code(tmp_path: Path) -> None:
    assert ended(tmp_path, "atexit.register(me, 2); return []") == (0, "")
