"""Laws of the audit log: any change to any byte shows, a crash anywhere loses nothing that was answered."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.serve import audit_log
from pipeline.serve.audit_log import AuditLog, Head, Tampered, Unavailable, bucket, head_path, thinking_hmac, verify
from pipeline.serve.audit_writer import Recorder
from so8t_core.errors import InputError

RECORD = {"event": "request", "id": "chatcmpl-0", "verdict": "released", "client": "アリス"}


def make(path: Path, count: int = 3) -> Head:
    log = AuditLog(path)
    for number in range(count):
        log.append([{**RECORD, "number": number}])
    log.close()
    return log.head


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "audit.jsonl"
    make(path)
    return path


def test_format_is_as_documented(log: Path) -> None:
    previous = "0" * 64
    for seq, line in enumerate(log.read_bytes().splitlines()):
        record = json.loads(line)
        assert line == json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
        digest = record.pop("hash")
        assert (record["seq"], record["prev"]) == (seq, previous)
        canonical = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
        previous = hashlib.sha256(canonical).hexdigest()
        assert digest == previous
    assert head_path(log).read_text() == f"{3:020d}:{previous}\n"
    assert log.stat().st_mode & 0o077 == 0


def test_untouched_log_verifies_and_gives_its_head(log: Path) -> None:
    assert verify(log) == Head.parse(head_path(log).read_text())
    assert verify(log, expect=verify(log)) == verify(log)


def test_cut_at_any_byte_is_found(log: Path) -> None:
    for size in reversed(range(log.stat().st_size)):
        os.truncate(log, size)
        with pytest.raises(Tampered):
            verify(log)


def test_any_changed_byte_is_found(log: Path) -> None:
    whole = log.read_bytes()
    with open(log, "r+b", buffering=0) as file:
        for at in range(len(whole)):
            for change in (whole[at] ^ 1, ord(" "), ord("\n")):
                if change != whole[at]:
                    file.seek(at)
                    file.write(bytes([change]))
                    with pytest.raises(Tampered):
                        verify(log)
            file.seek(at)
            file.write(whole[at : at + 1])
    verify(log)


def test_moved_removed_repeated_and_added_lines_are_found(log: Path) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    rng = random.Random(0)
    seen = set()
    for _ in range(300):
        changed = list(lines)
        match rng.randrange(4):
            case 0:
                rng.shuffle(changed)
            case 1:
                del changed[rng.randrange(len(changed))]
            case 2:
                changed.insert(rng.randrange(len(changed) + 1), rng.choice(lines))
            case 3:
                changed.insert(
                    rng.randrange(len(changed) + 1), rng.choice([b"{}\n", b"\n", b"[]\n", b'"x"\n', b"[" * 9999])
                )
        if changed == lines:
            continue
        seen.add(len(changed))
        log.write_bytes(b"".join(changed))
        with pytest.raises(Tampered):
            verify(log)
    assert seen == {3, 4, 5}


def test_forged_chain_is_found_by_a_head_kept_elsewhere_only(log: Path, tmp_path: Path) -> None:
    kept = verify(log)
    forged = tmp_path / "forged.jsonl"
    make(forged, 2)  # whoever can write both files can write a new history, with a head that fits it
    shutil.copyfile(forged, log)
    shutil.copyfile(head_path(forged), head_path(log))
    verify(log)
    with pytest.raises(Tampered, match="expected head"):
        verify(log, expect=kept)


def test_an_old_head_is_found_in_a_log_that_grew(log: Path) -> None:
    kept = verify(log)
    make(log, 2)
    assert verify(log, expect=kept).seq == kept.seq + 3


def test_missing_or_damaged_head_file_is_found(log: Path) -> None:
    for text in ("", "x", "3:abc", "-1:" + "0" * 64, head_path(log).read_text().replace("3:", "2:", 1), "\xff"):
        head_path(log).write_text(text, encoding="latin-1")
        with pytest.raises(Tampered):
            verify(log)
    head_path(log).unlink()
    with pytest.raises(Tampered, match="missing"):
        verify(log)


@pytest.mark.parametrize("planted", ["hash", "order", "torn", "head"])
def test_a_weaker_verification_would_miss_it(log: Path, planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The controls of the laws above: take one check away and its fault passes."""
    whole = log.read_bytes()
    lines = whole.splitlines(keepends=True)
    changed = {
        "hash": whole.replace(b"released", b"withheld"),
        "order": b"".join([lines[1], lines[0], *lines[2:]]),
        "torn": whole + b"{",
        "head": b"".join(lines[:-1]),
    }[planted]
    log.write_bytes(changed)
    with pytest.raises(Tampered):
        verify(log)
    if planted in ("hash", "order"):
        monkeypatch.setattr(audit_log, "_check", lambda line, after: Head(after.seq + 1, json.loads(line)["hash"]))
    elif planted == "torn":
        original = audit_log._heads
        monkeypatch.setattr(audit_log, "_heads", lambda path: (pair for pair in original(path) if not pair[1]))
    else:
        monkeypatch.setattr(audit_log, "head_path", lambda path: path.with_name("other"))
        (log.parent / "other").write_text(f"2:{json.loads(lines[2])['hash']}")
    verify(log)


def test_crash_at_any_byte_is_mended_and_said(tmp_path: Path) -> None:
    """What SIGKILL or a power cut can leave: the last line cut anywhere, with the head file of the line before."""
    path = tmp_path / "audit.jsonl"
    make(path, 2)
    before, head = path.read_bytes(), head_path(path).read_bytes()
    log = AuditLog(path)
    log.close()
    last = path.read_bytes()[len(before) :]
    for size in sorted({0, 1, 2, *range(5, len(last), 9), len(last) - 2, len(last) - 1, len(last)}):
        path.write_bytes(before + last[:size])
        head_path(path).write_bytes(head)
        log = AuditLog(path)
        log.append([RECORD])
        log.close()
        verify(path)
        events = [json.loads(line) for line in path.read_bytes().splitlines()]
        assert path.read_bytes().startswith(before)
        torn = 0 < size < len(last)
        assert [e["event"] == "recovered" for e in events[3:]] == (
            [True, False, False] if torn else [False] * len(events[3:])
        )
        if torn:
            assert (events[3]["torn_bytes"], events[3]["torn_sha256"]) == (
                size,
                hashlib.sha256(last[:size]).hexdigest(),
            )


def test_killed_before_the_first_head_it_starts_again(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for lines in (0, 1):
        make(path, lines)
        head_path(path).write_text("")
        if lines:
            with pytest.raises(InputError, match="head file is missing"):  # no first start any more
                AuditLog(path)
        else:
            AuditLog(path).close()
            verify(path)
    head_path(path).write_bytes(b"\xff" * 86)
    with pytest.raises(InputError, match="head file is damaged"):
        AuditLog(path)


def test_a_line_that_was_answered_cannot_be_cut_off_as_if_by_a_crash(log: Path) -> None:
    whole = log.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for size in (len(whole) - 1, len(whole) - last, len(whole) - last - 1, 0):  # the head file knows better
        log.write_bytes(whole[:size])
        with pytest.raises(InputError, match="not what was written"):
            AuditLog(log)
        assert log.read_bytes() == whole[:size]


def test_a_damaged_log_is_not_gone_on_with(log: Path) -> None:
    damaged = log.read_bytes().replace(b"released", b"withheld", 1)
    log.write_bytes(damaged)
    with pytest.raises(InputError, match="line 2 was edited"):
        AuditLog(log)
    assert log.read_bytes() == damaged
    log.unlink()
    with pytest.raises(InputError, match="lines are missing"):  # the head file remembers
        AuditLog(log)


def test_two_writers_are_refused(log: Path) -> None:
    first = AuditLog(log)
    with pytest.raises(InputError, match="another server"):
        AuditLog(log)
    first.close()
    AuditLog(log).close()


@pytest.mark.parametrize("call", ["write", "fdatasync", "pwrite"])
def test_full_disk_is_refused_and_leaves_the_log_whole(log: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = AuditLog(log)
    before, original = log.read_bytes(), getattr(os, call)

    def full(*arguments: Any) -> Any:
        if call == "write":
            original(arguments[0], bytes(arguments[1])[:7])  # a part gets through
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    for _ in range(2):
        with pytest.raises(Unavailable, match="No space left"):
            opened.append([RECORD])
        assert opened.failed
        assert log.read_bytes() == before
    monkeypatch.setattr(os, call, original)
    opened.append([RECORD])
    assert not opened.failed
    opened.close()
    verify(log)
    assert [json.loads(line)["event"] for line in log.read_bytes().splitlines()][-2:] == ["resumed", "request"]


def test_a_real_limit_on_the_file_refuses_as_well(tmp_path: Path) -> None:
    """RLIMIT_FSIZE in a process of its own: the kernel itself takes a part of a line and then no more."""
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from pipeline.serve.audit_log import AuditLog, Unavailable, verify\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); path = Path(sys.argv[1])\n"
        "log = AuditLog(path); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY)); done = 0\n"
        "try:\n    while True: log.append([{'event': 'x', 'n': done}]); done += 1\n"
        "except Unavailable: pass\n"
        "assert done == verify(path).seq > 1, done\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)\n"
        "log.append([{'event': 'x'}]); assert verify(path).seq == done + 2\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.jsonl")], check=True, timeout=60)


WRITER = (
    "import os, sys, asyncio; from pathlib import Path\n"
    "from pipeline.serve.audit_log import AuditLog\n"
    "from pipeline.serve.audit_writer import Recorder\n"
    "async def main():\n"
    "    recorder = Recorder(AuditLog(Path(sys.argv[1]))); n = 0\n"
    "    async def one(i):\n"
    "        await recorder.record({'event': 'request', 'id': f'{os.getpid()}-{i}', 'fill': 'x' * (i * 37 % 900)})\n"
    "        os.write(1, f'{os.getpid()}-{i}\\n'.encode())\n"  # the answer
    "    while True:\n"
    "        await asyncio.gather(*(one(n + i) for i in range(4))); n += 4\n"
    "asyncio.run(main())\n"
)


def kill_and_examine(path: Path, seconds: float) -> int:
    """Start a writer, SIGKILL it; every answer it gave must be in the log. Returns how many there were."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    first = process.stdout.readline()
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    answered = [line for line in [first, *process.stdout] if line.endswith(b"\n")]
    process.wait()
    AuditLog(path).close()  # the restart mends
    verify(path)
    known = {json.loads(line).get("id") for line in path.read_bytes().splitlines()}
    assert {line.decode().strip() for line in answered} <= known
    return len(answered)


def test_killed_writers_lose_no_answered_record(tmp_path: Path) -> None:
    rng = random.Random(0)
    assert sum(kill_and_examine(tmp_path / "a.jsonl", rng.uniform(0, 0.05)) for _ in range(5)) >= 5


@pytest.mark.soak
def test_two_hundred_random_kills_lose_no_answered_record(tmp_path: Path) -> None:
    rng = random.Random(1)
    assert sum(kill_and_examine(tmp_path / f"a{n // 20}.jsonl", rng.uniform(0, 0.1)) for n in range(200)) >= 200


def test_records_of_many_requests_share_a_write_and_keep_their_order(tmp_path: Path) -> None:
    async def scenario() -> int:
        log = AuditLog(tmp_path / "a.jsonl")
        writes = 0
        original = log.append

        def counted(records: Any) -> None:
            nonlocal writes
            writes += 1
            original(records)

        log.append = counted  # type: ignore[method-assign]
        recorder = Recorder(log)
        await asyncio.gather(*(recorder.record({"n": n}) for n in range(100)))
        await recorder.close()
        return writes

    assert asyncio.run(scenario()) < 10
    verify(tmp_path / "a.jsonl")
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["n"] for line in lines[1:]] == list(range(100))


@pytest.mark.parametrize(
    ("count", "found"),
    [(None, None), (0, "<=16"), (16, "<=16"), (17, "<=32"), (32, "<=32"), (33, "<=64"), (4096, "<=4096")],
)
def test_buckets_are_powers_of_two(count: int | None, found: str | None) -> None:
    assert bucket(count) == found


def test_hmac_is_the_standard_one_under_the_key() -> None:
    # RFC 4231, test case 2
    expected = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    assert thinking_hmac(b"Jefe", b"what do ya want for nothing?") == expected
    assert thinking_hmac(b"x" * 32, b"37") != thinking_hmac(b"y" * 32, b"37") != hashlib.sha256(b"37").hexdigest()


def test_head_is_parsed_strictly() -> None:
    good = Head(3, "a" * 64)
    assert Head.parse(f" {good}\n") == good
    for text in ("", "3", f"x:{'a' * 64}", f"3:{'a' * 63}", f"3:{'A' * 64}", f"-3:{'a' * 64}"):
        with pytest.raises(InputError, match="SEQ:SHA256"):
            Head.parse(text)
