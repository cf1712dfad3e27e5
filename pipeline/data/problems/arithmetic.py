"""Arithmetic problems: sums, differences, prices, change, sharing.

Trained: one operation. Held out: two operations of the same kinds in a row.
"""

from __future__ import annotations

from pipeline.data.problems.base import Family, Solution, add_steps, subtract_steps

_ITEMS = {"ja": ("ペン", "パン", "本"), "en": ("pen", "bun", "cup")}


def _sum_two(language: str, a: int, b: int) -> Solution:
    return Solution({"a": a, "b": b}, add_steps(a, b), str(a + b))


def _difference(language: str, a: int, b: int) -> Solution:
    return Solution({"a": a, "b": b}, subtract_steps(a, b), str(a - b))


def _price_total(language: str, price: int, count: int, item: int) -> Solution:
    slots = {"p": price, "n": count, "item": _ITEMS[language][item]}
    return Solution(slots, f"{price} * {count} = {price * count}", str(price * count))


def _change(language: str, paid: int, price: int, item: int) -> Solution:
    slots = {"p": price, "paid": paid, "item": _ITEMS[language][item]}
    return Solution(slots, f"{paid} - {price} = {paid - price}", str(paid - price))


def _share(language: str, total: int, children: int) -> Solution:
    each = total // children
    steps = f"{children} * {each} = {total}\n{total} / {children} = {each}"
    return Solution({"t": total, "k": children}, steps, str(each))


def _sum_three(language: str, a: int, b: int, c: int) -> Solution:
    return Solution({"a": a, "b": b, "c": c}, f"{a} + {b} = {a + b}\n{a + b} + {c} = {a + b + c}", str(a + b + c))


def _two_takeaways(language: str, a: int, b: int, c: int) -> Solution:
    return Solution({"a": a, "b": b, "c": c}, f"{a} - {b} = {a - b}\n{a - b} - {c} = {a - b - c}", str(a - b - c))


def _cart(language: str, price: int, count: int, other: int) -> Solution:
    first = price * count
    steps = f"{price} * {count} = {first}\n{first} + {other} = {first + other}"
    return Solution({"p": price, "n": count, "q": other}, steps, str(first + other))


FAMILIES = (
    Family(
        "sum_two",
        "arithmetic",
        False,
        tuple((a, b) for a in range(11, 50) for b in range(3, 40)),
        {
            "ja": ("{a} + {b} はいくつですか。", "{a} に {b} を足すと?", "{a} と {b} の和は?"),
            "en": ("What is {a} + {b}?", "Add {a} and {b}.", "There are {a} red and {b} blue balls. How many in all?"),
        },
        _sum_two,
    ),
    Family(
        "difference",
        "arithmetic",
        False,
        tuple((a, b) for a in range(20, 80) for b in range(3, 20)),
        {
            "ja": ("{a} - {b} はいくつですか。", "{a} から {b} を引くと?", "{a} 個のうち {b} 個を食べた。残りは何個?"),
            "en": ("What is {a} - {b}?", "What is {a} minus {b}?", "Of {a} apples, {b} are eaten. How many are left?"),
        },
        _difference,
    ),
    Family(
        "price_total",
        "arithmetic",
        False,
        tuple((p, n, item) for p in range(10, 100, 10) for n in range(2, 10) for item in range(3)),
        {
            "ja": ("{p} 円の{item}を {n} 個買うと何円?", "{item}は {p} 円。{n} 個でいくら?"),
            "en": ("A {item} costs {p} yen. How much are {n}?", "At {p} yen each, what is the price of {n} {item}s?"),
        },
        _price_total,
    ),
    Family(
        "change",
        "arithmetic",
        False,
        tuple((paid, p, i) for paid in (100, 200, 500) for p in range(10, paid, 10) for i in range(3)),
        {
            "ja": ("{p} 円の{item}を買い {paid} 円出した。おつりは?", "{item}は {p} 円。{paid} 円払うとおつりは何円?"),
            "en": (
                "A {item} costs {p} yen. You pay {paid} yen. What is the change?",
                "For a {p} yen {item} you give {paid} yen. How much comes back?",
            ),
        },
        _change,
    ),
    Family(
        "share",
        "arithmetic",
        False,
        tuple((k * each, k) for k in range(2, 10) for each in range(2, 13)),
        {
            "ja": ("{t} 個を {k} 人で等しく分けると1人何個?", "{t} ÷ {k} はいくつですか。", "{t} を {k} で割ると?"),
            "en": ("Share {t} nuts among {k} children. How many each?", "What is {t} / {k}?", "Divide {t} by {k}."),
        },
        _share,
    ),
    Family(
        "sum_three",
        "arithmetic",
        True,
        tuple((a, b, c) for a in range(11, 30) for b in range(2, 10) for c in range(2, 10)),
        {
            "ja": ("{a} + {b} + {c} はいくつですか。", "{a} と {b} と {c} の合計は?"),
            "en": ("What is {a} + {b} + {c}?", "Add {a}, {b} and {c}."),
        },
        _sum_three,
    ),
    Family(
        "two_takeaways",
        "arithmetic",
        True,
        tuple((a, b, c) for a in range(20, 41) for b in range(2, 10) for c in range(2, 10)),
        {
            "ja": ("{a} 個から {b} 個食べ、{c} 個あげた。残りは何個?", "{a} - {b} - {c} はいくつですか。"),
            "en": ("Of {a} apples, {b} are eaten and {c} sold. How many are left?", "What is {a} - {b} - {c}?"),
        },
        _two_takeaways,
    ),
    Family(
        "cart",
        "arithmetic",
        True,
        tuple((p, n, q) for p in range(10, 60, 10) for n in range(2, 6) for q in range(10, 100, 10)),
        {
            "ja": ("{p} 円のペン {n} 本と {q} 円の本で何円?", "パンは {p} 円。{n} 個と {q} 円の水でいくら?"),
            "en": (
                "A pen costs {p} yen. How much are {n} and a {q} yen book?",
                "At {p} yen each, what do {n} buns and a {q} yen drink cost?",
            ),
        },
        _cart,
    ),
)
