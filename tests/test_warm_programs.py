"""A fork of a process that has imported everything is the program: its words, its world, its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from warm_programs import POSSIBLE, Warm, WarmChildren

pytestmark = pytest.mark.skipif(not POSSIBLE, reason="needs os.pidfd_open")

SCRIPT = """
import json, os, signal, sys, time
if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "tell":
        cores = sorted(os.sched_getaffinity(0))
        print(json.dumps([rest, os.getcwd(), os.environ.get("WORD"), sys.stdin.read(), cores]))
        print("loud", file=sys.stderr)
    elif what == "exit":
        sys.exit(int(rest[0]) if rest[0].isdigit() else rest[0])
    elif what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "raise":
        raise ValueError(rest[0])
    else:
        print(os.getpid(), signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, flush=True)
        time.sleep(60)
else:
    open(__file__ + ".imported", "a").write("x")
"""


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    folder = tmp_path_factory.mktemp("w")
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    started = Warm(str(folder / "script.py"))
    yield started
    started.close()


def done(warm: Warm, *words: object, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(warm.words(*words), capture_output=True, text=True, **more)  # type: ignore[call-overload]


def test_a_fork_has_the_callers_words_streams_folder_environment_and_cores(warm: Warm, tmp_path: Path) -> None:
    given = {"input": "said", "cwd": tmp_path, "env": {**os.environ, "WORD": "ü"}}
    ended = done(warm, "tell", "a b", "", **given)
    real = [sys.executable, warm.entry, "tell", "a b", ""]
    usual = subprocess.run(real, capture_output=True, text=True, **given)  # type: ignore[call-overload]
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, usual.stdout, usual.stderr)
    assert str(tmp_path) in ended.stdout


@pytest.mark.parametrize("words", [("exit", "0"), ("exit", "7"), ("exit", "why"), ("die",), ("raise", "the value")])
def test_a_fork_ends_as_the_program_ends(warm: Warm, words: tuple[str, ...]) -> None:
    usual = subprocess.run([sys.executable, warm.entry, *words], capture_output=True, text=True)
    ended = done(warm, *words)
    assert ended.returncode == usual.returncode
    assert ended.stderr.splitlines()[-1:] == usual.stderr.splitlines()[-1:]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_client_ends_the_fork(warm: Warm, number: signal.Signals) -> None:
    """SIGKILL, too, as a timeout of `subprocess.run` sends it."""
    process = subprocess.Popen(warm.words("sleep"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline().split()[0])
    process.send_signal(number)
    assert process.wait() == -number
    process.stdout.close()
    for _ in range(500):
        if not alive(pid):
            return
        time.sleep(0.01)
    raise AssertionError("the fork outlives its client")


def test_a_signal_that_the_caller_ignores_is_ignored(warm: Warm) -> None:
    command = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *warm.words("sleep")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().split()[1] == "True"
        process.kill()


def test_what_is_imported_is_imported_once(warm: Warm) -> None:
    done(warm, "exit", "0")
    imported = Path(f"{warm.entry}.imported").read_text()
    for _ in range(3):
        done(warm, "exit", "0")
    assert Path(f"{warm.entry}.imported").read_text() == imported


def test_threads_that_ask_first_at_once_share_one_process(warm: Warm) -> None:
    fresh = Warm(warm.entry)
    with ThreadPoolExecutor(4) as threads:
        assert [ended.returncode for ended in threads.map(lambda _: done(fresh, "exit", "5"), range(4))] == [5] * 4
    fresh.close()


def test_an_environment_that_imports_would_read_does_not_fit(warm: Warm) -> None:
    assert warm.fits()
    assert warm.fits({**os.environ, "TMPDIR": "/somewhere"})
    assert not warm.fits({**os.environ, "HF_HOME": "/somewhere"})
    assert not warm.fits({name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"})


def test_a_child_is_the_script_that_was_asked_for(warm: Warm) -> None:
    children = WarmChildren()
    for words in ("exit", "3"), ("raise", "x"), ("die",):
        command = [sys.executable, warm.entry, *words]
        with children.Popen(command, env=dict(os.environ), stderr=subprocess.PIPE) as process:
            said = process.communicate()[1].splitlines()[-1:]
        usual = subprocess.run(command, capture_output=True)
        assert (process.returncode, said) == (usual.returncode, usual.stderr.splitlines()[-1:])
    children.close()


def test_code_runs_as_python_runs_it_and_finds_nothing_of_this_project() -> None:
    code = "import sys; print(sys.argv, sys.path[0], __name__, 'so8t_core' in sys.modules); sys.exit('the end')"
    python = Warm("python")
    ended = python.run("-c", code, "a b", 3)
    usual = subprocess.run([sys.executable, "-c", code, "a b", "3"], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (usual.returncode, usual.stdout, usual.stderr)
    python.close()


@pytest.mark.parametrize(
    ("entry", "words"), [("so8t", ["-m", "pipeline.cli.main"]), ("python", []), ("x.py", ["x.py"])]
)
def test_where_no_process_can_be_warm_a_start_is_the_usual_one(
    entry: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("warm_programs.POSSIBLE", False)
    assert Warm(entry).words("a", 1) == [sys.executable, *words, "a", "1"]


def test_the_program_of_shell_scripts_is_so8t(so8t: Path) -> None:
    usual = [sys.executable, "-m", "pipeline.cli.main"]
    for words in (["--version"], ["gate", "nowhere"], ["lint", "--explain"]):
        ended, real = (
            subprocess.run([*start, *words], capture_output=True, text=True) for start in ([str(so8t)], usual)
        )
        assert (ended.returncode, ended.stdout, ended.stderr) == (real.returncode, real.stdout, real.stderr)
