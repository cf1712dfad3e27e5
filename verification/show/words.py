"""The words of a `Report` for people: numbers, margins, headlines, the ladder, the decisive check.

HTML, Markdown, JUnit and the terminal take their words from here, so that all four say the same. This module decides
nothing: it takes statuses and the verdict from the report.

The margin of a check is one number on a log scale, `decades`: below 0 inside the bound, above 0 outside.
`<=`: log10(value / bound). `>=` on a share: log10((1 - value) / (1 - bound)), so 99.93 % against 99.5 % reads as
"7x fewer disagreements than allowed". `>=` otherwise: log10(bound / value). Equalities have no margin.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from verification.gate.report import Check, Leg, LegName, Report, Status, Verdict

SEVERITY: tuple[Status, ...] = ("fail", "not evaluated", "inconclusive", "waived", "pass")
VERDICT_WORDS: dict[Verdict, str] = {
    "pass": "Pass: ready to release",
    "fail": "Fail: do not release",
    "inconclusive": "Inconclusive: do not release yet",
    "incomplete": "Incomplete: do not release yet",
}
_LADDER: tuple[LegName, ...] = ("bake", "dtype", "convert", "quantise", "quality")
_TARGETS: dict[LegName, str] = {
    "bake": "Baked weights",
    "dtype": "Saved checkpoint",
    "convert": "GGUF",
    "quantise": "Quantised GGUF",
    "quality": "Quantised GGUF",
    "contract": "Contract",
    "controls": "Negative controls",
    "evidence": "Evidence",
    "cells": "Execution cells",
}
_NEXT_AFTER_FAIL: dict[LegName, str] = {
    "bake": "Bake again from the original, unquantised checkpoint: merge LoRA first, then the rotation (W' = W R).",
    "dtype": "Save the baked checkpoint in a wider type (fp16 instead of bf16, or fp32) and convert again.",
    "convert": "Look at the tensor and metadata rows below, then convert the saved checkpoint again.",
    "quantise": "Quantise the F16 file again with the recorded build; the tensors that differ are listed below.",
    "quality": "Ship a larger type, quantise with an importance matrix, or change the bound in the policy and say why.",
    "contract": "Correct the named key or file beside the checkpoint and convert again; no new training is needed.",
    "evidence": "Do not trust this run: the evaluator or the engine is off. Verify again on another machine or build.",
    "cells": "Fix the setting named below, or ship only the settings that agree: waive it in the policy and say why.",
    "controls": "Do not trust this run: the gate did not react to a deliberate fault. Check corpus and inputs first.",
}
# C0/C1 controls except tab and newline, bidi and zero-width controls, surrogates, non-characters: shown, never obeyed.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff\ufffe\uffff]"
)


def visible(text: str) -> str:
    """`text` with characters that are illegal in XML, or that reorder or hide text, written as [U+XXXX]."""
    return _INVISIBLE.sub(lambda match: f"[U+{ord(match[0]):04X}]", text)


def number(value: float | int | str | None, digits: int = 3) -> str:
    """A number for people: `digits` significant digits, scientific below 1e-3 and from 1e6, thousands separated."""
    if value is None:
        return "not measured"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinite" if value > 0 else "-infinite"
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    power = int(exponent)
    if power < -3 or power >= 6:
        return f"{_trim(mantissa)}e{power}"
    return _trim(f"{value:,.{max(0, digits - 1 - power)}f}")


def percent(share: float, digits: int = 2) -> str:
    """A share as percent, with `digits` significant digits of its distance to 0 or 100 %, at least one decimal."""
    points = 100 * share
    rest = min(abs(points), abs(100 - points))
    if not math.isfinite(points) or rest == 0:
        return f"{number(points)} %"
    return f"{_trim(f'{points:.{min(15, max(1, digits - 1 - math.floor(math.log10(rest))))}f}')} %"


def size(count: int) -> str:
    """Bytes in binary units."""
    scale, unit = next(((s, u) for s, u in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")) if count >= s), (1, "B"))
    return f"{number(count / scale if scale > 1 else count)} {unit}"


def duration(seconds: float) -> str:
    """Seconds up to two minutes, then minutes or hours."""
    if not math.isfinite(seconds) or seconds < 120:
        return f"{number(seconds)} s"
    return f"{number(seconds / 60)} min" if seconds < 7200 else f"{number(seconds / 3600)} h"


def trained_words(report: Report) -> str:
    """The divergence between trained and shipped model in words, if the base was quantised in training; else empty."""
    trained = report.trained_function
    if trained is None:
        return ""
    d, kind = trained.divergence, trained.quantization.replace("bit", "-bit")
    low, high = d.mean_kld_interval
    return (
        f"Trained on a {kind} base, shipped from the original: mean KLD {number(d.mean_kld)} nats "
        f"[{number(low)}, {number(high)}], same top-1 {percent(d.top1)}, PPL ratio {number(d.ppl_ratio, 4)}; the "
        f"base's {trained.weights} quantised weights lie {percent(trained.weight_error)} from the original ones. For "
        "information: what is shipped is held to the original."
    )


def texts(check: Check) -> tuple[str, str]:
    """Value (with unit) and bound (with relation) of a check; more digits if rounding would make them look equal."""
    share, unit = _is_share(check), "" if check.unit == "share" else visible(check.unit)
    value, bound = "", ""
    for digits in (3, 4, 5, 6, 8, 10, 12, 15, 17):
        value, bound = (
            percent(x, digits - 1) if share and isinstance(x, (int, float)) else number(x, digits)
            for x in (check.value, check.bound)
        )
        if value != bound or check.value == check.bound:
            break
    if unit and isinstance(check.value, (int, float)):
        value = f"{value} {unit}"
    return value, "" if check.bound is None else f"{check.relation or ''} {bound}".strip()


@dataclass(frozen=True)
class Margin:
    """Distance to the bound in decades (< 0 inside), and the same for the worse and better end of the interval."""

    decades: float
    best: float
    worst: float

    @property
    def words(self) -> str:
        """ "9.3x inside", "3,300x outside", and the interval's end if the interval crosses the bound."""
        text = _times(self.decades)
        return text if (self.worst > 0) == (self.decades > 0) else f"{text}; interval reaches {_times(self.worst)}"


def margin(check: Check) -> Margin | None:
    """The place of a check on the log scale; None if value or bound is not a number, or the relation is an equality."""
    decades = _decades(check, check.value)
    if decades is None:
        return None
    ends = [d for d in (_decades(check, end) for end in check.interval or ()) if d is not None]
    return Margin(decades, min([decades, *ends]), max([decades, *ends]))


def worst(statuses: Iterable[Status]) -> Status:
    """The most severe status; without any status, "not evaluated"."""
    return min(statuses, key=SEVERITY.index, default="not evaluated")


@dataclass(frozen=True)
class Step:
    """One step of the ladder: a leg for one subject, with its headline number."""

    leg: Leg
    subject: str
    target: str  # the product of this step
    status: Status
    checks: Sequence[Check]
    headline: Check | None
    branch: bool  # whether it branches from the GGUF file, beside other steps

    @property
    def distance(self) -> Margin | None:
        """The headline's margin, if it can be drawn: "0 of 0 allowed" is exact and has no distance."""
        found = margin(self.headline) if self.headline else None
        return found if found and found.decades > -math.inf else None

    @property
    def as_count(self) -> bool:
        """Whether to show "11 of 11 held" instead of the headline: several checks passed, without a distance."""
        return not self.headline or (self.distance is None and self.status == "pass" and len(self.checks) > 1)

    @property
    def held(self) -> int:
        """Number of checks that were evaluated and passed."""
        return sum(check.status == "pass" for check in self.checks)


def steps(report: Report) -> list[Step]:
    """The ladder from top to bottom (quantise and quality of one file adjacent), then contract and controls."""
    found: list[Step] = []
    for leg in report.legs:
        whole = leg.name == "evidence"  # one step: it is about the run, though each file has an alignment
        for subject in [""] if whole else dict.fromkeys(check.subject for check in leg.checks) or [""]:
            checks = [check for check in leg.checks if whole or check.subject == subject]
            status = worst(check.status for check in checks) if checks else leg.status
            target = visible(subject) or _TARGETS[leg.name]
            if subject and leg.name not in ("quantise", "quality"):
                target = f"{_TARGETS[leg.name]} {target}"
            branch = leg.name in ("quantise", "quality")
            found.append(Step(leg, subject, target, status, checks, headline(checks), branch))
    subjects = list(dict.fromkeys(step.subject for step in found if step.branch))

    def order(step: Step) -> tuple[int, int, int]:
        if step.leg.name not in _LADDER:
            return 9, 0, 0
        rank = _LADDER.index(step.leg.name)
        return (3, subjects.index(step.subject), rank) if step.branch else (rank, 0, 0)

    return sorted(found, key=order)


def is_rung(step: Step) -> bool:
    """Whether a step is on the way from the trained model to a file (contract and controls are not)."""
    return step.leg.name in _LADDER


def headline(checks: Sequence[Check]) -> Check | None:
    """The check that represents a group: of the checks with the worst status the mean KLD, else the largest logit
    difference.
    """
    severity = worst(check.status for check in checks)

    def key(check: Check) -> tuple[int, float]:
        found = margin(check)
        kind = 0 if "mean_kld" in check.name else 1 if "max_abs" in check.name or "logit" in check.name else 2
        return (kind, -found.worst) if found and found.decades > -math.inf else (3, 0.0)

    return min((check for check in checks if check.status == severity), key=key, default=None)


def attention(report: Report) -> list[tuple[Leg, Check]]:
    """Every check without the status pass, the most severe first, then in ladder order."""
    open_checks = [(leg, check) for leg in report.legs for check in leg.checks if check.status != "pass"]
    return sorted(open_checks, key=lambda pair: SEVERITY.index(pair[1].status))


def decisive(report: Report) -> tuple[Leg, Check] | None:
    """The check that decides the verdict: the headline of the first leg with the verdict's status; for a pass, the
    check nearest to its bound.
    """
    wanted: dict[Verdict, Status] = {"fail": "fail", "inconclusive": "inconclusive", "incomplete": "not evaluated"}
    if report.verdict in wanted:
        for leg in report.legs:
            group = [check for check in leg.checks if check.status == wanted[report.verdict]]
            if chosen := headline(group):
                return leg, chosen
        return None
    measured = [(leg, c, margin(c)) for leg in report.legs if leg.name in _LADDER for c in leg.checks]
    tight = [(leg, c, m.worst) for leg, c, m in measured if m and m.worst > -math.inf and c.status == "pass"]
    tight = [entry for entry in tight if "mean_kld" in entry[1].name] or tight  # a rounding is always near its bound
    if not tight:
        return None
    chosen_leg, check, _ = max(tight, key=lambda entry: entry[2])
    return chosen_leg, check


def next_action(report: Report) -> str:
    """The next action for a person, in one sentence."""
    if report.verdict == "pass":
        return (
            "Publish the candidates together with report.html and report.json: every number is bound to their digests."
        )
    found = decisive(report)
    if report.verdict == "fail":
        return (
            _NEXT_AFTER_FAIL[found[0].name] if found else "Read the checks below; the leg that failed is named there."
        )
    if report.verdict == "inconclusive" and found and found[0].name == "evidence":
        return f"Verify again with evidence that can decide: {visible(found[1].title).lower()} must meet its bound."
    if report.verdict == "inconclusive":
        return "Verify again with more held-out text: the interval still lies on both sides of the bound."
    return "Finish the verification: run the same command again, and supply what the checks below say was missing."


def _is_share(check: Check) -> bool:
    """Whether a check is a share in 0..1: by its unit, or a top-1 share without a unit."""
    if check.unit:
        return check.unit == "share"
    numbers = [x for x in (check.value, check.bound) if x is not None]
    return check.name.endswith("top1") and all(isinstance(x, (int, float)) and 0 <= x <= 1 for x in numbers)


def _decades(check: Check, value: float | int | str | None) -> float | None:
    bound = check.bound
    if isinstance(value, (str, bool)) or isinstance(bound, (str, bool)) or value is None or bound is None:
        return None
    if not math.isfinite(bound) or math.isnan(value):
        return None
    if check.relation == "<=":
        above, below = value, bound
    elif check.relation == ">=":
        full = 1.0 if _is_share(check) else 100.0 if check.unit == "%" else None
        above, below = (bound, value) if full is None or bound > full else (full - value, full - bound)
    else:
        return None
    if above <= 0:
        return -math.inf if below >= above else None
    if below <= 0:
        return None  # no factor leads to a bound of zero
    return math.log10(above) - math.log10(below) if math.isfinite(above) else math.inf


def _times(decades: float) -> str:
    side = "outside" if decades > 0 else "inside"
    if math.isinf(decades):
        return "exact" if decades < 0 else "outside without limit"
    if decades == 0:
        return "on the bound"
    factor = float(10 ** min(300.0, abs(decades)))
    return f"{number(factor, 3 if factor < 1.1 else 2)}x {side}"


def _trim(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text
