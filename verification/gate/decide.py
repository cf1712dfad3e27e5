"""The decision from a report's stored values (value, relation, bound, interval) and a policy; nothing is measured.

A check passes if it was evaluated and keeps its bound. A statistic passes if the far end of its 95 % interval keeps the
bound (upper end for a KLD, lower end for a share; for cells the mean), and is `inconclusive` if only its mean does. A
text that is too short or unsuitable is `inconclusive` too. A waiver turns a failure into `waived` and is printed with
its reason. Order of a leg's and of the whole verdict: fail > not evaluated (incomplete) > inconclusive > pass.
"""

from __future__ import annotations

import math
import re
from typing import Any

from pydantic import ValidationError

from so8t_core.errors import InputError
from verification.gate.policy import Policy, make_policy
from verification.gate.report import (
    BY_CODES,
    BY_OUTPUT,
    Artefact,
    Check,
    Leg,
    LegName,
    Report,
    Status,
    TensorRow,
    Verdict,
)

# float types as in `verification.gguf.reader`; the gate imports only the core, and a test keeps the two lists equal
FLOAT_TYPES = frozenset({"F32", "F16", "BF16"})
_BITS = re.compile(r"\d")  # the first digit of Q4_K_M, IQ4_XS, MXFP4_MOE; an unknown type has none, and no bound
_NOT_QUANTISED = {*FLOAT_TYPES, "F64", "I8", "I16", "I32", "I64"}
_ROUNDING = 1e-6  # nats; a mean KLD of equal logits is zero within float64's rounding, on either side
_BAD_FIRST: tuple[Status, ...] = ("fail", "not evaluated", "inconclusive")
# checks that a report must hold for every input that it names: a report without one of them is cut and does not pass
OF_EVERY_FILE = (
    "contract.token_ids",
    "contract.added_specials",
    "contract.chat_template",
    "contract.stop_set",
    "contract.special_ids",
    "contract.metadata",
    "contract.oracle_metadata",
    "contract.fallback_types",
    "contract.inventory",
    "contract.finite_weights",
    "contract.layout",
    "contract.end_of_turn",
)
_OF_FLOAT_FILES = ("convert.rounding", "convert.mean_kld", "convert.top1", "convert.non_finite")
_OF_QUANTS = ("quantise.tensors_differ", "quality.mean_kld", "quality.top1", "quality.non_finite")
_OF_JUDGED = ("quantise.unexplained",)  # since schema 1.3
# more checks against a reference file; the checks of `convert` and `quantise` that read tensors need the weights
_OF_REFERENCE_FILES = ("contract.tensor_statistics",)
NEED_WEIGHTS = ("convert.rounding", "quantise.tensors_differ", "quantise.unexplained", "quantise.output_error")
_OF_ADAPTERS = (
    "bake.max_abs_logit",
    "bake.top1_disagreements",
    "dtype.rounding",
    "dtype.non_finite",
    "controls.differs_from_base",
    "controls.transposed",
)
_SAVED_TYPES = tuple(f"dtype.mean_kld.{name}" for name in ("float32", "float16", "bfloat16"))  # one of them
_OF_EVERY_RUN = (
    "evidence.positions",
    "evidence.chunks",
    "evidence.entropy",
    "evidence.entropy_share",
    "evidence.repeat",
    "evidence.noise_floor",
)
# the cells that apply to every model and at every level; a report without them was cut
_CELLS = ("mid", "short", "n_ctx_shipped", "n_ubatch", "decode", "no_bos")
OF_EVERY_CELL = tuple(f"cells.{cell}.{value}" for cell in _CELLS for value in ("mean_kld", "top1", "non_finite"))
_LISTINGS = ("contract.fallback_types", "quantise.tensors_differ")  # counts that a policy may accept at any value
# a failure means too little or unsuitable text, or an engine noisier than the bound: it says nothing about the file
_OPEN = {"evidence.positions", "evidence.chunks", "evidence.entropy", "evidence.entropy_share", "evidence.noise_floor"}

LEG_TITLES: dict[LegName, str] = {
    "bake": "Bake",
    "dtype": "Saved precision",
    "convert": "Conversion",
    "quantise": "Quantisation",
    "quality": "Quality",
    "contract": "Contract",
    "controls": "Controls",
    "evidence": "Evidence",
    "cells": "Cells",
}


def decide(report: Report | dict[str, Any], policy: Policy | None = None) -> Report:
    """Decide again from a report's stored values; nothing is measured. `policy` None takes the policy in the report.

    Raises:
        InputError: a mapping that is not a report of this schema.
    """
    try:
        report = Report.model_validate(report)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"this is not an SO8T report: `{where}`: {first['msg']}") from None
    policy = policy or make_policy(report.policy, source="the report's policy")
    types, judged = {a.label: a.type for a in report.artefacts if a.role == "candidate"}, _judges(report)
    legs = [_decide_leg(leg, policy, types, judged=judged) for leg in _with_gaps(report)]
    present = {leg.name for leg in legs}
    legs += [_missing(name) for name in policy.required if name not in present and _can_be_had(name, report)]
    verdict = _verdict(legs)
    return report.model_copy(
        update={
            "legs": legs,
            "verdict": verdict,
            "summary": _summary(verdict, legs, report),
            "policy": policy.model_dump(mode="json"),
        }
    )


def by_reference_file(report: Report) -> bool:
    """Whether the files were compared with a reference file, without the original weights."""
    roles = {artefact.role for artefact in report.artefacts}
    return "reference_file" in roles and "reference" not in roles


def _can_be_had(name: LegName, report: Report) -> bool:
    """Whether a leg could have been measured.

    `convert` cannot be measured with only quants and a reference file. With the weights, the verifier makes the float
    file for `convert` itself. A float candidate calls for the checks of `convert` in every case.
    """
    return name != "convert" or not by_reference_file(report)


def _is_float(artefact: Artefact) -> bool:
    return artefact.type in FLOAT_TYPES


def _with_gaps(report: Report) -> list[Leg]:
    """The measured legs; a leg gets one more check if the report lacks a check that its inputs require."""
    made_here = {f"{name}.{word}" for name in LEG_TITLES for word in ("evaluated", "complete")}
    found: dict[LegName, list[Check]] = {}
    for leg in report.legs:  # a merged report may hold a leg twice: both count
        found.setdefault(leg.name, []).extend(check for check in leg.checks if check.name not in made_here)
    present = {(check.name, check.subject) for checks in found.values() for check in checks}
    gaps: dict[LegName, list[str]] = {}
    for wanted, subject in _called_for(report):
        either = _SAVED_TYPES if wanted == "dtype.mean_kld" else (wanted,)
        if not any((name, subject) in present for name in either):
            gaps.setdefault(_leg_of(wanted), []).append(f"{wanted} of {subject}" if subject else wanted)
    for label in _of_other_types(report):
        gaps.setdefault("contract", []).append(f"tensor of {label}'s type")
    for label in _contradicted_by_rows(report):
        gaps.setdefault("quantise", []).append(f"count of {label}'s unexplained tensors that its table bears out")
    for name, names in gaps.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        found.setdefault(name, []).append(
            Check(
                name=f"{name}.complete",
                title="All of the leg's checks are there",
                status="not evaluated",
                detail=f"the report has no {names[0]}{more}",
            )
        )
    compared = {leg.name: leg.compared for leg in report.legs}
    return [
        Leg(name=name, title=title, compared=compared.get(name, ""), status="not evaluated", checks=found[name])
        for name, title in LEG_TITLES.items()
        if found.get(name)
    ]


def _called_for(report: Report) -> list[tuple[str, str]]:
    """(check, subject) of every check that the report's inputs require."""
    wanted: list[tuple[str, str]] = []
    ways, drawers = _by_file(report, "why"), _by_file(report, "drawer")
    by_file = by_reference_file(report)
    for artefact in report.artefacts:
        if artefact.role == "candidate":
            is_float = _is_float(artefact)
            of_type = _OF_FLOAT_FILES if is_float else (*_OF_QUANTS, *(_OF_JUDGED if _judges(report) else ()))
            why, drawer = ways.get(artefact.label, set()), drawers.get(artefact.label, set())
            of_type += ("quantise.kld_ratio",) if "judged" in drawer and not is_float and _since(report, 5) else ()
            of_type += ("quantise.output_error",) if why & {BY_OUTPUT, BY_CODES} else ()
            of_type += ("quantise.codes_error",) if BY_CODES in why else ()
            if by_file:
                of_type = (*(name for name in of_type if name not in NEED_WEIGHTS), *_OF_REFERENCE_FILES)
            names = (*OF_EVERY_FILE, *of_type, "evidence.alignment")
            wanted += [(name, artefact.label) for name in (*names, *OF_EVERY_CELL)]
        elif artefact.role == "adapter":
            wanted += [(name, "") for name in (*_OF_ADAPTERS, "dtype.mean_kld")]
    if wanted:
        floor = not by_file or any(_is_float(a) for a in report.artefacts)
        wanted += [(name, "") for name in _OF_EVERY_RUN if floor or name != "evidence.noise_floor"]
    return wanted


def _by_file(report: Report, field: str) -> dict[str, set[str | None]]:
    """The values of one field of the recorded tensors, by candidate."""
    found: dict[str, set[str | None]] = {}
    for row in report.tensors:
        found.setdefault(row.candidate, set()).add(getattr(row, field))
    return found


def _of_other_types(report: Report) -> list[str]:
    """Candidates whose type, which chooses their checks and bounds, contradicts their recorded tensors.

    A float type needs float tensors only. A quantised type needs a tensor of as many bits. Both need recorded tensors.
    """
    rows: dict[str, list[TensorRow]] = {}
    for row in report.tensors:
        rows.setdefault(row.candidate, []).append(row)
    return [
        artefact.label
        for artefact in report.artefacts
        if artefact.role == "candidate" and not _is_of_type(artefact.type, rows.get(artefact.label, []))
    ]


def _contradicted_by_rows(report: Report) -> list[str]:
    """Candidates with more unexplained, or more unproven, recorded tensors than their checks count."""
    drawers: dict[str, list[str]] = {}
    for row in report.tensors:
        if row.drawer is not None:
            drawers.setdefault(row.candidate, []).append(row.drawer)
    counted = {(c.name, c.subject): c.value for leg in report.legs for c in leg.checks}
    found = []
    for label, rows in drawers.items():
        for name, count in (
            ("quantise.unexplained", rows.count("unexplained")),
            ("quantise.tensors_differ", len(rows) - rows.count("proven")),
        ):
            value = counted.get((name, label))
            if isinstance(value, int | float) and count > value:
                found.append(label)
    return list(dict.fromkeys(found))


def _is_of_type(kind: str, rows: list[TensorRow]) -> bool:
    quantised = {name for row in rows for name in (row.actual_type, row.nominal_type)} - _NOT_QUANTISED
    if kind in FLOAT_TYPES:
        return bool(rows) and not quantised
    bits = _BITS.search(kind)
    return bool(rows) if bits is None else any((found := _BITS.search(n)) and found[0] == bits[0] for n in quantised)


def _judges(report: Report) -> bool:
    """Whether the report's schema judges the tensors that differ; an older schema only counts them."""
    return _since(report, 3)


def _since(report: Report, minor: int) -> bool:
    """Whether the report's schema is 1.`minor` or newer."""
    parts = report.schema_version.split(".")
    return all(part.isdigit() for part in parts) and [int(part) for part in parts] >= [1, minor]


def _leg_of(check: str) -> LegName:
    return next(name for name in LEG_TITLES if check.startswith(f"{name}."))


def _missing(name: LegName) -> Leg:
    check = Check(
        name=f"{name}.evaluated",
        title="Leg evaluated",
        status="not evaluated",
        detail="the policy requires this leg, but nothing was given to measure it with",
    )
    return Leg(name=name, title=LEG_TITLES[name], compared="", status="not evaluated", checks=[check])


def _decide_leg(leg: Leg, policy: Policy, types: dict[str, str], *, judged: bool) -> Leg:
    """Decide a leg; a subject that is not a candidate, for example "F16 (oracle)", begins with its type."""
    kinds = [types.get(check.subject) or check.subject.split(" ")[0] for check in leg.checks]
    checks = [_decide_check(c, policy, kind, judged=judged) for c, kind in zip(leg.checks, kinds, strict=True)]
    return leg.model_copy(update={"checks": checks, "status": leg_status([check.status for check in checks])})


def leg_status(statuses: list[Status]) -> Status:
    """The worst status of a leg; a leg without checks was not evaluated."""
    for bad in _BAD_FIRST:
        if bad in statuses:
            return bad
    if not statuses:
        return "not evaluated"
    return "waived" if set(statuses) == {"waived"} else "pass"


def _accepts(name: str, policy: Policy, *, judged: bool) -> bool:
    """Whether the policy accepts any count; a count of differing tensors only if the report judged each tensor."""
    if name == "contract.fallback_types":
        return policy.contract.allow_fallback_types
    return judged and policy.quantise.tensors_differ is None


def _decide_check(check: Check, policy: Policy, kind: str, *, judged: bool) -> Check:
    if check.name in _LISTINGS and _accepts(check.name, policy, judged=judged):
        check = check.model_copy(update={"bound": "any, by policy", "relation": None})
    elif (known := policy.bound(check, kind)) is not None:
        check = check.model_copy(update={"relation": known[0], "bound": known[1]})
    else:  # never the bound that is stored in the report
        detail = _unknown(check, kind) if check.value is not None or _is_statistic(check) else check.detail
        check = check.model_copy(update={"relation": None, "bound": None, "detail": detail})
    status = _evaluate(check)
    if status in ("fail", "inconclusive"):  # a check that was not measured cannot be waived
        for waiver in policy.waivers:
            if waiver.check == check.name and waiver.subject in (None, check.subject):
                return _waive(check, waiver.reason)
    return check.model_copy(update={"status": status, "reason": ""})


def _unknown(check: Check, kind: str) -> str:
    """Why the policy has no bound for a check."""
    if not _is_statistic(check):
        return f"{check.name} is no check of this version of so8t, so no bound is known for it; verify again"
    leg = check.name.split(".")[0]
    if leg == "dtype":
        return f"{check.name.removeprefix('dtype.mean_kld.')} has no bound; save in float32, float16 or bfloat16"
    return f"the policy has no {leg} bound for {kind}; add `{leg}: {{{kind}: {{mean_kld: .., top1: ..}}}}` to it"


def _waive(check: Check, reason: str) -> Check:
    return check.model_copy(update={"status": "waived", "reason": reason})


def _evaluate(check: Check) -> Status:
    value, bound = check.value, check.bound
    if value is None or bound is None:
        return "not evaluated"
    if check.relation is None:  # an accepted listing, see `_accepts`; no other check may lack a relation
        return "pass" if check.name in _LISTINGS and _is_possible(check.name, value) else "not evaluated"
    if not _holds(value, check.relation, bound) or not _is_possible(check.name, value):
        return "inconclusive" if check.name in _OPEN and _is_number(value) else "fail"
    if not _is_statistic(check):
        return "pass"
    low, high = check.interval or (math.nan, math.nan)
    if isinstance(value, str) or not low <= value <= high:
        return "not evaluated"  # the interval is missing or does not hold the value
    if check.name.startswith("cells."):
        # A cell has 80 to 140 positions in about eight passages: the far end of its interval is mostly chance (0.019 to
        # 0.27 for a healthy Q8_0), and the faults of a cell are gross. So the mean is compared with the wide bounds.
        return "pass"
    return "pass" if _holds(high if check.relation == "<=" else low, check.relation, bound) else "inconclusive"


def _is_statistic(check: Check) -> bool:
    """Whether a check is a mean over tokens with an interval; its far end decides, except in cells."""
    means = (".mean_kld", ".top1", ".codes_error", ".kld_ratio")
    return check.name.endswith(means) or check.name.startswith("dtype.mean_kld.")


def _is_possible(name: str, value: float | int | str) -> bool:
    """Whether a value is possible: counts, distances and shares are never below zero, shares never above one."""
    return isinstance(value, str) or (value >= -_ROUNDING and (value <= 1 or not name.endswith(".top1")))


def _is_number(value: float | int | str) -> bool:
    return not isinstance(value, str) and math.isfinite(value)


def _holds(value: float | int | str, relation: str, bound: float | int | str) -> bool:
    if relation in ("==", "!="):
        return (value == bound) == (relation == "==")
    if isinstance(value, str) or isinstance(bound, str):
        return False  # texts have no order
    return value <= bound if relation == "<=" else value >= bound  # False for NaN


def _verdict(legs: list[Leg]) -> Verdict:
    statuses = [leg.status for leg in legs]
    if "fail" in statuses:
        return "fail"
    if "not evaluated" in statuses or not any(status == "pass" for status in statuses):
        return "incomplete"
    return "inconclusive" if "inconclusive" in statuses else "pass"


def _summary(verdict: Verdict, legs: list[Leg], report: Report) -> str:
    checks = [(leg, check) for leg in legs for check in leg.checks]
    for status in _BAD_FIRST:
        found = [(leg, check) for leg, check in checks if check.status == status]
        if found:
            return _describe(status, found)
    waived = sum(check.status == "waived" for _, check in checks)
    worst = max(report.divergences, key=lambda d: d.mean_kld, default=None)
    number = f"; largest mean KLD {worst.mean_kld:.2g} nats ({worst.candidate})" if worst else ""
    tail = f", {waived} waived" if waived else ""
    total = sum(check.status == "pass" for _, check in checks)
    if by_reference_file(report):
        return (
            f"Agrees with the reference file: all {total} checks that need no weights passed in {len(legs)} legs{tail}"
            f"{number}."
        )
    return f"Release: all {total} checks in {len(legs)} legs passed{tail}{number}."


def _describe(status: Status, found: list[tuple[Leg, Check]]) -> str:
    leg, check = found[0]
    title = check.title[:1].lower() + check.title[1:]
    subject = f" of {check.subject}" if check.subject else ""
    far = check.interval[0 if check.relation == ">=" else 1] if check.interval else None
    shown = _number(far if status == "inconclusive" and far is not None else check.value)
    more = f" ({len(found) - 1} more)" if len(found) > 1 else ""
    detail = f": {check.detail}" if check.detail else ""
    if status == "not evaluated":
        return f"Incomplete: {leg.name}, {title}{subject} was not evaluated{more}{detail}."
    if status == "inconclusive" and check.name in _OPEN:
        limit = f"bound {check.relation} {_number(check.bound)}"
        return f"Inconclusive: {title} is {shown}, {limit}{more}{detail}."
    if status == "inconclusive":
        return f"Inconclusive: {title}{subject} may reach {shown}, bound {_number(check.bound)}{more}; use more chunks."
    limit = f"bound {check.relation} {_number(check.bound)}"
    return f"Do not release: {leg.name}, {title}{subject} is {shown}, {limit}{more}{detail}."


def _number(value: float | int | str | None) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
