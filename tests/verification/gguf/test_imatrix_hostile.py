"""Importance matrices in both forms: a damaged one is refused by name before anything is quantised with it."""

from __future__ import annotations

import math
import struct
import time
from pathlib import Path

import pytest
from gguf_bytes import Parts, Tensor
from tiny_gguf import importance, write_wide

from so8t_core.errors import InputError
from verification.engines.quantise import quantise
from verification.gguf.imatrix import read_imatrix

NAME = "blk.0.attn_q.weight"


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def legacy(*entries: tuple[str, int, bytes], count: int | None = None, values: int | None = None) -> bytes:
    """A .dat file: entries of (name, calls, values), with the numbers it states changed where asked for."""
    data = struct.pack("<i", len(entries) if count is None else count)
    for name, calls, found in entries:
        raw = name.encode("utf-8", "surrogateescape")
        data += struct.pack("<i", len(raw)) + raw + struct.pack("<i", calls)
        data += struct.pack("<i", len(found) // 4 if values is None else values) + found
    return data


ONE = floats(1.0, 2.0, 3.0, 4.0)
LEGACY = {
    "empty": (b"", "the number of entries needs 4 bytes at 0, the file has 0"),
    "cut in the name": (legacy((NAME, 1, ONE))[:15], "the name of entry 1 of 1 needs 19 bytes at 8, the file has 15"),
    "cut in the values": (legacy((NAME, 1, ONE))[:-1], f"{NAME} with 4 values needs 16 bytes"),
    "two billion entries": (legacy((NAME, 1, ONE), count=(1 << 31) - 1), "states 2147483647 entries, 1 to"),
    "minus one entry": (legacy((NAME, 1, ONE), count=-1), "states -1 entries"),
    "two billion values": (legacy((NAME, 1, ONE), values=(1 << 31) - 1), "2147483647 values needs 8589934588 bytes"),
    "minus one value": (legacy((NAME, 1, ONE), values=-1), f"{NAME} has -1 values"),
    "no value": (legacy((NAME, 1, b"")), f"{NAME} has 0 values"),
    "a name twice": (legacy((NAME, 1, ONE), (NAME, 1, ONE)), f"{NAME} occurs twice"),
    "NaN": (legacy((NAME, 1, floats(1.0, math.nan))), "holds NaN or infinite"),
    "an infinite value": (legacy((NAME, 1, floats(1.0, math.inf))), "holds NaN or infinite"),
    "a negative value": (legacy((NAME, 1, floats(1.0, -2.0))), "holds -2, a mean of squares is 0 or more"),
    "a name without a letter": (legacy(("", 1, ONE)), "has 0 bytes"),
    "a name with a NUL": (legacy(("a\0b", 1, ONE)), "holds a NUL"),
    "a name that is no text": (legacy(("\udcff", 1, ONE)), "not UTF-8"),
    "a long name": (legacy(("a" * 5000, 1, ONE)), "at most 63"),
    "not one": (b"PK\x03\x04" + bytes(100), "entries, 1 to"),
}


@pytest.mark.parametrize("name", LEGACY)
def test_a_damaged_dat_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    data, words = LEGACY[name]
    path = tmp_path / "m.dat"
    path.write_bytes(data)
    begin = time.process_time()
    with pytest.raises(InputError, match=r"importance matrix|tensor name") as refused:
        read_imatrix(path)
    assert words in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    assert time.process_time() - begin < 5


def test_a_healthy_dat_file_is_values_by_calls(tmp_path: Path) -> None:
    path = tmp_path / "m.dat"
    path.write_bytes(legacy((NAME, 4, ONE), ("x", 0, ONE)) + struct.pack("<ii", 4, 4) + b"text")
    found = read_imatrix(path)
    assert found[NAME].tolist() == [0.25, 0.5, 0.75, 1.0]
    assert found["x"].tolist() == [1.0, 2.0, 3.0, 4.0]


def matrix(sums: bytes, counts: bytes, *, shape: list[int] | None = None, kind: int = 0) -> Parts:
    whole = Parts()
    whole.tensors[f"{NAME}.in_sum2"] = Tensor(shape or [len(sums) // 4, 1], kind, sums)
    whole.tensors[f"{NAME}.counts"] = Tensor([1, len(counts) // 4], 0, counts)
    return whole


GGUF = {
    "NaN sums": (matrix(floats(1.0, math.nan), floats(1.0)), "holds NaN or infinite"),
    "a negative sum": (matrix(floats(1.0, -1.0), floats(1.0)), "holds -1, a mean"),
    "a NaN count": (matrix(ONE, floats(math.nan)), "has a count of nan"),
    "an infinite count": (matrix(ONE, floats(math.inf)), "has a count of inf"),
    "a negative count": (matrix(ONE, floats(-3.0)), "has a count of -3"),
    "counts that do not divide": (matrix(ONE, floats(1.0, 1.0, 1.0)), "3 counts for 4 sums"),
    "another type": (matrix(ONE, floats(1.0), shape=[8, 1], kind=1), "is not F32"),
}


@pytest.mark.parametrize("name", GGUF)
def test_a_damaged_gguf_matrix_is_refused_by_name(tmp_path: Path, name: str) -> None:
    whole, words = GGUF[name]
    with pytest.raises(InputError, match="importance matrix") as refused:
        read_imatrix(whole.write(tmp_path / "m.gguf"))
    assert words in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_a_matrix_without_counts_or_entries_is_refused(tmp_path: Path) -> None:
    whole = matrix(ONE, floats(1.0))
    del whole.tensors[f"{NAME}.counts"]
    with pytest.raises(InputError, match="lacks its counts"):
        read_imatrix(whole.write(tmp_path / "m.gguf"))
    with pytest.raises(InputError, match="no entry"):
        read_imatrix(Parts().write(tmp_path / "n.gguf"))


def test_a_matrix_of_another_width_is_refused_by_the_quantiser(tmp_path: Path) -> None:
    source = write_wide(tmp_path / "w.gguf")
    short = {name: values[:128] for name, values in importance().items()}
    with pytest.raises(InputError, match="imatrix size 128 is different"):
        quantise(source, tmp_path / "q.gguf", "Q4_K_M", imatrix=short)
