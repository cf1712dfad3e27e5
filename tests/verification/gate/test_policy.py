"""Laws of the decision: order of verdicts, bounds, waivers, and that nothing unmeasured counts as a pass."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from policy_reports import OF_A_FILE, everywhere, healthy, plain_check, released, report, tensor

from so8t_core.errors import InputError
from verification import Report, decide, load_policy
from verification.gate.check import zero_check
from verification.gate.decide import LEG_TITLES
from verification.gate.policy import make_policy, weaker
from verification.gate.report import BY_CODES, BY_OUTPUT, Artefact, Check


def verdict(*checks: Check, **overrides) -> str:
    return decide(report(*checks), make_policy(overrides)).verdict


def test_healthy_values_pass() -> None:
    decided = decide(report(*healthy()), make_policy({}))
    assert decided.verdict == "pass"
    assert decided.summary.startswith("Release")
    assert decided.legs[0].checks[0].bound == 5e-5


def test_the_type_of_a_file_chooses_its_bounds_whatever_its_label_says() -> None:
    """A label is for people; a file named "small" of the type Q4_K_M is held to the bounds of Q4_K_M."""
    given = {"path": "m.gguf", "sha256": "0" * 64, "bytes": 1}
    for kind, bound in (("Q4_K_M", 0.15), ("Q8_0", 0.02), ("", None)):
        file = Artefact.model_validate({**given, "role": "candidate", "label": "small", "type": kind})
        measured = report(plain_check("quality.mean_kld", "X", 0.01, subject="small"))
        decided = decide(measured.model_copy(update={"artefacts": [file]}), make_policy({}))
        found = [check for leg in decided.legs for check in leg.checks if check.name == "quality.mean_kld"]
        assert found[0].bound == bound
    older = Artefact.model_validate({**given, "role": "candidate", "label": "Q4_K_M (m.gguf)"})  # before schema 1.4
    assert older.type == "Q4_K_M"


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
        ("quantise.unexplained", "Q8_0", 1),
        ("quality.mean_kld", "Q8_0", 0.021),
        ("quality.mean_kld", "Q4_K_M (a.gguf)", 0.151),
        ("quality.top1", "Q4_K_M", 0.79),
        ("controls.differs_from_base", "", 0.0099),
        ("controls.transposed", "", 0.0099),
        ("convert.mean_kld", "F16", float("nan")),
    ],
)
def test_every_default_bound_can_fail(name: str, subject: str, value: float) -> None:
    decided = decide(report(*healthy(), plain_check(name, "X", value, subject=subject)), make_policy({}))
    assert decided.verdict == "fail"
    assert "Do not release" in decided.summary


@pytest.mark.parametrize(
    ("name", "subject", "value", "interval", "expected"),
    [
        ("quality.mean_kld", "Q8_0", 0.019, (0.017, 0.021), "inconclusive"),
        ("convert.mean_kld", "F16", 4e-5, (3e-5, 6e-5), "inconclusive"),
        ("dtype.mean_kld.bfloat16", "", 2e-4, (1e-4, 4e-4), "inconclusive"),
        ("cells.decode.mean_kld", "F16", 5e-5, (1e-5, 2e-4), "pass"),  # cells are decided on their mean
        ("convert.top1", "F16", 0.999, (0.99, 1.0), "inconclusive"),
        ("quality.top1", "Q8_0", 0.95, (0.92, 0.97), "inconclusive"),
        ("cells.short.top1", "Q8_0", 0.95, (0.7, 0.99), "pass"),
        ("quality.top1", "Q8_0", 0.95, (0.94, 0.97), "pass"),
        ("quality.mean_kld", "Q8_0", 0.021, (0.010, 0.030), "fail"),
    ],
)
def test_a_statistic_is_decided_on_the_far_end_of_its_interval(
    name: str, subject: str, value: float, interval: tuple[float, float], expected: str
) -> None:
    decided = decide(report(*healthy(), plain_check(name, "X", value, subject=subject, interval=interval)))
    assert decided.verdict == expected


@pytest.mark.parametrize("interval", [None, (0.0, 0.0), (0.5, 0.6), (float("nan"), float("nan"))])
def test_a_statistic_without_its_own_interval_was_not_evaluated(interval: tuple[float, float] | None) -> None:
    assert verdict(*healthy(), plain_check("quality.mean_kld", "X", 0.01, subject="Q8_0", interval=interval)) == (
        "incomplete"
    )


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("evidence.positions", 999, "inconclusive"),
        ("evidence.chunks", 7, "inconclusive"),
        ("evidence.entropy", 0.49, "inconclusive"),
        ("evidence.entropy_share", 0.81, "inconclusive"),
        ("evidence.noise_floor", 5.1e-5, "inconclusive"),
        ("evidence.entropy", float("nan"), "fail"),
        ("evidence.alignment", 1.9, "fail"),
        ("evidence.alignment", float("nan"), "fail"),
        ("evidence.repeat", 1e-6, "fail"),
        ("cells.chat.non_finite", 1, "fail"),
        ("cells.chat.mean_kld", 2e-4, "fail"),
    ],
)
def test_evidence_that_cannot_decide_is_inconclusive_and_a_broken_evaluator_fails(
    name: str, value: float, expected: str
) -> None:
    decided = decide(report(*healthy(), plain_check(name, "Title", value, subject="F16")))
    assert decided.verdict == expected
    assert "title" in decided.summary


def test_a_cell_without_a_bound_in_the_policy_is_not_evaluated() -> None:
    borrowed = plain_check("cells.short.mean_kld", "X", 0.1, subject="Q2_K").model_copy(
        update={"bound": 9.0, "relation": "<="}
    )
    assert verdict(*healthy(), borrowed) == "incomplete"
    assert verdict(*healthy(), borrowed, cells={"Q2_K": {"mean_kld": 1.0, "top1": 0.1}}) == "pass"


def test_a_cell_is_waived_by_name_with_its_reason() -> None:
    bad = plain_check("cells.n_ctx_larger.mean_kld", "X", 0.3, subject="F16", detail="LongRoPE factor choice")
    assert verdict(*healthy(), bad) == "fail"
    waiver = {"check": "cells.n_ctx_larger.mean_kld", "reason": "the Modelfile sets num_ctx to 4096"}
    assert verdict(*healthy(), bad, waivers=[waiver]) == "pass"
    assert verdict(*healthy(), bad, waivers=[{**waiver, "check": "cells.n_ctx_shipped.mean_kld"}]) == "fail"


def test_a_report_of_schema_1_0_is_read_and_said_to_lack_what_is_decided_on_now() -> None:
    given = Artefact(role="candidate", path="m.gguf", sha256="0" * 64, bytes=1, label="F16")
    names = [*(f"contract.{name}" for name in OF_A_FILE), "convert.non_finite"]
    checks = [zero_check(name, "X", 0, subject="F16") for name in names]
    checks += [
        plain_check(f"convert.{n}", n, v, subject="F16")
        for n, v in (("rounding", 0.5), ("mean_kld", 1e-6), ("top1", 1.0))
    ]
    rows = [tensor("F16", "F16")]
    raw = (
        report(*checks)
        .model_copy(update={"artefacts": [given], "tensors": rows})
        .model_dump(exclude={"cells", "noise"})
    )
    decided = decide({**raw, "schema_version": "1.0", "verdict": "pass"})
    assert decided.verdict == "incomplete"
    assert "the report has no evidence." in decided.summary or "the report has no cells." in decided.summary


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
    assert verdict(*healthy(), check) == "pass"
    assert verdict(*healthy(), check, contract={"allow_fallback_types": False}) == "fail"


def test_differing_tensors_pass_only_where_each_was_judged_and_the_policy_demands_no_proof() -> None:
    """A report before schema 1.3 counts what nothing explained: it is held to zero, whatever its policy says."""
    differ = plain_check("quantise.tensors_differ", "X", 3, subject="Q4_K_M")
    judged = plain_check("quantise.unexplained", "X", 0, subject="Q4_K_M")
    assert verdict(*healthy(), differ, judged) == "pass"
    assert verdict(*healthy(), differ, judged, quantise={"tensors_differ": 0}) == "fail"
    assert verdict(*healthy(), differ, judged, quantise={"tensors_differ": 3}) == "pass"
    old = report(*healthy(), differ).model_copy(update={"schema_version": "1.2"})
    assert decide(old, make_policy({})).verdict == "fail"
    assert decide(old, make_policy({"quantise": {"tensors_differ": 3}})).verdict == "pass"


def test_a_tensor_that_its_layers_output_decides_needs_that_check() -> None:
    """A report from which the check was cut does not pass by the weights alone."""
    given = Artefact(role="candidate", path="m.gguf", sha256="0" * 64, bytes=1, label="Q4_K_M")
    for why, more in ((BY_OUTPUT, 3), (BY_CODES, 4), ("by another build or machine", 2)):
        row = tensor("Q4_K_M", "Q4_K").model_copy(update={"drawer": "judged", "why": why})
        whole = report(*healthy()).model_copy(update={"artefacts": [given], "tensors": [row]})
        detail = next(
            c.detail for leg in decide(whole, make_policy({})).legs for c in leg.checks if leg.name == "quantise"
        )
        assert f"and {more} more" in detail


def test_a_report_of_an_older_schema_needs_no_check_that_it_could_not_have() -> None:
    given = Artefact(role="candidate", path="m.gguf", sha256="0" * 64, bytes=1, label="Q8_0")
    for version, gap in (("1.2", False), ("1.3", True), ("1.10", True), ("1.x", False)):
        bare = report(*healthy()).model_copy(update={"artefacts": [given], "schema_version": version})
        details = [c.detail for leg in decide(bare, make_policy({})).legs for c in leg.checks if leg.name == "quantise"]
        assert ("and 1 more" in details[0]) == gap


@pytest.mark.parametrize(("drawer", "passes"), [("proven", True), ("judged", False), ("unexplained", False)])
def test_a_count_that_the_table_of_tensors_contradicts_does_not_pass(drawer: str, passes: bool) -> None:
    """The sample counts no tensor that differs."""
    given = released()
    row = tensor("Q8_0", "Q8_0").model_copy(update={"drawer": drawer})
    kept = [other for other in given.tensors if other.candidate != "Q8_0"]
    decided = decide(given.model_copy(update={"tensors": [*kept, row]}))
    assert (decided.verdict == "pass") == passes
    gaps = [check.detail for leg in decided.legs for check in leg.checks if check.name == "quantise.complete"]
    if drawer == "unexplained":  # two counts contradict it, one gap is named
        assert gaps == ["the report has no count of Q8_0's unexplained tensors that its table bears out"]


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
        ("convert: {mean_kld: true}", r"convert\.mean_kld. = True: true and false are no bounds"),
        ("evidence: {positions: true}", "true and false are no bounds"),
        ("quantise: {tensors_differ: 9223372036854775808}", "the number in line 1 has more than 64 bits"),
        ("\n\nquantise: {tensors_differ: 0x" + "f" * 5000 + "}", "the number in line 3 has more than 64 bits"),
        ("quantise: {tensors_differ: " + "9" * 5000 + "}", "limit .4300 digits."),
        ("convert: {mean_kld: 2026-99-99}", "month must be in 1..12"),
        ("convert: {top1: 1}\nconvert: {mean_kld: 1}", "a key stands twice in the mapping of line 1"),
        ("convert: {top1: 1}\nbake: {max_abs_logit: 1,\n max_abs_logit: 2}", "twice in the mapping of line 2"),
        ("a: &a [x]\nb: [*a, *a]", "uses an alias"),
        ("a: " + "[" * 14 + "]" * 14, "unknown key"),
        ("a: " + "[" * 15 + "]" * 15, "unknown key"),
        ("a: " + "[" * 16 + "]" * 16, "nested deeper than 16 levels"),
        ("a: " + "[" * 60_000, "nested deeper than 16 levels"),
        ("convert:\n\tmean_kld: 1", "cannot be read"),
        ("\0", "cannot be read"),
        ('{"a\\e[31m\\n\\nb": 1}', "unknown key, known are required, bake, "),
        ("bake: {max_abs_logits: 1}", "known are max_abs_logit, top1_disagreements; every key is explained in"),
        ("quality: {Q2_K: {mean: 1, top1: 1, mean_kld: 1}}", "known are mean_kld, top1;"),
        ("waivers: [{check: x, reason: y, because: z}]", "known are check, subject, reason;"),
        ("# " + "x" * 70_000, "at most 65536 are read"),
    ],
)
def test_a_bad_policy_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "gate.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as refused:
        load_policy(path)
    assert str(refused.value).isprintable()  # one line, and nothing that a terminal obeys
    assert len(str(refused.value)) < 700
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
        zero_check("quantise.unexplained", "X", 0, subject="Q8_0"),
        plain_check("quality.mean_kld", "KLD", 0.01, subject="Q8_0"),
        plain_check("quality.top1", "Top", 0.99, subject="Q8_0"),
        zero_check("quality.non_finite", "X", 0, subject="Q8_0"),
        *everywhere("Q8_0"),
    )
    given = Artefact(role="candidate", path="m.gguf", sha256="0" * 64, bytes=1, label="Q8_0")
    whole = whole.model_copy(update={"artefacts": [given], "tensors": [tensor("Q8_0", "Q8_0")]})
    assert decide(whole, make_policy({})).verdict == "pass"
    for leg in whole.legs:
        for check in leg.checks:
            if check.subject != "Q8_0" and leg.name != "evidence":
                continue
            rest = [o.model_copy(update={"checks": [c for c in o.checks if c is not check]}) for o in whole.legs]
            cut = decide(whole.model_copy(update={"legs": [o for o in rest if o.checks]}), make_policy({}))
            assert cut.verdict == "incomplete", check.name
            assert check.name in cut.summary
            assert decide(cut) == cut


def test_bfloat16_files_have_bounds_of_their_own_and_no_other_file_borrows_them() -> None:
    def alone(name: str, value: float, subject: str) -> str:
        return verdict(plain_check(name, name, value, subject=subject), required=[])

    for subject, expected in (("BF16", "pass"), ("BF16 (a.gguf)", "pass"), ("F16", "fail"), ("F32", "fail")):
        assert alone("convert.mean_kld", 7e-5, subject) == expected
        assert alone("convert.top1", 0.993, subject) == expected
    assert alone("convert.mean_kld", 3.1e-4, "BF16") == "fail"
    assert alone("convert.top1", 0.984, "BF16") == "fail"
    assert alone("convert.rounding", 1.01, "BF16") == "fail"


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        ({}, []),
        ({"convert": {"mean_kld": 1e-6}, "evidence": {"positions": 9999}, "required": list(LEG_TITLES)}, []),
        ({"required": ["convert"]}, ["required without contract"]),
        ({"convert": {"mean_kld": 6e-5}}, ["convert.mean_kld 6e-05 for 5e-05"]),
        ({"convert": {"top1": 0.994}}, ["convert.top1 0.994 for 0.995"]),
        ({"convert": {"BF16": {"mean_kld": 1e-4, "top1": 0.9}}}, ["convert.BF16.top1 0.9 for 0.985"]),
        (
            {"evidence": {"positions": 10, "entropy_share": 0.9}},
            ["evidence.positions 10 for 1000", "evidence.entropy_share 0.9 for 0.8"],
        ),
        (
            {"evidence": {"chunks": 2, "entropy": 0, "alignment": 1}},
            ["evidence.chunks 2 for 8", "evidence.entropy 0 for 0.5", "evidence.alignment 1 for 2"],
        ),
        (
            {"controls": {"differs_from_base": 1e-3, "transposed": 1e-3}},
            ["controls.differs_from_base 0.001 for 0.01", "controls.transposed 0.001 for 0.01"],
        ),
        ({"contract": {"allow_fallback_types": False}, "quantise": {"tensors_differ": 0}}, []),
        ({"quantise": {"unexplained": 2}}, ["quantise.unexplained 2 for 0"]),
        ({"quality": {"Q2_K": {"mean_kld": 1, "top1": 0}}}, ["quality.Q2_K added"]),
        ({"waivers": [{"check": "convert.top1", "reason": "r"}]}, ["waiver of convert.top1"]),
    ],
)
def test_what_makes_a_policy_weaker_than_the_default_is_named(overrides: dict, found: list[str]) -> None:
    assert weaker(make_policy(overrides), make_policy({})) == found


def test_a_policy_without_a_bound_is_weaker_than_one_with_any() -> None:
    strict = make_policy({"quantise": {"tensors_differ": 0}, "contract": {"allow_fallback_types": False}})
    assert weaker(strict, make_policy({})) == []
    assert weaker(make_policy({}), strict) == [
        "quantise.tensors_differ inf for 0",
        "contract.allow_fallback_types 1 for 0",
    ]


@pytest.mark.parametrize("subject", ["F16", "F16 (a.gguf)", "F32", "BF16", "Q8_0", "Q4_K_M", "IQ4_XS", "unknown"])
@pytest.mark.parametrize("kinds", [[], ["F16", "F32"], ["Q8_0", "F32"], ["F32", "Q4_K", "Q6_K"], ["Q2_K"], ["BF16"]])
def test_a_label_is_only_believed_where_the_recorded_tensors_agree(subject: str, kinds: list[str]) -> None:
    """The label chooses bounds and checks: a float file holds no quantised tensor, a 4-bit file one of 4 bits."""
    given = Artefact(role="candidate", path="m.gguf", sha256="0" * 64, bytes=1, label=subject)
    rows = [tensor(subject, kind) for kind in kinds] + [tensor("another", "Q8_0"), tensor("other", "F16")]
    decided = decide(report().model_copy(update={"artefacts": [given], "tensors": rows}), make_policy({}))
    gap = next(check for leg in decided.legs for check in leg.checks if check.name == "contract.complete")
    quantised = [kind for kind in kinds if kind not in ("F16", "F32", "BF16")]
    if not kinds:
        agrees = False
    elif subject.split(" ")[0] in ("F16", "F32", "BF16"):
        agrees = not quantised
    elif subject == "unknown":
        agrees = True
    else:
        agrees = any(kind[:2] == subject.removeprefix("I")[:2] for kind in quantised)
    assert ("and 11 more" in gap.detail) == agrees
    assert ("and 12 more" in gap.detail) == (not agrees)


@pytest.mark.parametrize(
    ("name", "value", "interval", "status"),
    [
        ("convert.mean_kld", -1.0, (-1.0, 0.0), "fail"),
        ("convert.mean_kld", -1e-9, (-1e-9, 1e-9), "pass"),
        ("convert.mean_kld", -1e-6, (-1e-6, 1e-9), "pass"),
        ("convert.mean_kld", -1.5e-6, (-1.5e-6, 1e-9), "fail"),
        ("convert.top1", 1.0, (1.0, 1.0), "pass"),
        ("convert.top1", 1.5, (1.4, 1.6), "fail"),
        ("convert.rounding", -0.1, None, "fail"),
        ("convert.rounding", 0.9, None, "pass"),
        ("contract.metadata", -1, None, "fail"),
        ("evidence.alignment", 1.0e9, None, "pass"),
    ],
)
def test_a_value_that_nothing_can_measure_fails(
    name: str, value: float, interval: tuple[float, float] | None, status: str
) -> None:
    given = zero_check(name, "X", 0, subject="F16").model_copy(update={"value": value, "interval": interval})
    (leg,) = decide(report(given), make_policy({"required": []})).legs
    assert leg.status == status


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"])
def test_types_without_blocks_are_not_quantised(kind: str) -> None:
    given = Artefact(role="candidate", path="m.gguf", sha256="0" * 64, bytes=1, label="F16")
    found = report().model_copy(update={"artefacts": [given], "tensors": [tensor("F16", kind)]})
    (gap,) = [c for leg in decide(found).legs for c in leg.checks if c.name == "contract.complete"]
    assert gap.detail == "the report has no contract.token_ids of F16 and 11 more"


def test_a_label_that_the_tensors_contradict_is_the_gap_that_is_named() -> None:
    checks = [zero_check(f"contract.{name}", "X", 0, subject="F16") for name in OF_A_FILE]
    given = Artefact(role="candidate", path="m.gguf", sha256="0" * 64, bytes=1, label="F16")
    found = report(*checks).model_copy(update={"artefacts": [given], "tensors": [tensor("F16", "Q4_K")]})
    (gap,) = [c for leg in decide(found).legs for c in leg.checks if c.name == "contract.complete"]
    assert gap.detail == "the report has no tensor of F16's type"


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_one_saved_type_is_enough(name: str) -> None:
    given = Artefact(role="adapter", path="a", sha256="0" * 64, bytes=1)
    found = report(plain_check(f"dtype.mean_kld.{name}", "X", 1e-7)).model_copy(update={"artefacts": [given]})
    (gap,) = [c for leg in decide(found).legs for c in leg.checks if c.name == "dtype.complete"]
    assert gap.detail == "the report has no dtype.rounding and 1 more"


def test_why_a_check_has_no_bound_is_said_in_its_place() -> None:
    """Of a check that nobody knows, of a statistic of a kind without bounds; what was not measured keeps its reason."""

    def detail(check: Check) -> str:
        return decide(report(check), make_policy({"required": []})).legs[0].checks[0].detail

    known = "convert.other is no check of this version of so8t, so no bound is known for it; verify again"
    assert detail(plain_check("convert.other", "X", 1)) == known
    assert detail(zero_check("convert.other", "X", 1).model_copy(update={"value": None, "detail": "why"})) == "why"
    open_kind = plain_check("quality.top1", "X", 0.9, subject="Q2_K").model_copy(
        update={"value": None, "detail": "why"}
    )
    assert detail(open_kind).startswith("the policy has no quality bound for Q2_K; add ")


def test_a_decision_costs_as_much_as_its_report_is_long() -> None:
    """Not the product of two of its lists: files x tensors, files x checks, checks x files."""

    def steps(count: int) -> int:
        """How many bytecodes a decision on `count` more files executes: a number that no other process changes."""
        made = released()
        quant = next(a for a in made.artefacts if a.label == "Q8_0")
        files = [quant.model_copy(update={"label": f"Q8_0 {n}"}) for n in range(count)]
        rows = [made.tensors[-1].model_copy(update={"candidate": f"Q8_0 {n}"}) for n in range(count)]
        checks = [c.model_copy(update={"subject": f"Q8_0 {n}"}) for n in range(count) for c in made.legs[-1].checks[:2]]
        legs = [*made.legs, made.legs[-1].model_copy(update={"checks": checks})]
        big = made.model_copy(update={"artefacts": [*made.artefacts, *files], "tensors": rows, "legs": legs})
        executed = 0

        def each(frame, event, _argument):
            nonlocal executed
            frame.f_trace_opcodes = True
            executed += event == "opcode"
            return each

        before = sys.gettrace()
        sys.settrace(each)
        try:
            assert decide(big).verdict != "pass"
        finally:
            sys.settrace(before)
        return executed

    # Eight times the files: 8 times the steps if linear, at most 9 with sorting (log 800 / log 100 = 1.45 of a
    # small part); 64 times where two lists are multiplied.
    assert steps(800) < 10 * steps(100)


def by_file(*labels: str) -> Report:
    """A report of files held against a reference file, without the weights; the default policy passes it."""
    whole = released()
    of_weights = ("convert.rounding", "quantise.tensors_differ", "quantise.unexplained")
    kept = [check for leg in whole.legs for check in leg.checks if check.subject in ("", *labels)]
    kept = [check for check in kept if check.name not in of_weights]
    kept = [check for check in kept if not check.name.startswith(("bake", "dtype", "controls"))]
    if "F16" not in labels:
        kept = [check for check in kept if check.name != "evidence.noise_floor"]
    kept += [zero_check("contract.tensor_statistics", "Statistics", 0, subject=label) for label in labels]
    reference = Artefact(role="reference_file", path="reference.so8t", sha256="3" * 64, bytes=1)
    given = [artefact for artefact in whole.artefacts if artefact.label in labels]
    tensors = [row for row in whole.tensors if row.candidate in labels]
    return report(*kept).model_copy(update={"artefacts": [reference, *given], "tensors": tensors})


def _without(given: Report, name: str) -> Report:
    legs = [
        leg.model_copy(update={"checks": [check for check in leg.checks if check.name != name]}) for leg in given.legs
    ]
    return given.model_copy(update={"legs": [leg for leg in legs if leg.checks]})


@pytest.mark.parametrize("labels", [("Q8_0",), ("F16", "Q8_0")])
def test_a_comparison_with_a_reference_file_needs_all_that_needs_no_weights(labels: tuple[str, ...]) -> None:
    whole = by_file(*labels)
    passed = decide(whole, make_policy({}))
    total, legs = sum(len(leg.checks) for leg in whole.legs), len(whole.legs)
    assert passed.summary.startswith(
        f"Agrees with the reference file: all {total} checks that need no weights passed in {legs} legs"
    )
    assert passed.verdict == "pass"
    for name in {check.name for leg in whole.legs for check in leg.checks}:
        cut = decide(_without(whole, name), make_policy({}))
        assert cut.verdict == "incomplete", name
        assert name in cut.summary
    for leg in whole.legs:
        rest = whole.model_copy(update={"legs": [other for other in whole.legs if other is not leg]})
        assert decide(rest, make_policy({})).verdict == "incomplete", leg.name


def test_the_weights_beside_a_reference_file_have_to_be_looked_at() -> None:
    whole = by_file("F16", "Q8_0")
    weights = Artefact(role="reference", path="merged", sha256="4" * 64, bytes=1)
    decided = decide(whole.model_copy(update={"artefacts": [weights, *whole.artefacts]}), make_policy({}))
    assert decided.verdict == "incomplete"
    assert "convert.rounding of F16" in decided.summary


def test_with_the_weights_a_missing_conversion_is_missed_whatever_was_given() -> None:
    whole = released()
    rest = [leg for leg in whole.legs if leg.name != "convert"]
    quants = [artefact for artefact in whole.artefacts if artefact.label != "F16"]
    decided = decide(whole.model_copy(update={"legs": rest, "artefacts": quants}))
    assert decided.verdict == "incomplete"
    assert {leg.status for leg in decided.legs if leg.name == "convert"} == {"not evaluated"}
