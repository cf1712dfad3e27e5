"""Laws of the /think form."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.think_form import (
    ANSWER_MARKER,
    SYSTEM_MESSAGE,
    THINK_MARKER,
    RowError,
    Thought,
    chat,
    format_assistant,
    has_marker,
    parse,
    require,
    strip_message,
)
from so8t_core.errors import InputError

GOOD = f"{THINK_MARKER}\n1 + 1 = 2\n\n{ANSWER_MARKER}\n2"
BROKEN = {
    "marker missing": "1 + 1 = 2",
    "marker repeated": f"{GOOD}\n{ANSWER_MARKER}\n2",
    "markers out of order": f"{ANSWER_MARKER}\n2\n{THINK_MARKER}\n1 + 1 = 2",
    "marker not on its own line": f"{THINK_MARKER} 1 + 1 = 2\n{ANSWER_MARKER}\n2",
    "text before the first marker": f"Sure!\n{GOOD}",
    "empty steps": f"{THINK_MARKER}\n\u3000\n{ANSWER_MARKER}\n2",
    "empty answer": f"{THINK_MARKER}\n1 + 1 = 2\n{ANSWER_MARKER}\n\u200b",
}
edges = st.text(alphabet=" \t\n\u3000\u00a0\u2003\u0085\ufeff\u200b", max_size=6)
bodies = st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: strip_message(text) and not has_marker(text) and "\r" not in text
)


def test_markers_are_the_contract() -> None:
    assert (THINK_MARKER, ANSWER_MARKER) == ("# 思考ステップ", "# 最終回答")
    assert parse(GOOD) == Thought("1 + 1 = 2", "2")
    assert format_assistant("1 + 1 = 2", "2") == GOOD


@given(steps=bodies, answer=bodies)
def test_parse_undoes_format(steps: str, answer: str) -> None:
    assert parse(format_assistant(steps, answer)) == Thought(strip_message(steps), strip_message(answer))


@pytest.mark.parametrize("reason", BROKEN)
def test_every_broken_form_is_named(reason: str) -> None:
    assert parse(BROKEN[reason]) is None
    with pytest.raises(RowError) as caught:
        require(BROKEN[reason])
    assert caught.value.reason == reason
    assert isinstance(caught.value, InputError)


@pytest.mark.parametrize(("steps", "answer"), [("", "2"), ("x", "\u3000"), (f"a\n{THINK_MARKER}\nb", "2")])
def test_format_never_writes_what_parse_rejects(steps: str, answer: str) -> None:
    with pytest.raises(RowError):
        format_assistant(steps, answer)


@given(left=edges, body=bodies, right=edges)
def test_strip_removes_every_unicode_space_at_the_ends_and_nothing_inside(left: str, body: str, right: str) -> None:
    stripped = strip_message(left + body + right)
    assert stripped == strip_message(stripped) == strip_message(body)
    assert stripped in body
    for end in (stripped[0], stripped[-1]):
        assert unicodedata.category(end) not in ("Zs", "Zl", "Zp")
        assert end not in "\n\t\ufeff\u200b"


def test_ideographic_space_and_bom_are_stripped_but_joiners_stay() -> None:
    assert strip_message("\ufeff\u3000問い \u3000です\u200b\n") == "問い \u3000です"
    assert strip_message("\u200dx") == "\u200dx"


def test_system_message_names_both_markers_in_order() -> None:
    assert 0 < SYSTEM_MESSAGE.index(THINK_MARKER) < SYSTEM_MESSAGE.index(ANSWER_MARKER)
    assert strip_message(SYSTEM_MESSAGE) == SYSTEM_MESSAGE
    assert parse(SYSTEM_MESSAGE) is None


def test_own_system_message_follows_the_shared_one_and_is_never_doubled() -> None:
    first = chat("\u3000q ", "Be brief.")
    assert first == [
        {"role": "system", "content": f"{SYSTEM_MESSAGE}\n\nBe brief."},
        {"role": "user", "content": "q"},
    ]
    assert chat("q", first[0]["content"]) == first
    assert chat("q")[0]["content"] == SYSTEM_MESSAGE == chat("q", " \u3000")[0]["content"]
