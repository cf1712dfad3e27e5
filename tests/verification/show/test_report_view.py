"""Laws of what a person reads off a report: the decisive check, margins in words, numbers."""

from __future__ import annotations

import math

import pytest
from sample_report import KINDS, check, sample_report

from verification.show.words import decisive, margin, number, percent, texts


def test_the_first_broken_leg_decides_and_a_pass_shows_its_tightest_divergence() -> None:
    names = {kind: decisive(sample_report(kind)) for kind in KINDS}
    assert {kind: pair and (pair[0].name, pair[1].subject) for kind, pair in names.items()} == {
        "pass": ("quality", "Q4_K_M"),
        "fail": ("convert", "F16"),
        "inconclusive": ("quality", "Q4_K_M"),
        "incomplete": ("quantise", "Q8_0"),
    }


@pytest.mark.parametrize(
    ("value", "relation", "bound", "unit", "words"),
    [
        (5e-6, "<=", 5e-5, "nats", "10x inside"),
        (0.165, "<=", 5e-5, "nats", "3,300x outside"),
        (0.9993, ">=", 0.995, "share", "7.1x inside"),
        (99.93, ">=", 99.5, "%", "7.1x inside"),
        (41.2, ">=", 1e-3, "", "41,200x inside"),
        (0, "<=", 0, "", "exact"),
        (1.0, ">=", 1.0, "share", "exact"),
        (3.0, "<=", 3.0, "", "on the bound"),
        (math.inf, "<=", 3.0, "", "outside without limit"),
        (2, "<=", 0, "", None),
        ("a", "==", "a", "", None),
        (math.nan, "<=", 1.0, "", None),
    ],
)
def test_margins_in_words(value: float, relation: str, bound: float, unit: str, words: str | None) -> None:
    found = margin(check("x", "X", value=value, relation=relation, bound=bound, unit=unit))
    assert (found.words if found else None) == words


def test_numbers_for_people() -> None:
    shown = [number(x) for x in (0.0, 5.4e-6, 0.0041, 0.056, 28.44, 12920.4, 3.2e9, 49152, -1e-5, math.nan)]
    assert shown == ["0", "5.4e-6", "0.0041", "0.056", "28.4", "12,920", "3.2e9", "49,152", "-1e-5", "NaN"]
    assert [percent(x) for x in (0.0, 1.0, 0.9993, 0.878, 0.99999, 0.5)] == [
        "0 %",
        "100 %",
        "99.93 %",
        "87.8 %",
        "99.999 %",
        "50 %",
    ]
    value, bound = texts(check("x", "X", "fail", value=0.0200001, bound=0.02))
    assert value != bound.removeprefix("<= ")  # rounding never makes a failure look equal to its bound
