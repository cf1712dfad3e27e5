"""`so8t verify --self-test`: plants every fault and reports the verdicts of the gate and of two usual checks.

Healthy files come first: an alarm on a healthy file counts against the gate as much as a missed fault. Then every fault
is planted at every strength. Its row says which check refused the file and by what margin, what the diagnosis is and
whether it is right, and the results of two usual checks on the same file (`peer_checks`). If the faulty file equals the
healthy file bit by bit, the row says so and does not count as a fault. The self-test fails if a fault at its real
strength passes, or if a healthy file gives an alarm.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from so8t_core.errors import InputError
from so8t_core.files import atomic_file
from verification.commands.provenance import versions
from verification.fault_catalogue.catalogue import catalogue
from verification.fault_catalogue.fault import Fault
from verification.fault_catalogue.peer_checks import Others
from verification.fault_catalogue.plant import ELSEWHERE, OF_WEIGHTS, Bench, Tell
from verification.fault_catalogue.result import NAMED_RIGHT, SEEN_ELSEWHERE, HealthyRow, Row, SelfTest


def self_test(
    *,
    base: Path | None = None,
    tokenizer: Any = None,
    quick: bool = False,
    out: Path | None = None,
    work: Path | None = None,
    only: Callable[[Fault], bool] = lambda fault: True,
    healthy: bool = True,
    here: bool = True,
    elsewhere: bool = True,
    tell: Tell = lambda stage, done, total: None,
    seen: Callable[[Row | HealthyRow], None] = lambda row: None,
) -> SelfTest:
    """Run the catalogue.

    Args:
        base: the checkpoint that a rotation and a LoRA are baked into; None makes a small one with `tokenizer`.
        quick: use fewer families, and every fault only at the strength that people met.
        out: directory for self_test.json, .md and .html; None writes nothing.
        work: directory that keeps models and files between runs; None uses a temporary directory.
        only: selects the faults; healthy: whether healthy files are examined too.
        here: whether faults are planted into files made here.
        elsewhere: whether faults of weights are also planted into files made elsewhere.
        seen: called with every row as soon as it is decided.

    Raises:
        InputError: neither a base nor a tokenizer.
    """
    if base is None and tokenizer is None:
        raise InputError("the self-test needs a checkpoint or a tokenizer; give --reference HF_DIR")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="so8t-self-test-") as scratch, Others() as others:
        place = Path(work) if work else Path(scratch)
        place.mkdir(parents=True, exist_ok=True)
        bench = Bench(place, base, tokenizer, others, quick)
        faults = [fault for fault in catalogue() if only(fault) and bench.offers(fault)]
        planned = [
            (fault, strength, number == fault.real)
            for fault in faults
            for number, strength in enumerate(fault.strengths)
            if number == fault.real or not quick
        ]
        good: list[HealthyRow] = []
        for row in bench.healthy_rows(tell) if healthy else ():
            good.append(row)
            seen(row)
        rows: list[Row] = []
        for fault, strength, real in planned if here else ():
            tell("faults", len(rows), len(planned))
            rows.append(bench.row(fault, strength, real=real))
            seen(rows[-1])
        tell("faults", len(rows), len(rows))
        others_made = [(f, s, real) for f, s, real in planned if real and is_of_weights(f)] if elsewhere else []
        for number, (fault, strength, real) in enumerate(others_made):
            tell("faults made elsewhere", number, len(others_made))
            rows.append(bench.elsewhere_row(fault, strength, real=real))
            seen(rows[-1])
        result = _result(rows, good, bench, quick, time.monotonic() - start)
    if out is not None:
        write_self_test(result, out)
    return result


def is_of_weights(fault: Fault) -> bool:
    """Whether a fault changes weights of a float file, so that it is also planted into files made elsewhere."""
    return fault.kind in OF_WEIGHTS and fault.judged == "file" and fault.level == "F16"


def _result(rows: list[Row], healthy: list[HealthyRow], bench: Bench, quick: bool, seconds: float) -> SelfTest:
    away = [r for r in rows if r.level == ELSEWHERE]
    seen = sum(r.caught for r in away)
    missed = [f"{r.fault} ({r.level}, {r.strength})" for r in rows if r.real and not r.caught]
    alarms = [f"{h.pair} {h.level}: {', '.join(h.alarms)}" for h in healthy if not h.passed]
    caught = [r for r in rows if r.caught]
    asked = [r for r in caught if r.named_right is not None]
    right = sum(bool(r.named_right) for r in asked) / len(asked) if asked else 0.0
    kinds = len({(r.fault, r.level) for r in rows})
    summary = (
        f"{kinds} faults at {len(rows)} strengths: {sum(r.real and r.caught for r in rows)} of "
        f"{sum(r.real for r in rows)} refused at the strength people met, {100 * right:.0f} % of the refusals named "
        f"right, {len(alarms)} false alarms on {len(healthy)} healthy files"
    )
    if away:
        named = sum(bool(r.named_right) for r in away)
        summary += f"; made elsewhere {seen} of {len(away)} refused, {named} of these named right"
    here = [r for r in rows if r.real and r.level != ELSEWHERE]
    good = all(r.caught for r in here) and not alarms and right >= NAMED_RIGHT and seen >= SEEN_ELSEWHERE * len(away)
    return SelfTest(
        verdict="pass" if good else "fail",
        summary=summary,
        quick=quick,
        model=bench.model,
        rows=rows,
        healthy=healthy,
        missed=missed,
        alarms=alarms,
        named_right=round(right, 4),
        versions=versions(),
        seconds=round(seconds, 1),
    )


def write_self_test(result: SelfTest, out: Path) -> Path:
    """self_test.json, self_test.md and self_test.html; returns the page's path."""
    from verification.fault_catalogue.page import html_page, markdown

    out.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("self_test.json", result.model_dump_json(indent=1) + "\n"),
        ("self_test.md", markdown(result)),
        ("self_test.html", html_page(result)),
    ):
        with atomic_file(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return out / "self_test.html"
