"""The audit log: append-only JSON Lines, one record for each decision, hash-chained, on disk before an answer leaves.

Line = canonical JSON (sorted keys, no spaces, ASCII) of {..., "seq": n, "prev": hash of line n-1, "hash": h}, where h
is the SHA-256 of the same object without "hash"; seq starts at 0 and prev with 64 zeros. So an edit, a reordering, a
removal or a cut at any byte breaks the chain, except the removal of whole lines at the end. A head file shows that:
`FILE.head` holds `seq:hash` of the last line and is overwritten after each append; `--expect-head` takes a head that
was kept elsewhere. After a crash the log may be ahead of its head file, but the head file is never ahead of the log.
A crash cut a line without its newline before its answer left: a restart removes the line and writes a record
"recovered" with its length and SHA-256.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import hmac
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from so8t_core.errors import InputError
from so8t_core.files import fsync

GENESIS = "0" * 64


class Tampered(Exception):
    """The log was changed after it was written; the message names the line and the fault."""


class Unavailable(Exception):
    """The log cannot be written now, so no request may be answered."""


@dataclass(frozen=True)
class Head:
    """The last line's place in the chain; as text `seq:hash`."""

    seq: int = -1  # of the last line; -1 = no line yet
    hash: str = GENESIS

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """Read `seq:hash`.

        Raises:
            InputError: the text is no head.
        """
        seq, _, digest = text.strip().partition(":")
        if not seq.isdecimal() or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise InputError(f"{text.strip()[:80]!r} is no head of an audit log; expected SEQ:SHA256")
        return cls(int(seq), digest)


def bucket(count: int | None) -> str | None:
    """A token count as the log stores it: the next power of two, at least 16."""
    return None if count is None else f"<={max(16, 1 << max(count - 1, 0).bit_length())}"


def thinking_hmac(key: bytes, thinking: bytes) -> str:
    """HMAC-SHA256 of a thinking; without a key, a short thinking could be guessed from its hash."""
    return hmac.new(key, thinking, hashlib.sha256).hexdigest()


def head_path(log: Path) -> Path:
    """The file beside a log that holds its head."""
    return log.with_name(log.name + ".head")


def _write(handle: int, data: bytes) -> None:
    """Write all bytes: a single system call may write only some, as on a disk that is nearly full."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


def _canonical(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":")).encode()


def _sealed(record: Mapping[str, Any], after: Head) -> tuple[bytes, Head]:
    body = {**record, "seq": after.seq + 1, "prev": after.hash}
    digest = hashlib.sha256(_canonical(body)).hexdigest()
    return _canonical({**body, "hash": digest}) + b"\n", Head(after.seq + 1, digest)


def _check(line: bytes, after: Head) -> Head:
    """The head after a complete line.

    Raises:
        Tampered: the line does not follow `after`.
    """
    number = after.seq + 2
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise Tampered(f"line {number} is not JSON") from None
    if not isinstance(record, dict):
        raise Tampered(f"line {number} is no record")
    if record.pop("prev", None) != after.hash or record.pop("seq", None) != after.seq + 1:
        raise Tampered(f"line {number} does not follow the line before it: one was removed, added or moved")
    record.pop("hash", None)
    sealed, head = _sealed(record, after)
    if sealed != line:
        raise Tampered(f"line {number} was edited: its hash does not fit it")
    return head


def _heads(path: Path) -> Iterator[tuple[Head, bytes]]:
    """(head after the line, b"") for each complete line, then (last head, rest) if bytes follow the last newline."""
    head = Head()
    with open(path, "rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                yield head, line
                return
            head = _check(line, head)
            yield head, b""


def verify(path: Path, *, expect: Head | None = None) -> Head:
    """Check the log's chain, its head file and, if given, a head that was kept elsewhere.

    Raises:
        Tampered: a byte was changed, or lines are missing at the end.
        InputError: there is no such file.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; give the log that was named with --audit-log")
    wanted = {"the expected head": expect} if expect else {}
    try:
        wanted["the head file"] = Head.parse(head_path(path).read_text(encoding="ascii"))
    except FileNotFoundError:
        raise Tampered(f"{head_path(path)} is missing: lines could have been taken off the end") from None
    except (UnicodeDecodeError, InputError):
        raise Tampered(f"{head_path(path)} is damaged") from None
    last = Head()
    for head, rest in _heads(path):
        if rest:
            raise Tampered(f"line {head.seq + 2} is cut after {len(rest)} bytes")
        last = head
        wanted = {name: mark for name, mark in wanted.items() if mark != head}
    for name, mark in wanted.items():
        raise Tampered(f"{name} {mark.seq}:{mark.hash[:12]}... is not in the log, which ends at line {last.seq + 1}")
    return last


class AuditLog:
    """The log, open for appending by this process alone.

    Raises:
        InputError: another process writes the log, it cannot be written, or it was changed.
    """

    def __init__(self, path: Path, *, opened: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.failed = False
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise InputError(
                f"cannot open the audit log {path}: {error.strerror}; choose another --audit-log"
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise InputError(f"another server writes the audit log {path}; give each one its own") from None
        try:
            torn = self._resume()
            self._head_file = os.open(head_path(path), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self.append(([{"event": "recovered", **torn}] if torn else []) + [{"event": "opened", **(opened or {})}])
            os.fsync(self._head_file)  # once, because it keeps its size
            fsync(path.parent)  # the names of both files
        except Tampered as error:
            os.close(self._file)
            way_out = "keep it for inspection and start with another --audit-log"
            raise InputError(f"the audit log {path} is not what was written: {error}; {way_out}") from None
        except (Unavailable, OSError) as error:
            os.close(self._file)
            raise InputError(f"cannot write the audit log {path}: {error}") from None

    def _resume(self) -> dict[str, Any]:
        """Find the end of the chain and cut the bytes that a crash left behind it; returns their description or {}."""
        head, rest = Head(), b""
        beside = head_path(self.path)
        known = beside.read_text(encoding="ascii", errors="replace").strip() if beside.is_file() else ""
        try:
            mark = Head.parse(known) if known else None  # missing or empty: killed before the first head
        except InputError:
            raise Tampered("its head file is damaged") from None
        seen = mark is None
        for head, rest in _heads(self.path):  # noqa: B007 - the last one is wanted
            seen = seen or head == mark
        self.head = head
        if not seen or (mark is None and head.seq > 1):  # the first write has at most two lines, then a head
            raise Tampered("lines are missing at its end" if mark else "its head file is missing")
        self._size = os.fstat(self._file).st_size - len(rest)
        os.ftruncate(self._file, self._size)
        return {"torn_bytes": len(rest), "torn_sha256": hashlib.sha256(rest).hexdigest()} if rest else {}

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write records, all or none, and return when they are on disk.

        Raises:
            Unavailable: full disk, lost device; the log stays as it was, and the next call tries again.
        """
        head, lines = self.head, []
        for record in [{"event": "resumed"}, *records] if self.failed else records:
            line, head = _sealed(record, head)
            lines.append(line)
        data = b"".join(lines)
        try:
            if self.failed:
                os.ftruncate(self._file, self._size)  # the failed write may have left a part behind
            _write(self._file, data)
            os.fdatasync(self._file)  # syncs bytes and size, not times
            self._write_head(head)
        except OSError as error:
            self.failed = True
            self._undo()
            raise Unavailable(error.strerror or type(error).__name__) from None
        self.head, self._size, self.failed = head, self._size + len(data), False

    def _undo(self) -> None:
        with suppress(OSError):  # `append` and the next start cut again before they write
            os.ftruncate(self._file, self._size)

    def _write_head(self, head: Head) -> None:
        """Overwrite the head by one unsynced write in one sector; an old head after a power cut is harmless."""
        line = f"{head.seq:020d}:{head.hash}\n".encode()  # fixed width
        if os.pwrite(self._head_file, line, 0) != len(line):
            raise OSError(errno.ENOSPC, "no space for the head file")

    def close(self) -> None:
        """Release the file; safe to call twice."""
        if self._file >= 0:
            os.close(self._file)
            os.close(self._head_file)
            self._file = -1
