"""Damaged headers of small GGUF files: each is read whole or refused in at most two lines, and nothing else happens."""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path

import pytest
from tiny_gguf import write_tiny, write_wide

from so8t_core.errors import InputError
from verification.gguf.reader import read_gguf

_NUMBERS = (0, 1, 2, 5, 9, 48, 255, 1 << 16, 1 << 30, (1 << 31) - 1, (1 << 32) - 1, 1 << 33, (1 << 63), (1 << 64) - 1)
_TEXTS = (b"\0", b"\xff", b"blk.4", "²".encode(), b"\n", b"general.alignment", b"", b"tokenizer.ggml.tokens")


def mutate(data: bytes, header: int, rng: random.Random) -> bytes:
    """One to four changes in the header: a bit, a number, a text, a cut, or one stretch copied over another."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(header, len(changed)) or 1)
        what = rng.randrange(5)
        if what == 0 and changed:
            changed[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            packed = struct.pack("<Q", rng.choice(_NUMBERS))[: rng.choice((1, 4, 8))]
            changed[at : at + len(packed)] = packed
        elif what == 2:
            new = rng.choice(_TEXTS)
            changed[at : at + len(new)] = new
        elif what == 3 and rng.random() < 0.2:
            del changed[at:]
        elif what == 4:
            size, source = rng.randint(1, 64), rng.randrange(header)
            changed[at : at + size] = data[source : source + size]
    return bytes(changed)


def fuzz(folder: Path, count: int) -> tuple[int, int]:
    """(files read whole, files refused); anything else is raised."""
    seeds = []
    for path in (write_tiny(folder / "a.gguf"), write_wide(folder / "b.gguf")):
        seeds.append((path.read_bytes(), read_gguf(path).header))
    rng, read, refused, target = random.Random(21), 0, 0, folder / "x.gguf"
    for _ in range(count):
        data = mutate(*rng.choice(seeds), rng)
        target.unlink(missing_ok=True)
        target.write_bytes(data)
        begin = time.perf_counter()
        try:
            file = read_gguf(target)
            for tensor in file.tensors.values():
                tensor.values()
            read += 1
        except InputError as error:
            lines = len(str(error).splitlines())
            refused += 1
        else:
            lines = 0
        assert lines <= 2
        assert time.perf_counter() - begin < 5
    return read, refused


def test_a_damaged_header_is_read_or_refused(tmp_path: Path) -> None:
    read, refused = fuzz(tmp_path, 500)
    assert read > 20
    assert refused > 200


@pytest.mark.soak
def test_many_damaged_headers_are_read_or_refused(tmp_path: Path) -> None:
    fuzz(tmp_path, 200_000)
