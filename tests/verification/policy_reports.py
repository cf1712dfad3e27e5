"""Reports built check by check, for the laws of the decision."""

from __future__ import annotations

from verification import Report
from verification.gate.check import plain_check as check_of
from verification.gate.check import zero_check
from verification.gate.decide import LEG_TITLES
from verification.gate.report import Check, Leg, TensorRow


def plain_check(name: str, title: str, value: float, **more) -> Check:
    """As measured: a statistic comes with its interval, here a narrow one."""
    if name.endswith((".mean_kld", ".top1")) or name.startswith("dtype.mean_kld"):
        more.setdefault("interval", (value, value))
    return check_of(name, title, value, **more)


def report(*checks: Check) -> Report:
    legs: dict[str, list[Check]] = {}
    for check in checks:
        legs.setdefault(check.name.split(".")[0], []).append(check)
    return Report(
        verdict="incomplete", summary="", created="2026-01-01T00:00:00+00:00", artefacts=[],
        legs=[Leg(name=n, title=LEG_TITLES[n], compared="", status="not evaluated", checks=c) for n, c in legs.items()],
        policy={}, versions={}, durations={},
    )  # fmt: skip


def healthy() -> list[Check]:
    return [
        plain_check("convert.mean_kld", "KLD", 5e-6, subject="F16"),
        plain_check("quality.mean_kld", "KLD", 0.01, subject="Q8_0", interval=(0.008, 0.012)),
        zero_check("contract.metadata", "Metadata", 0, subject="F16"),
    ]


def everywhere(subject: str) -> list[Check]:
    """Healthy evidence of a run, and the cells that every report has to hold."""
    evidence = {"positions": 3060, "chunks": 12, "entropy": 2.5, "entropy_share": 0.2, "repeat": 0, "noise_floor": 0}
    checks = [plain_check(f"evidence.{name}", name, value) for name, value in evidence.items()]
    checks.append(plain_check("evidence.alignment", "alignment", 100.0, subject=subject))
    for cell in ("mid", "short", "n_ctx_shipped", "n_ubatch", "decode", "no_bos"):
        checks.append(plain_check(f"cells.{cell}.mean_kld", "KLD", 1e-6, subject=subject))
        checks.append(plain_check(f"cells.{cell}.top1", "Top", 1.0, subject=subject))
        checks.append(zero_check(f"cells.{cell}.non_finite", "Finite", 0, subject=subject))
    return checks


OF_A_FILE = (
    "token_ids", "added_specials", "chat_template", "stop_set", "special_ids", "metadata", "oracle_metadata",
    "fallback_types", "inventory", "finite_weights", "layout", "end_of_turn",
)  # fmt: skip


def tensor(label: str, kind: str) -> TensorRow:
    """The row of a tensor of one type, without which a report does not say of which type its file is."""
    return TensorRow(candidate=label, name="token_embd.weight", shape=[8, 256], nominal_type=kind, actual_type=kind)
