"""Laws of bad luck: whatever stops a run, it says so in a line or two, ends with code 2, and loses nothing.

Real limits, real signals, real processes. A file size limit stands for a full disk where nothing can be mounted: both
are errors of the write itself, at a moment that the code did not choose.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_kill import (
    Started,
    _assert_ended_undisturbed,
    _assert_like_undisturbed,
    _beside,
    _ends_undisturbed,
    _prepare,
)
from test_run import _execute, _ran

from pipeline.config import load_config
from pipeline.progress import Reporter
from pipeline.run.steps import STEPS, Run
from so8t_core.errors import InputError
from so8t_core.files import sha256_path
from verification.engines.quantise import quantise
from verification.gate.report import Report
from verification.show.write import load_report

OUTPUTS = ("data", "adapter", "baked", "gguf", "work/answers.json")
MADE = {  # by each step, always the same bytes
    "data": "data",
    "train": "adapter/adapter_model.safetensors",
    "bake": "baked",
    "convert": "gguf",
    "answers": "work/answers.json",
}


@contextlib.contextmanager
def _largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes, as under `ulimit -f`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def _small_disk(place: Path, content: Path, room: int) -> Iterator[Path]:
    """A file system of its own that holds a copy of `content` and has `room` bytes left."""
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    try:
        run_dir = Path(shutil.copytree(content, place / "run"))
        shutil.rmtree(run_dir / "work" / "oracle")
        size = shutil.disk_usage(place).used + room
        subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)
        yield run_dir
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def _digests(run_dir: Path) -> dict[str, str]:
    return {name: sha256_path(run_dir / name) for name in OUTPUTS}


def _assert_nothing_lost(run_dir: Path, before: dict[str, str]) -> None:
    assert _digests(run_dir) == before
    assert [p for p in run_dir.rglob("*") if p.name.endswith((".tmp", ".old"))] == []


late = pytest.mark.soak  # convert, answers and verify all begin with the same conversion


@pytest.mark.parametrize(
    "step", [s if s in ("data", "train", "bake") else pytest.param(s, marks=late) for s in STEPS[1:]]
)
def test_a_write_that_fails_in_any_step_is_said_and_loses_nothing(step: str, copy: Path, tiny_dir: Path) -> None:
    shutil.rmtree(copy / "work" / "oracle")  # made again, so that every step has something to write
    before, made = _digests(copy), sha256_path(copy / MADE[step]) if step in MADE else ""
    with _largest_file(4096), pytest.raises(InputError) as caught:
        _execute(tiny_dir, copy, force=(step,), until=step)
    message = str(caught.value)
    assert any(words in message for words in ("file grows over the limit", "File too large", "file write failed"))
    assert message.count("\n") <= 1
    _assert_nothing_lost(copy, before)
    if step == "train":
        assert "goes on from the checkpoint before" in message
    if step in MADE:
        _execute(tiny_dir, copy, force=(step,), until=step)  # with room again, it ends as if nothing had been
        assert sha256_path(copy / MADE[step]) == made


def _size(run_dir: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in run_dir.glob(pattern))


@pytest.mark.soak
@pytest.mark.parametrize(
    ("step", "written", "words"),  # the disk has room for half of what the step writes
    [
        ("bake", "baked/model.safetensors", "cannot write .*baked: no space left on the device"),
        ("convert", "gguf/*-F16.gguf", "cannot write .*-F16.gguf: no space left on the device"),
        ("verify", "gguf/*-F16.gguf", "no space left on the device"),
    ],
)
def test_a_full_disk_is_named(
    step: str, written: str, words: str, finished: tuple[Path, object], tiny_dir: Path, tmp_path: Path
) -> None:
    with _small_disk(tmp_path / "disk", finished[0], _size(finished[0], written) // 2) as run_dir:
        before = _digests(run_dir)
        with pytest.raises(InputError, match=words) as caught:
            _execute(tiny_dir, run_dir, force=(step,), until=step)
        assert str(caught.value).count("\n") <= 1
        _assert_nothing_lost(run_dir, before)


@pytest.mark.soak
def test_a_disk_that_is_full_in_the_quantiser_is_named(finished: tuple[Path, object], tmp_path: Path) -> None:
    (source,) = finished[0].glob("gguf/*-F16.gguf")
    with _small_disk(tmp_path / "disk", finished[0], _size(finished[0], "gguf/*-Q8_0.gguf") // 2) as run_dir:
        with pytest.raises(InputError, match=r"cannot write Q8_0 of .*-F16.gguf: .* has \d+ MiB left; free some space"):
            quantise(source, run_dir / "again.gguf", "Q8_0")
        assert not (run_dir / "again.gguf").exists()
        assert [p for p in run_dir.iterdir() if p.name.endswith(".tmp")] == []


@pytest.mark.soak
def test_a_disk_with_no_room_for_the_logits_is_enough(
    finished: tuple[Path, Report], tiny_dir: Path, tmp_path: Path
) -> None:
    """The reference's hidden states are kept instead; only the oracle's files have room."""
    room = _size(finished[0], "work/oracle/*.gguf") + (4 << 20)
    with _small_disk(tmp_path / "disk", finished[0], room) as run_dir:
        before = _digests(run_dir)
        _execute(tiny_dir, run_dir, force=("verify",), until="verify")
        assert load_report(run_dir / "report" / "report.json").verdict == finished[1].verdict
        assert _digests(run_dir) == before


def test_a_place_that_takes_no_files_is_refused_before_any_work(tiny_dir: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write /sys/so8t: (permission denied|the file system is read-only)"):
        _execute(tiny_dir, Path("/sys/so8t"))


@pytest.mark.soak
def test_a_finished_run_that_became_read_only_is_refused(
    finished: tuple[Path, object], tiny_dir: Path, tmp_path: Path
) -> None:
    with _small_disk(tmp_path / "disk", finished[0], 1 << 20) as run_dir:
        before = _digests(run_dir)
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        with pytest.raises(InputError, match=r"cannot write .*: the file system is read-only"):
            _execute(tiny_dir, run_dir)
        _assert_nothing_lost(run_dir, before)


def test_a_changed_input_under_finished_steps_runs_what_depends_on_it(
    copy: Path, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Path(shutil.copytree(tiny_dir, tmp_path / "base"))
    names = _ran(monkeypatch)
    assert _execute(base, copy, until="train") is None
    assert names == []  # another path, the same bytes
    with open(base / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    names = _ran(monkeypatch, changing=True)
    _execute(base, copy, until="train", quiet=False)
    assert names == ["train"]  # the rows do not depend on the weights
    assert "train: input changed (base)" in capsys.readouterr().err


def test_a_second_run_is_refused_and_ctrl_c_keeps_what_is_finished(
    finished: tuple[Path, object], tmp_path: Path
) -> None:
    config = _beside(finished[0], tmp_path, "data", steps=2000)  # longer than the second takes to start
    run = Started(config, "--until", "train")
    assert run.reaches("train"), run.lines
    second = Started(config, "--until", "train")
    assert second.end() == 2
    assert second.lines == [
        f"so8t: another so8t run is working in {tmp_path / 'run'}; wait for it or choose another run_dir"
    ]
    assert run.signal(signal.SIGINT, 0)
    assert run.process.returncode == 130, run.lines
    assert run.lines[-1] == "interrupted; finished steps are kept"
    _assert_like_undisturbed(config, all_of_them=False)
    Run(load_config(config), Reporter(quiet=True)).execute(until="data")
    _assert_ended_undisturbed(config)


@pytest.mark.soak
def test_ctrl_c_in_each_step_keeps_what_is_finished(tiny_dir: Path, tmp_path: Path) -> None:
    config = _prepare(tiny_dir, tmp_path, "verify", "train.steps=12")
    for step in STEPS[1:]:
        for after in (0.0, 0.3, 1.0):
            run = Started(config, "--force", step, "--until", step)
            assert run.reaches(step), run.lines
            if run.signal(signal.SIGINT, after):
                assert run.process.returncode in (130, 1), (step, run.lines)  # 1: verify had ended, undecided
                assert "Traceback" not in "\n".join(run.lines), (step, run.lines)
            _assert_like_undisturbed(config, all_of_them=False)
    _ends_undisturbed(config)
