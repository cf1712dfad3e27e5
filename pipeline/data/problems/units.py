"""Unit problems: a mixed quantity (`3 m 20 cm`) in its smaller unit.

Trained: m/cm, h/min, kg/g, cm/mm. Held out: km/m, weeks/days, min/s, and one reverse direction (cm to m).
"""

from __future__ import annotations

from collections.abc import Callable

from pipeline.data.problems.base import Case, Family, Solution

_JA = ("{a} {big} {b} {small} は何 {small} ですか。", "{a} {big} {b} {small} を {small} で表すと?")
_EN = ("How many {small} is {a} {big} {b} {small}?", "Convert {a} {big} {b} {small} to {small}.")
# unit names by language: symbols where both languages use them
_NAMES = {
    "m_to_cm": {"ja": ("m", "cm"), "en": ("m", "cm")},
    "h_to_min": {"ja": ("時間", "分"), "en": ("hours", "minutes")},
    "kg_to_g": {"ja": ("kg", "g"), "en": ("kg", "g")},
    "cm_to_mm": {"ja": ("cm", "mm"), "en": ("cm", "mm")},
    "km_to_m": {"ja": ("km", "m"), "en": ("km", "m")},
    "weeks_to_days": {"ja": ("週間", "日"), "en": ("weeks", "days")},
    "min_to_s": {"ja": ("分", "秒"), "en": ("minutes", "seconds")},
}


def _to_smaller(name: str, factor: int) -> Callable[..., Solution]:
    def solve(language: str, a: int, b: int) -> Solution:
        big, small = _NAMES[name][language]
        whole = a * factor
        steps = f"{a} * {factor} = {whole}\n{whole} + {b} = {whole + b}"
        return Solution({"a": a, "b": b, "big": big, "small": small}, steps, str(whole + b))

    return solve


def _cm_to_m(language: str, a: int) -> Solution:
    return Solution({"t": a * 100}, f"{a * 100} / 100 = {a}", str(a))


def _family(name: str, factor: int, heldout: bool, cases: tuple[Case, ...]) -> Family:
    return Family(name, "units", heldout, cases, {"ja": _JA, "en": _EN}, _to_smaller(name, factor))


FAMILIES = (
    _family("m_to_cm", 100, False, tuple((a, b) for a in range(2, 10) for b in range(5, 100, 5))),
    _family("h_to_min", 60, False, tuple((a, b) for a in range(2, 6) for b in range(5, 60, 5))),
    _family("kg_to_g", 1000, False, tuple((a, b) for a in range(2, 10) for b in range(50, 1000, 50))),
    _family("cm_to_mm", 10, False, tuple((a, b) for a in range(2, 40) for b in range(2, 10))),
    _family("km_to_m", 1000, True, tuple((a, b) for a in range(2, 10) for b in range(50, 1000, 50))),
    _family("weeks_to_days", 7, True, tuple((a, b) for a in range(2, 9) for b in range(2, 7))),
    _family("min_to_s", 60, True, tuple((a, b) for a in range(2, 6) for b in range(5, 60, 5))),
    Family(
        "cm_to_m",
        "units",
        True,
        tuple((a,) for a in range(2, 40)),
        {
            "ja": ("{t} cm は何 m ですか。", "{t} cm を m で表すと?"),
            "en": ("How many m is {t} cm?", "Convert {t} cm to m."),
        },
        _cm_to_m,
    ),
)
