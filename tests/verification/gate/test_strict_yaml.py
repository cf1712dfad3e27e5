"""YAML of one meaning: what is read, and what is refused in which words."""

from __future__ import annotations

import datetime
import time
from typing import Any

import pytest

from verification.gate.strict_yaml import MAX_DEPTH, MAX_NUMBER, NotYaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("a: 1\nb: [x, 2.5, true, null]\nc: {d: 'e'}", {"a": 1, "b": ["x", 2.5, True, None], "c": {"d": "e"}}),
        ("a: &b 1", {"a": 1}),  # an anchor that nothing refers to
        ("a: 2026-11-29", {"a": datetime.date(2026, 11, 29)}),
        (f"[{MAX_NUMBER - 1}, {1 - MAX_NUMBER}, 0x10, 0b11]", [MAX_NUMBER - 1, 1 - MAX_NUMBER, 16, 3]),
        ("[" * MAX_DEPTH + "]" * MAX_DEPTH, None),
        ("a: {b: 1}\nc: {b: 2}", {"a": {"b": 1}, "c": {"b": 2}}),
        ("[" + "[[[1]]], " * 50 + "]", [[[[1]]]] * 50),  # depth counts what is open, not what was
    ],
)
def test_yaml_is_read_as_it_is(text: str, value: Any) -> None:
    found = read_yaml(text)
    if text.startswith("[" * MAX_DEPTH):
        for _ in range(MAX_DEPTH - 1):
            (found,) = found
        assert found == []
    else:
        assert found == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &b [x]\nc: *b", "it uses an alias (*name); write the value out"),
        ("*b", "it uses an alias (*name); write the value out"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), f"it is nested deeper than {MAX_DEPTH} levels"),
        ("{a: " * 100, f"it is nested deeper than {MAX_DEPTH} levels"),
        (f"a:\n  b: {MAX_NUMBER}", "the number in line 2 has more than 64 bits"),
        (f"a: -{MAX_NUMBER}", "the number in line 1 has more than 64 bits"),
        ("a: 0x" + "f" * 9999, "the number in line 1 has more than 64 bits"),
        ("a: 1\nb: {c: 1, c: 1}", "a key stands twice in the mapping of line 2; keep one of them"),
        ("a: 1\na: 1", "a key stands twice in the mapping of line 1; keep one of them"),
        ("a: 2026-99-99", "month must be in 1..12"),
    ],
)
def test_what_has_two_meanings_or_no_end_is_refused(text: str, message: str) -> None:
    with pytest.raises(NotYaml) as refused:
        read_yaml(text)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    "text", ["a: [", "a:\n\tb: 1", "\0", "? [a]\n: 1", "a: !!python/object:os.system x", "a: " + "9" * 5000]
)
def test_what_is_no_yaml_is_refused_in_a_line(text: str) -> None:
    with pytest.raises(NotYaml) as refused:
        read_yaml(text)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) > 10


def test_no_text_takes_long_for_its_length() -> None:
    begin = time.process_time()
    for text in (
        "[" * 60_000,
        "- " * 30_000,
        "{a: " * 15_000,
        "? " * 30_000,
        "&a " * 20_000,
        "*a " * 20_000,
        "!" * 60_000,
    ):
        with pytest.raises(NotYaml):
            read_yaml(text)
    assert time.process_time() - begin < 20
