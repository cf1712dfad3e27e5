"""Reads JSON from an untrusted source, with bounds and more strictly than Python's reader.

JSON that two readers would understand differently, or that costs too much, is refused: duplicate keys in an object, the
words NaN and Infinity, numbers that fit neither a double nor a 64-bit integer, text that is not UTF-8, and nesting,
counts and sizes larger than in any report. Source: RFC 8259, sections 4 and 6.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from so8t_core.files import read_regular

MAX_BYTES = 32 << 20  # a report of 25 files with 1,100 tensors each has 10 MB
MAX_VALUES = 1_000_000  # that report has 400,000; a million of the largest values take 250 MB of memory
MAX_MARKS = 4 * MAX_VALUES  # quotation marks: two around every key and every text
MAX_DEPTH = 32  # a report has 8

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)


def read_json(path: Path, *, most: int = MAX_BYTES) -> Any:
    """The value in a file.

    Args:
        most: largest size of the file in bytes.

    Raises:
        OSError: the file cannot be read, or is not a regular file.
        ValueError: the file is not strict JSON, or exceeds the bounds above; the message says why in one line.
    """
    return parse(read_regular(path, most=most))


def parse(data: bytes) -> Any:
    """The value of JSON in UTF-8 bytes.

    Raises:
        ValueError: see `read_json`.
    """
    _within_budget(data)
    return json.loads(
        data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer, parse_float=_real
    )


def _within_budget(data: bytes) -> None:
    """Check nesting and number of values before any value is built."""
    if (marks := data.count(b'"')) > MAX_MARKS:  # texts are removed below, and each takes memory
        raise ValueError(f"{marks} quotation marks, at most {MAX_MARKS} are read")
    bare = _STRING.sub(b"", data)
    if (values := bare.count(b",") + bare.count(b"[") + bare.count(b"{")) > MAX_VALUES:
        raise ValueError(f"{values} values, at most {MAX_VALUES} are read")
    depth = 0
    for mark in re.finditer(rb"[\[\]{}]", bare):
        depth += 1 if mark[0] in b"[{" else -1
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:80]!r} stands twice in one object")
    return found


def _constant(word: str) -> Any:
    raise ValueError(f"{word} is not a JSON number")


def _integer(digits: str) -> int:
    if len(digits) > 20 or not -(1 << 63) <= int(digits) < 1 << 63:
        raise ValueError(f"the number {digits[:24]} has more than 64 bits")
    return int(digits)


def _real(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:24]} is beyond a double's range")
    return value
