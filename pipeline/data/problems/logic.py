"""Small logic: order of three, class membership, parity, comparison, number sequences.

Trained: the largest, yes or no, going up. Held out: the smallest, the other parity, going down.
"""

from __future__ import annotations

from itertools import permutations

from pipeline.data.problems.base import Family, Solution, add_steps, subtract_steps

_PEOPLE = {"ja": ("ケン", "ユイ", "リク", "アキ", "サラ", "トム"), "en": ("Ann", "Ben", "Kim", "Leo", "Mia", "Tom")}
_YES_NO = {"ja": ("はい", "いいえ"), "en": ("Yes", "No")}
_PARITY = {"ja": ("偶数", "奇数"), "en": ("even", "odd")}
# kind, and a class that holds all of its members / none of them
_KINDS = {
    "ja": (("犬", "動物", "魚"), ("鳥", "動物", "木"), ("花", "植物", "石"), ("猫", "動物", "花")),
    "en": (
        ("dog", "an animal", "a fish"),
        ("bird", "an animal", "a tree"),
        ("rose", "a plant", "a stone"),
        ("cat", "an animal", "a plant"),
    ),
}
_TRIPLES = tuple(permutations(range(6), 3))


def _order_slots(language: str, order: tuple[int, int, int]) -> tuple[dict[str, object], str]:
    x, y, z = (_PEOPLE[language][k] for k in order)
    return {"x": x, "y": y, "z": z}, f"{x} > {y} > {z}"


def _tallest(language: str, *order: int) -> Solution:
    slots, steps = _order_slots(language, (order[0], order[1], order[2]))
    return Solution(slots, steps, str(slots["x"]))


def _shortest(language: str, *order: int) -> Solution:
    slots, steps = _order_slots(language, (order[0], order[1], order[2]))
    return Solution(slots, steps, str(slots["z"]))


def _member(language: str, person: int, kind: int, positive: bool) -> Solution:
    name, (noun, inside, outside) = _PEOPLE[language][person], _KINDS[language][kind]
    group = inside if positive else outside
    if language == "ja":
        rule = f"{noun}はすべて{group}" if positive else f"{noun}は{group}ではない"
        steps = f"{name}は{noun}。\n{rule}。"
    else:
        rule = f"Every {noun} is {group}" if positive else f"No {noun} is {group}"
        steps = f"{name} is a {noun}.\n{rule}."
    slots = {"x": name, "noun": noun, "group": group, "rule": rule}
    return Solution(slots, steps, _YES_NO[language][0 if positive else 1])


def _parity(language: str, number: int, asked: int) -> Solution:
    last = number % 10
    word = _PARITY[language][last % 2]
    if language == "ja":
        steps = f"一の位は {last}。\n{last} は{word}。"
    else:
        steps = f"The last digit is {last}.\n{last} is {word}."
    return Solution({"n": number}, steps, _YES_NO[language][0 if last % 2 == asked else 1])


def _is_even(language: str, number: int) -> Solution:
    return _parity(language, number, 0)


def _is_odd(language: str, number: int) -> Solution:
    return _parity(language, number, 1)


def _larger(language: str, a: int, b: int) -> Solution:
    return Solution({"a": a, "b": b}, f"{max(a, b)} > {min(a, b)}", str(max(a, b)))


def _smaller(language: str, a: int, b: int) -> Solution:
    return Solution({"a": a, "b": b}, f"{max(a, b)} > {min(a, b)}", str(min(a, b)))


def _next_up(language: str, start: int, step: int) -> Solution:
    a, b, c = (start + step * k for k in range(3))
    steps = f"{b} - {a} = {step}\n{add_steps(c, step)}"
    return Solution({"a": a, "b": b, "c": c}, steps, str(c + step))


def _next_down(language: str, start: int, step: int) -> Solution:
    a, b, c = (start - step * k for k in range(3))
    steps = f"{a} - {b} = {step}\n{subtract_steps(c, step)}"
    return Solution({"a": a, "b": b, "c": c}, steps, str(c - step))


_PAIRS = tuple((a, b) for a in range(10, 100, 2) for b in range(11, 100, 3) if a != b)

FAMILIES = (
    Family(
        "tallest",
        "logic",
        False,
        _TRIPLES,
        {
            "ja": (
                "{x}は{y}より背が高い。{y}は{z}より高い。一番高いのは?",
                "{y}は{z}より背が高い。{x}は{y}より高い。一番高いのは?",
            ),
            "en": (
                "{x} is taller than {y}. {y} is taller than {z}. Who is the tallest?",
                "{y} is taller than {z}. {x} is taller than {y}. Who is the tallest?",
            ),
        },
        _tallest,
    ),
    Family(
        "member",
        "logic",
        False,
        tuple((person, kind, positive) for person in range(6) for kind in range(4) for positive in (True, False)),
        {
            "ja": ("{rule}。{x}は{noun}です。{x}は{group}ですか。", "{x}は{noun}。{rule}。では{x}は{group}?"),
            "en": (
                "{rule}. {x} is a {noun}. Is {x} {group}?",
                "{x} is a {noun}. {rule}. Is {x} {group}?",
            ),
        },
        _member,
    ),
    Family(
        "is_even",
        "logic",
        False,
        tuple((n,) for n in range(10, 200)),
        {"ja": ("{n} は偶数ですか。", "{n} は 2 で割り切れる?"), "en": ("Is {n} even?", "Is {n} an even number?")},
        _is_even,
    ),
    Family(
        "larger",
        "logic",
        False,
        _PAIRS,
        {
            "ja": ("{a} と {b} ではどちらが大きい?", "大きいのは {a} と {b} のどちら?"),
            "en": ("Which is larger, {a} or {b}?", "Which number is bigger: {a} or {b}?"),
        },
        _larger,
    ),
    Family(
        "next_up",
        "logic",
        False,
        tuple((start, step) for start in range(1, 31) for step in range(2, 11)),
        {
            "ja": ("{a}、{b}、{c} の次の数は?", "数列 {a}, {b}, {c}, ... の次は?"),
            "en": ("What comes next: {a}, {b}, {c}?", "Find the next number after {a}, {b}, {c}."),
        },
        _next_up,
    ),
    Family(
        "shortest",
        "logic",
        True,
        _TRIPLES,
        {
            "ja": (
                "{x}は{y}より背が高い。{y}は{z}より高い。一番低いのは?",
                "{y}は{z}より背が高い。{x}は{y}より高い。一番低いのは?",
            ),
            "en": (
                "{x} is taller than {y}. {y} is taller than {z}. Who is the shortest?",
                "{y} is taller than {z}. {x} is taller than {y}. Who is the shortest?",
            ),
        },
        _shortest,
    ),
    Family(
        "is_odd",
        "logic",
        True,
        tuple((n,) for n in range(10, 200)),
        {"ja": ("{n} は奇数ですか。", "{n} は奇数?"), "en": ("Is {n} odd?", "Is {n} an odd number?")},
        _is_odd,
    ),
    Family(
        "smaller",
        "logic",
        True,
        _PAIRS,
        {
            "ja": ("{a} と {b} ではどちらが小さい?", "小さいのは {a} と {b} のどちら?"),
            "en": ("Which is smaller, {a} or {b}?", "Which number is less: {a} or {b}?"),
        },
        _smaller,
    ),
    Family(
        "next_down",
        "logic",
        True,
        tuple((start, step) for start in range(35, 65) for step in range(2, 11)),
        {
            "ja": ("{a}、{b}、{c} の次の数は?", "数列 {a}, {b}, {c}, ... の次は?"),
            "en": ("What comes next: {a}, {b}, {c}?", "Find the next number after {a}, {b}, {c}."),
        },
        _next_down,
    ),
)
