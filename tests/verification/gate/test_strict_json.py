"""JSON of strangers: what two readers would understand in two ways, or what only costs, is refused in one line."""

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path

import pytest

from verification.gate.strict_json import MAX_BYTES, MAX_DEPTH, MAX_MARKS, MAX_VALUES, parse, read_json

REFUSED = {
    "nothing": (b"", "Expecting value"),
    "cut": (b'{"a": 1', "Expecting ',' delimiter"),
    "two values": (b"{} {}", "Extra data"),
    "a key twice": (b'{"a": 1, "b": 2, "a": 1}', "the key 'a' stands twice in one object"),
    "a key twice, deep": (b'[{"x": {"verdict": "fail", "verdict": "pass"}}]', "the key 'verdict' stands twice"),
    "a key twice, once escaped": (b'{"a": 1, "\\u0061": 2}', "the key 'a' stands twice"),
    "NaN": (b'{"a": NaN}', "NaN is not a JSON number"),
    "Infinity": (b"[-Infinity]", "-Infinity is not a JSON number"),
    "a large integer": (str(1 << 63).encode(), "the number 9223372036854775808 has more than 64 bits"),
    "a small integer": (str(-(1 << 63) - 1).encode(), "has more than 64 bits"),
    "an endless integer": (b"9" * 100_000, "has more than 64 bits"),
    "a large number": (b"1e999", "the number 1e999 is beyond a double's range"),
    "not UTF-8": (b'{"a": "\xff"}', "'utf-8' codec can't decode byte 0xff"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "'utf-8' codec can't decode byte 0xff"),
    "a byte order mark": (b'\xef\xbb\xbf{"a": 1}', "Unexpected UTF-8 BOM"),
    "a control character": (b'"a\nb"', "Invalid control character"),
    "a comment": (b'{"a": 1} // b', "Extra data"),
    "a comma too many": (b"[1, 2,]", "Expecting value|Illegal trailing comma"),
    "single quotes": (b"{'a': 1}", "Expecting property name"),
    "nesting": (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), f"nested deeper than {MAX_DEPTH} levels"),
    "much nesting": (b'{"a":' * 1_000_000, f"nested deeper than {MAX_DEPTH} levels"),
    "values": (b"[" + b"1," * MAX_VALUES + b"1]", f"values, at most {MAX_VALUES} are read"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_strict_json_is_refused_in_a_line(what: str) -> None:
    data, message = REFUSED[what]
    with pytest.raises(ValueError, match=message) as refused:
        parse(data)
    assert len(str(refused.value).splitlines()) == 1
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, "x", None, True, {"a": 1}], "b": {"a": 1}},
        [],
        "",
        0,
        -(1 << 63),
        (1 << 63) - 1,
        1.7e308,
        '"[[[{{{,,,\\',
        ["[" * 100] * 3,
        {'\\"': "\\"},
        "\ud800",
        "é\u2028",
    ],
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_strict_json_is_read_as_it_is(value: object, ascii_only: bool) -> None:
    """Brackets inside of texts are no nesting; a lone surrogate stands for a byte of a file's name."""
    if value == "\ud800" and not ascii_only:
        return
    assert parse(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


def test_the_bounds_themselves_are_inside() -> None:
    deep = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert json.dumps(parse(deep)).replace(" ", "").encode() == deep
    assert len(parse(b"[" + b"1," * (MAX_VALUES - 2) + b"1]")) == MAX_VALUES - 1


def test_a_file_is_read_only_when_it_is_one_and_small_enough(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b'"' + b"x" * 8 + b'"')
    assert read_json(path, most=10) == "x" * 8
    with pytest.raises(ValueError, match="10 bytes, at most 9 are read"):
        read_json(path, most=9)
    with path.open("wb") as stream:
        stream.truncate(1 << 40)  # a sparse terabyte
    with pytest.raises(ValueError, match=f"{1 << 40} bytes, at most {MAX_BYTES} are read"):
        read_json(path)
    os.mkfifo(tmp_path / "pipe")
    for odd in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"):
            read_json(odd)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "gone")


DEAR = {
    "list": b"[]",
    "object": b"{}",
    "pair": b'{"a":1}',
    "escape": b'"\\u1234"',
    "number": b"1.5",
    "emoji": b'"\xf0\x9f\x98\x80"',
    "texts": b'{"a":"b"}',
}


def test_quotation_marks_are_counted_before_texts_are_cut_out() -> None:
    """Thirty million of them took a gigabyte."""
    with pytest.raises(ValueError, match=f"{MAX_MARKS + 1} quotation marks, at most {MAX_MARKS} are read"):
        parse(b'"' * (MAX_MARKS + 1))


@pytest.mark.parametrize("kind", DEAR)
def test_the_dearest_file_inside_the_bounds_stays_cheap(kind: str, tmp_path: Path) -> None:
    """Seconds and memory of the worst values that the budgets let through, in a process of its own."""
    unit = DEAR[kind]
    each = 1 + unit.count(b"[") + unit.count(b"{") + unit.count(b",")
    count = min(MAX_VALUES // each, MAX_BYTES // (len(unit) + 1)) - 2
    path = tmp_path / "x.json"
    path.write_bytes(b"[" + b",".join([unit] * count) + b"]")
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        try:
            kept = read_json(path)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            os.write(write, json.dumps([len(kept), grown >> 10, time.process_time() - begin]).encode())
        finally:
            os._exit(0)
    os.close(write)
    answer = os.read(read, 1000)
    os.waitpid(child, 0)
    length, grown, seconds = json.loads(answer)
    assert length == count
    assert grown < 400  # MiB
    assert seconds < 5
