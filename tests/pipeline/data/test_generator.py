"""Laws of the generated set. Every answer is recomputed here from the prompt's text alone, by other means."""

from __future__ import annotations

import itertools
import re
from calendar import day_name, month_name
from collections import Counter
from collections.abc import Callable
from datetime import date, datetime, timedelta
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.generator import FAMILIES, GeneratedRow, capacity, families, generate
from pipeline.data.problems.base import LANGUAGES, Family
from pipeline.data.think_form import format_assistant, parse
from so8t_core.errors import InputError

JA_DAYS = "月火水木金土日"
MONDAY = date(2024, 1, 1)  # a Monday; 2024 has a 29 February, which no problem reaches
METRIC = {"km": Fraction(1000), "m": Fraction(1), "cm": Fraction(1, 100), "mm": Fraction(1, 1000)}
METRIC |= {"kg": Fraction(1), "g": Fraction(1, 1000)}
TIME = {"weeks": 604800, "週間": 604800, "days": 86400, "日": 86400, "hours": 3600, "時間": 3600}
TIME |= {"minutes": 60, "分": 60, "seconds": 1, "秒": 1}
UNITS = METRIC | {name: Fraction(seconds) for name, seconds in TIME.items()}


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def dates(text: str) -> list[date]:
    if "月" in text:
        return [date(2023, int(m), int(d)) for m, d in re.findall(r"(\d+)月(\d+)日", text)]
    names = "|".join(month_name[1:])
    return [datetime.strptime(f"2023 {m} {d}", "%Y %B %d").date() for m, d in re.findall(rf"({names}) (\d+)", text)]


def weekday(row: GeneratedRow, sign: int) -> str:
    names = [f"{letter}曜日" for letter in JA_DAYS] if row["language"] == "ja" else list(day_name)
    start = next(index for index, name in enumerate(names) if name in row["prompt"])
    (count,) = numbers(row["prompt"])
    return names[(MONDAY + timedelta(days=start + sign * count)).weekday()]


def moved_date(row: GeneratedRow, sign: int) -> str:
    (start,) = dates(row["prompt"])
    shown = f"{start.month}月{start.day}日" if row["language"] == "ja" else f"{month_name[start.month]} {start.day}"
    (count,) = numbers(row["prompt"].replace(shown, ""))
    moved = start + timedelta(days=sign * count)
    return f"{moved.month}月{moved.day}日" if row["language"] == "ja" else f"{month_name[moved.month]} {moved.day}"


def moved_clock(row: GeneratedRow, sign: int) -> str:
    (clock,) = re.findall(r"\d+:\d\d", row["prompt"])
    (count,) = numbers(row["prompt"].replace(clock, ""))
    moved = datetime.strptime(clock, "%H:%M") + timedelta(minutes=sign * count)
    return f"{moved.hour}:{moved.minute:02d}"


def converted(row: GeneratedRow) -> str:
    units = "|".join(sorted(UNITS, key=len, reverse=True))
    parts = re.findall(rf"(\d+) ({units})(?![a-z])", row["prompt"])
    rest = re.sub(rf"(\d+) ({units})(?![a-z])", "", row["prompt"])
    (target,) = {unit for unit in re.findall(rf"(?<![a-z])({units})(?![a-z])", rest) if unit != "時間"} or {""}
    return str(sum(int(n) * UNITS[unit] for n, unit in parts) / UNITS[target])


def order(row: GeneratedRow, pick: int) -> str:
    """Search all orders of the three people for the one that fits both sentences."""
    pattern = r"([ァ-ヶ]+)は([ァ-ヶ]+)より" if row["language"] == "ja" else r"(\w+) is taller than (\w+)"
    pairs = re.findall(pattern, row["prompt"])
    people = sorted({name for pair in pairs for name in pair})
    (found,) = [o for o in itertools.permutations(people) if all(o.index(a) < o.index(b) for a, b in pairs)]
    return found[pick]


def membership(row: GeneratedRow) -> str:
    negative = "ではない" in row["prompt"] or "No " in row["prompt"]
    return {"ja": ("はい", "いいえ"), "en": ("Yes", "No")}[row["language"]][negative]


def parity(row: GeneratedRow, rest: int) -> str:
    number = numbers(row["prompt"])[0]
    return {"ja": ("いいえ", "はい"), "en": ("No", "Yes")}[row["language"]][number & 1 == rest]


def of_numbers(formula: Callable[..., int | Fraction]) -> Callable[[GeneratedRow], str]:
    return lambda row: str(formula(*numbers(row["prompt"].replace("1人", "人"))))


ORACLES: dict[str, Callable[[GeneratedRow], str]] = {
    "sum_two": of_numbers(lambda a, b: a + b),
    "difference": of_numbers(lambda a, b: a - b),
    "price_total": of_numbers(lambda p, n: sum([p] * n)),
    "change": of_numbers(lambda a, b: max(a, b) - min(a, b)),
    "share": of_numbers(Fraction),
    "sum_three": of_numbers(lambda *n: sum(n)),
    "two_takeaways": of_numbers(lambda a, b, c: a - (b + c)),
    "cart": of_numbers(lambda p, n, q: sum([p] * n, q)),
    "weekday_after": lambda row: weekday(row, 1),
    "weekday_before": lambda row: weekday(row, -1),
    "date_after": lambda row: moved_date(row, 1),
    "date_before": lambda row: moved_date(row, -1),
    "days_between": lambda row: str(abs((dates(row["prompt"])[1] - dates(row["prompt"])[0]).days)),
    "clock_after": lambda row: moved_clock(row, 1),
    "clock_before": lambda row: moved_clock(row, -1),
    **dict.fromkeys(("m_to_cm", "h_to_min", "kg_to_g", "cm_to_mm"), converted),
    **dict.fromkeys(("km_to_m", "weeks_to_days", "min_to_s", "cm_to_m"), converted),
    "tallest": lambda row: order(row, 0),
    "shortest": lambda row: order(row, -1),
    "member": membership,
    "is_even": lambda row: parity(row, 0),
    "is_odd": lambda row: parity(row, 1),
    "larger": of_numbers(lambda *n: sorted(n)[-1]),
    "smaller": of_numbers(lambda *n: sorted(n)[0]),
    "next_up": of_numbers(lambda a, b, c: 2 * c - b if c - b == b - a > 0 else -1),
    "next_down": of_numbers(lambda a, b, c: 2 * c - b if c - b == b - a < 0 else -1),
}


def all_rows(family: Family, language: str, limit: int = 400) -> list[GeneratedRow]:
    stride = max(1, family.count(language) // limit)
    stride += stride % 2 == 0  # odd, so that a stride never skips one of two phrasings
    rows = []
    for number in range(0, family.count(language), stride):
        prompt, steps, answer = family.row(language, number)
        rows.append(
            GeneratedRow(id="", family=family.name, language=language, prompt=prompt, steps=steps, answer=answer)
        )
    return rows


def false_equations(steps: str) -> list[str]:
    """Equations and comparisons in the steps that do not hold in exact arithmetic."""
    wrong = []
    for left, sign, right, result in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", steps):
        a, b = Fraction(left), Fraction(right)
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]
        if value != int(result):
            wrong.append(f"{left} {sign} {right} = {result}")
    wrong += [f"{a} > {b}" for a, b in re.findall(r"(\d+) > (\d+)", steps) if not int(a) > int(b)]
    return wrong


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_answer_follows_from_its_prompt(family: Family, language: str) -> None:
    for row in all_rows(family, language):
        assert row["answer"] == ORACLES[family.name](row), row["prompt"]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_step_holds_and_leads_to_the_answer(family: Family, language: str) -> None:
    for row in all_rows(family, language):
        assert false_equations(row["steps"]) == []
        assert 1 <= len(row["steps"].splitlines()) <= 4
        if row["answer"].isdigit():
            assert int(row["answer"]) in numbers(row["steps"])


def test_the_oracles_can_fail() -> None:
    row = GeneratedRow(id="", family="sum_two", language="en", prompt="What is 12 + 30?", steps="", answer="43")
    assert ORACLES["sum_two"](row) == "42" != row["answer"]
    assert false_equations("12 + 30 = 43\n2 > 3\n6 / 4 = 1") == ["12 + 30 = 43", "6 / 4 = 1", "2 > 3"]


def test_weekday_chains_walk_one_day_at_a_time() -> None:
    for family in (f for f in FAMILIES if f.name.startswith("weekday")):
        for language, names in (("ja", list(JA_DAYS)), ("en", list(day_name))):
            sign = 1 if family.name == "weekday_after" else -1
            for row in all_rows(family, language):
                first, *rest = row["steps"].splitlines()[-1].split(" → ")
                counts, days = zip(*(part.split(" ") for part in rest), strict=True) if rest else ((), ())
                assert [int(count) for count in counts] == list(range(1, len(rest) + 1))
                chain = [names.index(name) for name in (first, *days)]
                assert all((b - a) % 7 == sign % 7 for a, b in itertools.pairwise(chain))
                assert row["answer"].startswith(names[chain[-1]])


def test_rows_are_distinct_up_to_the_whole_capacity() -> None:
    prompts = [f.row(lang, n)[0] for f in FAMILIES for lang in LANGUAGES for n in range(f.count(lang))]
    assert len(set(prompts)) == len(prompts)
    assert len(prompts) == capacity(LANGUAGES, heldout=False) + capacity(LANGUAGES, heldout=True)


def test_heldout_families_are_never_trained_but_their_areas_are() -> None:
    train, heldout = generate(2000, 300, LANGUAGES, seed=1)
    assert (len(train), len(heldout)) == (2000, 300)
    trained, held = {row["family"] for row in train}, {row["family"] for row in heldout}
    assert trained.isdisjoint(held)
    assert trained == {family.name for family in families(heldout=False)}
    assert held == {family.name for family in families(heldout=True)}
    area = {family.name: family.area for family in FAMILIES}
    assert (
        {area[name] for name in held} == {area[name] for name in trained} == {"arithmetic", "dates", "units", "logic"}
    )
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in heldout}
    assert len({row["id"] for row in [*train, *heldout]}) == 2300


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(0, 150), seed=st.integers(0, 2**32), languages=st.sampled_from([["ja"], ["en"], ["ja", "en"]]))
def test_same_seed_same_rows_and_a_shorter_run_is_a_prefix(rows: int, seed: int, languages: list[str]) -> None:
    train, heldout = generate(rows, rows // 2, languages, seed)
    assert (train, heldout) == generate(rows, rows // 2, languages, seed)
    longer, _ = generate(rows + 20, 0, languages, seed)
    assert longer[:rows] == train
    assert {row["language"] for row in train} <= set(languages)


def test_another_seed_gives_other_rows() -> None:
    assert generate(100, 0, ["en"], 0) != generate(100, 0, ["en"], 1)


def test_a_small_set_is_balanced_over_families_and_languages() -> None:
    train, _ = generate(200, 0, LANGUAGES, 0)
    counts = Counter((row["family"], row["language"]) for row in train)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_generated_turns_are_in_think_form_and_answers_are_short() -> None:
    for row in generate(300, 300, LANGUAGES, 3)[1]:
        thought = parse(format_assistant(row["steps"], row["answer"]))
        assert thought is not None
        assert (thought.steps, thought.answer) == (row["steps"], row["answer"])
        assert len(row["answer"]) <= 12
        assert row["answer"] == row["answer"].strip()


@pytest.mark.parametrize("language", LANGUAGES)
def test_asking_for_more_than_exists_names_how_many_are_possible(language: str) -> None:
    possible = capacity([language], heldout=True)
    assert possible >= 300
    assert capacity([language], heldout=False) >= 2000
    with pytest.raises(InputError, match=rf"heldout_rows = {possible + 1}: 0 to {possible} distinct rows"):
        generate(0, possible + 1, [language], 0)


@pytest.mark.parametrize(("rows", "languages"), [(-1, ["en"]), (1, ["fr"]), (1, [])])
def test_bad_requests_are_the_users_error(rows: int, languages: list[str]) -> None:
    with pytest.raises(InputError):
        generate(rows, 0, languages, 0)
