"""Files are whole or absent, and what was there before survives a failure."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import resource
import signal
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep as wait

import pytest
import torch
from core_models import tiny_llama
from forked import forked

import so8t_core.files as files_module
from so8t_core import InputError, SO8TConfig, attach, save_adapter
from so8t_core.files import (
    atomic_dir,
    atomic_file,
    read_json,
    read_regular,
    sha256_file,
    sha256_path,
    size_of,
    sweep,
    temporary_prefix,
    write_text,
)


class Stop(Exception):
    pass


def leftovers(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def test_a_finished_file_replaces_the_old_one(tmp_path):
    write_text(tmp_path / "deep" / "f.txt", "old")
    write_text(tmp_path / "deep" / "f.txt", "new: 回転")
    assert (tmp_path / "deep" / "f.txt").read_text(encoding="utf-8") == "new: 回転"
    assert leftovers(tmp_path / "deep") == ["f.txt"]


def test_a_failed_file_leaves_the_old_one_and_nothing_else(tmp_path):
    write_text(tmp_path / "f", "old")
    with pytest.raises(Stop), atomic_file(tmp_path / "f") as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise Stop
    assert (tmp_path / "f").read_text() == "old"
    assert leftovers(tmp_path) == ["f"]


def test_a_finished_directory_replaces_the_old_one_whole(tmp_path):
    for name in ("old", "new"):
        with atomic_dir(tmp_path / "d") as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / name).write_text(name)
    assert leftovers(tmp_path) == ["d"]
    assert leftovers(tmp_path / "d" / "sub") == ["new"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_directory_leaves_the_old_one_and_nothing_else(tmp_path, existing):
    if existing:
        write_text(tmp_path / "d" / "old", "old")
    with pytest.raises(Stop), atomic_dir(tmp_path / "d") as temporary:  # noqa: PT012
        (temporary / "half").write_text("half")
        raise Stop
    assert leftovers(tmp_path) == (["d"] if existing else [])
    assert not existing or leftovers(tmp_path / "d") == ["old"]


class NoExchange:
    """A C library without renameat2, as on macOS."""

    def __init__(self, *args, **kwargs):
        pass


@pytest.mark.parametrize("exchange", [True, False])
def test_the_old_directory_is_back_when_the_rename_fails(tmp_path, monkeypatch, exchange):
    write_text(tmp_path / "d" / "old", "old")
    rename = os.replace

    def failing(source, target):
        if Path(target) == tmp_path / "d" and Path(source).suffix == ".tmp":
            raise OSError(errno.ENOSPC, "full")
        rename(source, target)

    class Full(NoExchange):
        def renameat2(self, *args):
            ctypes.set_errno(errno.ENOSPC)
            return -1

    monkeypatch.setattr(os, "replace", failing)
    monkeypatch.setattr(ctypes, "CDLL", Full if exchange else NoExchange)
    with pytest.raises(InputError, match="no space left"), atomic_dir(tmp_path / "d") as temporary:
        (temporary / "new").write_text("new")
    assert leftovers(tmp_path) == ["d"]
    assert leftovers(tmp_path / "d") == ["old"]


def test_without_an_exchange_of_names_a_directory_is_replaced_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", NoExchange)
    for name in ("old", "new"):
        with atomic_dir(tmp_path / "d") as temporary:
            (temporary / name).write_text(name)
    assert leftovers(tmp_path) == ["d"]
    assert leftovers(tmp_path / "d") == ["new"]


def test_a_directory_that_is_replaced_is_there_at_every_moment(tmp_path):
    """Replaced again and again by two threads, a third finds it always: it would see a step between."""
    write_text(tmp_path / "d" / "whole", "")
    missed, done = [], threading.Event()

    def look() -> None:
        while not done.is_set():
            missed.extend([] if (tmp_path / "d").exists() else ["absent"])

    def replace() -> None:
        for _ in range(50):
            with atomic_dir(tmp_path / "d") as temporary:
                (temporary / "whole").write_text("")

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        with ThreadPoolExecutor(2) as pool:
            for future in [pool.submit(replace) for _ in range(2)]:
                future.result()
    finally:
        done.set()
        watcher.join()
    assert missed == []
    assert leftovers(tmp_path) == ["d"]
    assert leftovers(tmp_path / "d") == ["whole"]


def test_a_file_of_that_name_is_not_replaced_by_a_directory(tmp_path):
    write_text(tmp_path / "f", "keep")
    with pytest.raises(InputError, match="there is a file of this name"), atomic_dir(tmp_path / "f"):
        pass
    assert (tmp_path / "f").read_text() == "keep"
    for path in (tmp_path / "f" / "below", tmp_path / "f" / "deep" / "below"):
        with pytest.raises(InputError, match="a part of the path is a file"):
            write_text(path, "x")
    (tmp_path / "d").mkdir()
    with pytest.raises(InputError, match="there is a directory of this name"):
        write_text(tmp_path / "d", "x")
    assert leftovers(tmp_path) == ["d", "f"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG])
def test_a_full_or_read_only_disk_is_the_users_error(tmp_path, code):
    with pytest.raises(InputError, match=f"cannot write {tmp_path / 'f'}: .* choose another place"):  # noqa: SIM117
        with atomic_file(tmp_path / "f"):
            raise OSError(code, os.strerror(code))
    assert leftovers(tmp_path) == []


def test_an_unrelated_os_error_is_not_disguised(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "f"):
        (tmp_path / "absent").read_bytes()
    assert leftovers(tmp_path) == []


@pytest.fixture
def limited_file_size():
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_an_adapter_that_does_not_fit_is_the_users_error_and_keeps_the_old_one(tmp_path, limited_file_size):
    model = attach(tiny_llama(), SO8TConfig())
    save_adapter(model, tmp_path / "a")
    before = sha256_path(tmp_path / "a")
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "theta" in n).add_(1)
    limited_file_size(1000)  # a real failing write, half-way through the tensor file
    with pytest.raises(InputError, match="over the limit"):
        save_adapter(model, tmp_path / "a")
    limited_file_size(resource.RLIM_INFINITY)
    assert leftovers(tmp_path) == ["a"]
    assert sha256_path(tmp_path / "a") == before
    save_adapter(model, tmp_path / "a")
    assert sha256_path(tmp_path / "a") != before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_place_is_the_users_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="permission denied"):
        write_text(tmp_path / "f", "x")
    tmp_path.chmod(0o700)


def test_digests_see_names_and_bytes(tmp_path):
    write_text(tmp_path / "d" / "x", "1")
    write_text(tmp_path / "d" / "y" / "z", "22")
    lines = "".join(f"{hashlib.sha256(t).hexdigest()}  {n}\n" for n, t in (("x", b"1"), ("y/z", b"22")))
    assert sha256_path(tmp_path / "d") == hashlib.sha256(lines.encode()).hexdigest()
    assert sha256_path(tmp_path / "d" / "x") == sha256_file(tmp_path / "d" / "x") == hashlib.sha256(b"1").hexdigest()
    assert size_of(tmp_path / "d") == 3
    before = sha256_path(tmp_path / "d")
    (tmp_path / "d" / "x").rename(tmp_path / "d" / "w")
    assert sha256_path(tmp_path / "d") != before
    for function in (sha256_path, sha256_file, size_of):
        with pytest.raises(FileNotFoundError):
            function(tmp_path / "absent")


def test_sweep_removes_what_a_killed_process_left_and_nothing_else(tmp_path):
    for path in (tmp_path / "baked", tmp_path / "manifest.json", tmp_path / ("長" * 60)):
        aside = Path(tempfile.mkdtemp(prefix=temporary_prefix(path), suffix=".old", dir=tmp_path))
        (aside / "was").write_text("half")
        handle, _ = tempfile.mkstemp(prefix=temporary_prefix(path), suffix=".tmp", dir=tmp_path)
        os.close(handle)
    kept = (".lock", "kept.tmp", ".notes.tmp", ".x.old", ".so8t-plan.tmp", ".so8t", "so8t-a.abcdefgh.tmp")
    for name in kept:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".sketches.old").mkdir()
    sweep(tmp_path)
    assert leftovers(tmp_path) == sorted((*kept, ".sketches.old"))
    sweep(tmp_path / "absent")


def test_a_process_killed_inside_a_write_leaves_only_names_that_sweep_knows(tmp_path):
    """Twenty kills, of files and of directories; a user's own hidden files survive the sweep."""
    for name in (".notes.tmp", ".x.old"):
        (tmp_path / name).write_text("mine")
    for moment in range(20):

        def write(moment: int = moment) -> None:
            with (atomic_dir if moment % 2 else atomic_file)(tmp_path / f"result-{moment}") as temporary:
                (temporary / "half" if moment % 2 else temporary).write_text("half")
                os.kill(os.getpid(), signal.SIGKILL)

        assert forked(write).returncode == -signal.SIGKILL
    assert len(leftovers(tmp_path)) == 22
    sweep(tmp_path)
    assert leftovers(tmp_path) == [".notes.tmp", ".x.old"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"[]," * (1 << 21) + b"[]}", "objects and lists"),
        (b'{"a": "' + b"x" * (1 << 26) + b'"}', "bytes"),
        (b'{"a": ' + b"9" * 5000 + b"}", "damaged"),
        (b'{"a": "\xff"}', "damaged"),
        (b"[1]", "expected an object"),
        (b"", "damaged"),
    ],
)
def test_json_is_read_within_bounds(tmp_path, data, message):
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as refusal:
        read_json(path)
    assert len(str(refusal.value).splitlines()) == 1


def _aged(path: Path, content: bytes) -> Path:
    """A file that was last written a minute ago."""
    path.write_bytes(content)
    os.utime(path, ns=(time.time_ns() - 60 * 10**9,) * 2)
    return path


def test_a_file_that_stayed_the_same_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _aged(tmp_path / "x", b"a")
    opened: list[object] = []
    monkeypatch.setattr(files_module, "open", lambda *a: opened.append(a) or open(*a), raising=False)  # noqa: SIM115
    first = sha256_file(path)  # its inode was changed just now: it could change again in the same tick
    assert sha256_file(path) == first == hashlib.sha256(b"a").hexdigest()
    assert len(opened) == 2
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 60 * 10**9)
    assert [sha256_file(path) for _ in range(3)] == [first] * 3
    assert len(opened) == 3


def test_a_changed_file_is_hashed_again_even_when_size_and_time_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _aged(tmp_path / "x", b"a")
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 60 * 10**9)
    kept = path.stat()
    first = sha256_file(path)
    assert sha256_file(path) == first
    wait(0.05)  # a few ticks of the file system's clock
    with open(path, "r+b") as file:
        file.write(b"b")
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert sha256_file(path) == hashlib.sha256(b"b").hexdigest() != first


@pytest.mark.timeout(60)
def test_what_is_no_regular_file_is_refused_unread(tmp_path: Path) -> None:
    """A pipe that nobody writes to would be waited for, a device never ends; in a directory they are no files."""
    os.mkfifo(tmp_path / "pipe")
    for odd in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match="not a regular file"):
            read_regular(odd, most=10)
        with pytest.raises(OSError, match="not a regular file"):
            sha256_file(odd)
    (tmp_path / "x").write_bytes(b"12345")
    assert read_regular(tmp_path / "x", most=5) == b"12345"
    with pytest.raises(ValueError, match="5 bytes, at most 4 are read"):
        read_regular(tmp_path / "x", most=4)
    assert sha256_path(tmp_path) == sha256_path(tmp_path)
