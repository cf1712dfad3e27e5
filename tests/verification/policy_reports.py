"""Reports built check by check, for the laws of the decision."""

from __future__ import annotations

from verification import Report, decide
from verification.gate.check import plain_check as check_of
from verification.gate.check import zero_check
from verification.gate.decide import LEG_TITLES
from verification.gate.policy import make_policy
from verification.gate.report import Artefact, Check, Leg, TensorRow


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
        verdict="incomplete",
        summary="",
        created="2026-01-01T00:00:00+00:00",
        artefacts=[],
        legs=[Leg(name=n, title=LEG_TITLES[n], compared="", status="not evaluated", checks=c) for n, c in legs.items()],
        policy={},
        versions={},
        durations={},
    )


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
    "token_ids",
    "added_specials",
    "chat_template",
    "stop_set",
    "special_ids",
    "metadata",
    "oracle_metadata",
    "fallback_types",
    "inventory",
    "finite_weights",
    "layout",
    "end_of_turn",
)


def tensor(label: str, kind: str) -> TensorRow:
    """The row of a tensor of one type, without which a report does not say of which type its file is."""
    return TensorRow(candidate=label, name="token_embd.weight", shape=[8, 256], nominal_type=kind, actual_type=kind)


def released(path: str = "m.gguf", sha256: str = "0" * 64, size: int = 1) -> Report:
    """A report of a float file, a quantised one and an adapter, which passes under the default policy.

    Every check that its inputs call for is there once: take one away and it does not pass.
    """
    checks = everywhere("F16") + [c for c in everywhere("Q8_0") if c.subject]
    for label in ("F16", "Q8_0"):
        checks += [zero_check(f"contract.{name}", name, 0, subject=label) for name in OF_A_FILE]
    checks += [
        plain_check("convert.rounding", "Rounding", 0.5, subject="F16"),
        plain_check("convert.mean_kld", "KLD", 5e-6, subject="F16", interval=(4e-6, 6e-6)),
        plain_check("convert.top1", "Top", 0.999, subject="F16", interval=(0.998, 1.0)),
        zero_check("convert.non_finite", "Finite", 0, subject="F16"),
        plain_check("quantise.tensors_differ", "Tensors", 0, subject="Q8_0"),
        zero_check("quantise.unexplained", "Unexplained", 0, subject="Q8_0"),
        plain_check("quality.mean_kld", "KLD", 0.01, subject="Q8_0", interval=(0.008, 0.012)),
        plain_check("quality.top1", "Top", 0.97, subject="Q8_0", interval=(0.96, 0.98)),
        zero_check("quality.non_finite", "Finite", 0, subject="Q8_0"),
        plain_check("bake.max_abs_logit", "Logits", 7e-5),
        plain_check("bake.top1_disagreements", "Positions", 0),
        plain_check("dtype.rounding", "Rounding", 0.5),
        plain_check("dtype.mean_kld.bfloat16", "KLD", 7e-5),
        zero_check("dtype.non_finite", "Finite", 0),
        plain_check("controls.differs_from_base", "Differs", 3.0),
        plain_check("controls.transposed", "Transposed", 40.0),
    ]
    artefacts = [
        Artefact(role="adapter", path="adapter", sha256="1" * 64, bytes=1),
        Artefact(role="candidate", path="f16.gguf", sha256="2" * 64, bytes=1, label="F16"),
        Artefact(role="candidate", path=path, sha256=sha256, bytes=size, label="Q8_0"),
    ]
    return decide(
        report(*checks).model_copy(
            update={
                "artefacts": artefacts,
                "tensors": [tensor("F16", "F16"), tensor("Q8_0", "Q8_0")],
                "policy": make_policy({}).model_dump(mode="json"),
            }
        )
    )
