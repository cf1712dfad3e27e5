"""Laws of the decision: order of verdicts, bounds, waivers, and that nothing unmeasured counts as a pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from so8t_core.errors import InputError
from verification import Report, decide, load_policy
from verification.checks import plain_check, zero_check
from verification.policy import LEG_TITLES, make_policy
from verification.schema import Artefact, Check, Leg


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


def verdict(*checks: Check, **overrides) -> str:
    return decide(report(*checks), make_policy(overrides)).verdict


def test_healthy_values_pass() -> None:
    decided = decide(report(*healthy()), make_policy({}))
    assert decided.verdict == "pass"
    assert decided.summary.startswith("Release")
    assert decided.legs[0].checks[0].bound == 5e-5


@pytest.mark.parametrize(
    ("name", "subject", "value"),
    [
        ("bake.max_abs_logit", "", 1.1e-3),
        ("bake.top1_disagreements", "", 1),
        ("dtype.mean_kld.bfloat16", "", 3.1e-4),
        ("dtype.mean_kld.float16", "", 1.1e-5),
        ("dtype.rounding", "", 1.6),
        ("convert.mean_kld", "F16", 5.1e-5),
        ("convert.top1", "F16", 0.9949),
        ("convert.rounding", "F16", 1.01),
        ("quantise.tensors_differ", "Q8_0", 1),
        ("quality.mean_kld", "Q8_0", 0.021),
        ("quality.mean_kld", "Q4_K_M (a.gguf)", 0.151),
        ("quality.top1", "Q4_K_M", 0.79),
        ("controls.differs_from_base", "", 0.0099),
        ("controls.transposed", "", 0.0099),
        ("contract.fallback_types", "Q4_K_M", 1),
        ("convert.mean_kld", "F16", float("nan")),
    ],
)
def test_every_default_bound_can_fail(name: str, subject: str, value: float) -> None:
    decided = decide(report(*healthy(), plain_check(name, "X", value, subject=subject)), make_policy({}))
    assert decided.verdict == "fail"
    assert "Do not release" in decided.summary


def test_a_mean_within_and_an_interval_beyond_is_inconclusive_for_quality_only() -> None:
    wide = plain_check("quality.mean_kld", "KLD", 0.019, subject="Q8_0", interval=(0.017, 0.021))
    assert verdict(*healthy(), wide) == "inconclusive"
    convert = plain_check("convert.mean_kld", "KLD", 4e-5, subject="F16", interval=(3e-5, 6e-5))
    assert verdict(*healthy(), convert) == "pass"


def test_order_is_fail_then_incomplete_then_inconclusive() -> None:
    wide = plain_check("quality.mean_kld", "KLD", 0.019, subject="Q8_0", interval=(0.017, 0.021))
    unknown = plain_check("quality.top1", "Top", 0.9, subject="Q3_K_S")
    failed = zero_check("contract.metadata", "Metadata", 1)
    assert verdict(*healthy(), wide, unknown) == "incomplete"
    assert verdict(*healthy(), wide, unknown, failed) == "fail"


def test_a_required_leg_that_was_not_measured_is_incomplete_until_it_is_not_required() -> None:
    strict = decide(report(*healthy()), make_policy({"required": ["convert", "bake"]}))
    assert strict.verdict == "incomplete"
    assert "bake" in strict.summary
    assert decide(strict, make_policy({})).verdict == "pass"


def test_an_empty_report_is_no_pass() -> None:
    assert verdict(required=[]) == "incomplete"


def test_a_waiver_turns_a_failure_into_waived_with_its_reason() -> None:
    failed = zero_check("contract.chat_template", "Template", 1, subject="Q8_0")
    waiver = {"check": "contract.chat_template", "subject": "Q8_0", "reason": "the server sets it"}
    decided = decide(report(*healthy(), failed), make_policy({"waivers": [waiver]}))
    assert decided.verdict == "pass"
    assert "1 waived" in decided.summary
    assert decided.legs[-1].checks[-1].reason == "the server sets it"
    other = make_policy({"waivers": [{**waiver, "subject": "F16"}]})
    assert decide(decided, other).verdict == "fail"


def test_a_waiver_without_a_reason_is_refused() -> None:
    with pytest.raises(InputError, match="reason"):
        make_policy({"waivers": [{"check": "contract.chat_template", "reason": ""}]})


def test_fallback_types_pass_only_when_allowed() -> None:
    check = plain_check("contract.fallback_types", "Fallback", 181, subject="Q4_K_M")
    assert verdict(*healthy(), check) == "fail"
    assert verdict(*healthy(), check, contract={"allow_fallback_types": True}) == "pass"


def test_deciding_twice_changes_nothing_and_survives_json() -> None:
    once = decide(report(*healthy()), make_policy({}))
    assert decide(once) == once
    assert decide(Report.model_validate_json(once.model_dump_json())) == once


def test_a_partial_policy_file_keeps_the_other_bounds(tmp_path: Path) -> None:
    path = tmp_path / "gate.yaml"
    path.write_text("convert: {mean_kld: 1.0e-6}\n", encoding="utf-8")
    policy = load_policy(path)
    assert policy.convert.mean_kld == 1e-6
    assert policy.convert.top1 == load_policy().convert.top1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("convert: {mean_kdl: 1}", r"convert\.mean_kdl.*unknown key"),
        ("convert: {mean_kld: high}", r"convert\.mean_kld.*number"),
        ("[1, 2]", "mapping"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_bad_policy_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "gate.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_policy(path)
    with pytest.raises(InputError, match="does not exist"):
        load_policy(tmp_path / "none.yaml")


def test_something_that_is_no_report_is_refused() -> None:
    with pytest.raises(InputError, match="not an SO8T report"):
        decide({"verdict": "pass"})


def test_a_loosened_bake_leg_must_still_refuse_the_wrong_bake() -> None:
    control = plain_check("controls.transposed", "R transposed", 0.5)
    assert verdict(*healthy(), control) == "pass"
    assert verdict(*healthy(), control, bake={"max_abs_logit": 1.0}) == "fail"


def test_a_reason_of_spaces_is_no_reason() -> None:
    with pytest.raises(InputError, match="reason"):
        make_policy({"waivers": [{"check": "convert.mean_kld", "reason": "  "}]})


@pytest.mark.parametrize("change", [{"relation": None}, {"bound": 9}, {"relation": ">="}])
@pytest.mark.parametrize("name", ["contract.metadata", "quality.non_finite"])
def test_an_equality_keeps_its_bound_whatever_a_stored_report_says(name: str, change: dict) -> None:
    check = zero_check(name, "X", 1, subject="Q8_0").model_copy(update=change)
    assert verdict(*healthy(), check) == "fail"


def test_a_check_without_relation_does_not_pass() -> None:
    check = zero_check("convert.reference_entropy", "X", 1, subject="F16").model_copy(update={"relation": None})
    assert verdict(*healthy(), check) == "incomplete"


def test_a_report_that_lacks_a_check_of_its_candidate_is_incomplete() -> None:
    """A leg outside `required` cannot vanish: what was given as an input has to be held against everything."""
    whole = report(
        *[zero_check(f"contract.{name}", "X", 0, subject="Q8_0") for name in OF_A_FILE],
        plain_check("convert.mean_kld", "KLD", 5e-6, subject="F16 (oracle)"),
        plain_check("quantise.tensors_differ", "X", 0, subject="Q8_0"),
        plain_check("quality.mean_kld", "KLD", 0.01, subject="Q8_0"),
        plain_check("quality.top1", "Top", 0.99, subject="Q8_0"),
        zero_check("quality.non_finite", "X", 0, subject="Q8_0"),
    )
    given = Artefact(role="candidate", path="m.gguf", sha256="0", bytes=1, label="Q8_0")
    whole = whole.model_copy(update={"artefacts": [given]})
    assert decide(whole, make_policy({})).verdict == "pass"
    for leg in whole.legs:
        for check in leg.checks:
            if check.subject != "Q8_0":
                continue
            rest = [o.model_copy(update={"checks": [c for c in o.checks if c is not check]}) for o in whole.legs]
            cut = decide(whole.model_copy(update={"legs": [o for o in rest if o.checks]}), make_policy({}))
            assert cut.verdict == "incomplete", check.name
            assert check.name in cut.summary
            assert decide(cut) == cut


OF_A_FILE = (
    "token_ids", "added_specials", "chat_template", "stop_set", "special_ids", "metadata", "oracle_metadata",
    "fallback_types", "inventory", "finite_weights",
)  # fmt: skip


def test_bfloat16_files_have_bounds_of_their_own_and_no_other_file_borrows_them() -> None:
    def alone(name: str, value: float, subject: str) -> str:
        return verdict(plain_check(name, name, value, subject=subject), required=[])

    for subject, expected in (("BF16", "pass"), ("BF16 (a.gguf)", "pass"), ("F16", "fail"), ("F32", "fail")):
        assert alone("convert.mean_kld", 7e-5, subject) == expected
        assert alone("convert.top1", 0.993, subject) == expected
    assert alone("convert.mean_kld", 3.1e-4, "BF16") == "fail"
    assert alone("convert.top1", 0.984, "BF16") == "fail"
    assert alone("convert.rounding", 1.01, "BF16") == "fail"
