"""Files that are either whole or absent, and their digests.

Everything is written under a temporary name in the same directory, fsynced and renamed (POSIX rename is atomic), so a
crash, ctrl-C or a full disk never leaves a half-written result under its final name. Temporary names start with
`.so8t-`; `sweep` removes such names and no others.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from so8t_core.errors import InputError

_TICKS = 3_000_000_000  # ns; the coarsest clocks of file systems tick every two seconds
_known: dict[tuple[int, int, int, int, int], str] = {}
_TEMPORARY = re.compile(r"\.so8t-.+\.[a-z0-9_]{8}\.(tmp|old)", re.DOTALL)  # tempfile draws eight characters
MAX_JSON = 1 << 26  # bytes of a JSON file: the index of a model of 10^12 weights has about 15 MB
MAX_CONTAINERS = 1 << 21  # objects and lists of a JSON file; a tokenizer of 262,144 tokens has 500,000 merges


def sha256_file(path: str | Path) -> str:
    """Hex digest of a file's bytes.

    A run asks for its base checkpoint's digest in five places. A file that this process has hashed is not read again
    while its device, inode, size and both times stay the same. A file that changed in the last seconds is always read,
    because a second change could fall into the same tick of the file system's clock.

    Raises:
        OSError: the file cannot be read, or is no regular file (a pipe may wait for ever, a device may never end).
    """
    before = _identity(path)
    if before in _known:
        return _known[before]
    settled = time.time_ns() - max(before[3:]) > _TICKS
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if settled and _identity(path) == before:
        _known[before] = digest
    return digest


def _identity(path: str | Path) -> tuple[int, int, int, int, int]:
    """(device, inode, bytes, time of the last write, time of the last change of any kind)."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def sha256_path(path: str | Path) -> str:
    """Digest of a file, or of a directory: sha256 over lines `<sha256>  <relative name>` in the order of the names.

    Raises:
        FileNotFoundError: nothing is there (an absent directory must not look like an empty one).
    """
    path = Path(path)
    if not path.is_dir():
        return sha256_file(path)
    names = sorted(p for p in path.rglob("*") if p.is_file())
    lines = "".join(f"{sha256_file(p)}  {p.relative_to(path).as_posix()}\n" for p in names)
    return hashlib.sha256(lines.encode()).hexdigest()


def size_of(path: str | Path) -> int:
    """Bytes of a file, or of all files below a directory; FileNotFoundError when nothing is there."""
    path = Path(path)
    return path.stat().st_size if not path.is_dir() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


@contextmanager
def explain_os_errors(target: Path) -> Iterator[None]:
    """Turn a full disk, a read-only place, a missing right or a wrong kind of path into an `InputError`."""
    try:
        yield
    except OSError as error:
        reason = {
            errno.ENOSPC: "no space left on the device",
            errno.EDQUOT: "the disk quota is used up",
            errno.EROFS: "the file system is read-only",
            errno.EACCES: "permission denied",
            errno.EPERM: "permission denied",
            errno.EFBIG: "the file grows over the limit of the file system or of the user",
            errno.ENOTDIR: "a part of the path is a file, not a directory",
            errno.EEXIST: "a part of the path is a file, not a directory",
            errno.EISDIR: "there is a directory of this name",
        }.get(error.errno or 0)
        if reason is None:
            raise
        culprit = f" ({error.filename})" if error.filename else ""  # may be a file that was read, not `target`
        raise InputError(
            f"cannot write {target}: {reason}{culprit}. Nothing was left half-written; choose another place."
        ) from error


def temporary_prefix(path: Path) -> str:
    """First part of the temporary names for `path`. `sweep` knows such a name with tempfile's eight characters and
    `.tmp` or `.old` behind it."""
    return f".so8t-{path.name[:40]}."


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it over `path`, otherwise remove it.

    Raises:
        InputError: no space, read-only, permission denied.
    """
    path = Path(path)
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=temporary_prefix(path), suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o644)
            fsync(temporary)
            os.replace(temporary, path)
            fsync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary directory beside `path`; on success it replaces `path` whole.

    An existing directory is replaced with everything it holds; when anything fails, it stays as it was.

    Raises:
        InputError: `path` is a file, no space, read-only, permission denied.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"cannot write the directory {path}: there is a file of this name; choose another place")
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=temporary_prefix(path), suffix=".tmp", dir=path.parent))
        try:
            yield temporary
            temporary.chmod(0o755)
            for inside in (*temporary.rglob("*"), temporary):
                fsync(inside)
            _swap(temporary, path)
            fsync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, path: Path) -> None:
    """Rename `new` to `path`, and the directory that was `path` to `new`. A whole `path` exists at every moment.

    Several processes may swap at once: the last one wins.
    """
    while True:
        try:
            return _exchange(new, path)
        except FileNotFoundError:  # nothing is there yet
            pass
        try:
            return os.rename(new, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process was faster: swap with its result
                raise


def _exchange(new: Path, path: Path) -> None:
    """Exchange two names in one step by Linux's renameat2(2), in three steps where the system or the file system lacks
    that call.
    """
    here, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        if ctypes.CDLL(None, use_errno=True).renameat2(here, os.fsencode(new), here, os.fsencode(path), both) == 0:
            return
        code = ctypes.get_errno()
    except AttributeError:
        code = errno.ENOSYS
    if code not in (errno.ENOSYS, errno.EINVAL):
        raise OSError(code, os.strerror(code), str(path))
    aside = Path(tempfile.mkdtemp(prefix=temporary_prefix(path), suffix=".old", dir=path.parent))
    try:
        os.replace(path, aside / "was")
        try:
            os.replace(new, path)
        except BaseException:
            os.replace(aside / "was", path)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def sweep(directory: Path) -> None:
    """Remove the temporary files that a killed process left in `directory`; its caller must be its sole user."""
    for leftover in directory.iterdir() if directory.is_dir() else ():
        if _TEMPORARY.fullmatch(leftover.name) is None:
            continue
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_regular(path: str | Path, *, most: int) -> bytes:
    """The bytes of a regular file that a stranger may have made.

    A pipe without a writer may wait for ever, and a device may never end: both are refused unread.

    Raises:
        OSError: the file cannot be read, or is no regular file.
        ValueError: it has more than `most` bytes; the message names both sizes.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        with open(handle, "rb", closefd=False) as stream:
            data = stream.read(most + 1)
    finally:
        os.close(handle)
    if len(data) > most:
        raise ValueError(f"{max(found.st_size, len(data))} bytes, at most {most} are read")
    return data


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: the file is missing, longer than `MAX_JSON`, has more than `MAX_CONTAINERS` objects and lists, is
            nested too deeply, is not UTF-8 or not JSON, or holds no object.
    """
    try:
        raw = read_regular(path, most=MAX_JSON)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise InputError(f"{path} has more than {MAX_JSON} bytes, the most that is read of a JSON file") from None
    if raw.count(b"{") + raw.count(b"[") > MAX_CONTAINERS:
        raise InputError(f"{path} has more than {MAX_CONTAINERS} objects and lists, the most that are read")
    try:
        fields = json.loads(raw.decode("utf-8"))
    except RecursionError:
        raise InputError(f"{path} is damaged: its lists or objects are nested too deeply") from None
    except ValueError as error:  # not UTF-8, not JSON, a number of more digits than Python reads
        raise InputError(f"{path} is damaged: {error}") from None
    if not isinstance(fields, dict):
        raise InputError(f"{path} is damaged: expected an object, got {type(fields).__name__}")
    return fields


def fsync(path: Path) -> None:
    """Flush a file or directory to the device."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
