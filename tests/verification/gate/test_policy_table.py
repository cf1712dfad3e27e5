"""The policy's table and its sentences, word for word: what must be there, which bound it has, what is said."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import yaml
from policy_reports import healthy, plain_check, report, tensor
from pydantic import ValidationError

from so8t_core.errors import InputError
from verification import decide, load_policy
from verification.gate.check import zero_check
from verification.gate.decide import LEG_TITLES, _evaluate, leg_status
from verification.gate.policy import DEFAULT_POLICY, BakeBounds, Policy, make_policy
from verification.gate.report import Artefact, Check, Divergence

# a value of its own for every bound, so that a check held against another one's shows
NUMBERED: dict[str, Any] = {
    "bake": {"max_abs_logit": 0.01, "top1_disagreements": 2},
    "dtype": {"float32": 0.03, "float16": 0.04, "bfloat16": 0.05, "rounding": 1.06},
    "convert": {"mean_kld": 0.07, "top1": 0.08, "rounding": 1.09, "BF16": {"mean_kld": 0.10, "top1": 0.11}},
    "quantise": {"tensors_differ": 12, "unexplained": 28, "output_error": 1.29, "codes_error": 1.30, "kld_ratio": 1.31},
    "quality": {"Q8_0": {"mean_kld": 0.13, "top1": 0.14}, "Q4_K_M": {"mean_kld": 0.15, "top1": 0.16}},
    "controls": {"differs_from_base": 0.17, "transposed": 0.18},
    "evidence": {"positions": 19, "chunks": 20, "entropy": 0.21, "entropy_share": 0.22, "alignment": 23.0},
    "cells": {"Q8_0": {"mean_kld": 0.24, "top1": 0.25}, "Q4_K_M": {"mean_kld": 0.26, "top1": 0.27}},
}
TABLE = [
    ("bake.max_abs_logit", "", "<=", 0.01),
    ("bake.top1_disagreements", "", "<=", 2),
    ("dtype.rounding", "", "<=", 1.06),
    ("dtype.mean_kld.float32", "", "<=", 0.03),
    ("dtype.mean_kld.float16", "", "<=", 0.04),
    ("dtype.mean_kld.bfloat16", "", "<=", 0.05),
    ("dtype.non_finite", "", "<=", 0),
    ("convert.mean_kld", "F16", "<=", 0.07),
    ("convert.mean_kld", "BF16", "<=", 0.10),
    ("convert.top1", "F32", ">=", 0.08),
    ("convert.top1", "BF16 (a.gguf)", ">=", 0.11),
    ("convert.rounding", "F16", "<=", 1.09),
    ("convert.rounding", "BF16", "<=", 1.09),
    ("convert.non_finite", "F16", "<=", 0),
    ("quantise.tensors_differ", "Q8_0", "<=", 12),
    ("quantise.unexplained", "Q8_0", "<=", 28),
    ("quantise.output_error", "Q8_0", "<=", 1.29),
    ("quantise.codes_error", "Q8_0", "<=", 1.30),
    ("quantise.kld_ratio", "Q8_0", "<=", 1.31),
    ("quality.mean_kld", "Q8_0", "<=", 0.13),
    ("quality.top1", "Q8_0", ">=", 0.14),
    ("quality.mean_kld", "Q4_K_M (a b.gguf)", "<=", 0.15),
    ("quality.top1", "Q4_K_M", ">=", 0.16),
    ("quality.non_finite", "Q8_0", "<=", 0),
    ("contract.metadata", "Q8_0", "<=", 0),
    ("controls.differs_from_base", "", ">=", 0.17),
    ("controls.transposed", "", ">=", 0.18),
    ("evidence.positions", "", ">=", 19),
    ("evidence.chunks", "", ">=", 20),
    ("evidence.entropy", "", ">=", 0.21),
    ("evidence.entropy_share", "", "<=", 0.22),
    ("evidence.alignment", "Q8_0", ">=", 23.0),
    ("evidence.repeat", "", "<=", 0),
    ("evidence.noise_floor", "", "<=", 0.07),
    ("cells.decode.mean_kld", "Q8_0", "<=", 0.24),
    ("cells.decode.top1", "Q8_0", ">=", 0.25),
    ("cells.short.mean_kld", "Q4_K_M", "<=", 0.26),
    ("cells.short.top1", "Q4_K_M", ">=", 0.27),
    ("cells.short.non_finite", "Q4_K_M", "<=", 0),
]


def check(name: str, subject: str = "") -> Check:
    return Check(name=name, title="", subject=subject, status="not evaluated")


@pytest.mark.parametrize(("name", "subject", "relation", "bound"), TABLE)
def test_every_check_is_held_against_its_own_bound(name: str, subject: str, relation: str, bound: float) -> None:
    assert make_policy(NUMBERED).bound(check(name, subject), subject.split(" ")[0]) == (relation, bound)


@pytest.mark.parametrize(
    ("name", "subject"),
    [("quality.mean_kld", "Q3_K_S"), ("cells.short.top1", "Q3_K_S"), ("quality.other", "Q8_0"), ("bake", "Q8_0")],
)
def test_a_check_that_the_policy_does_not_know_has_no_bound(name: str, subject: str) -> None:
    assert make_policy(NUMBERED).bound(check(name, subject), subject.split(" ")[0]) is None


def test_the_transposed_control_keeps_twice_the_distance_of_the_bake_leg() -> None:
    policy = make_policy({**NUMBERED, "bake": {"max_abs_logit": 0.5, "top1_disagreements": 0}})
    assert policy.bound(check("controls.transposed"), "") == (">=", 1.0)


def test_the_default_policy_is_the_file_beside_it_with_every_key() -> None:
    assert DEFAULT_POLICY.name == "default_policy.yaml"
    assert load_policy().model_dump(mode="json") == yaml.safe_load(DEFAULT_POLICY.read_text(encoding="utf-8"))


def test_an_override_leaves_the_default_as_it_was() -> None:
    before = make_policy({})
    make_policy({"bake": {"max_abs_logit": 7}, "required": [], "quality": {"Q2_K": {"mean_kld": 1, "top1": 0}}})
    assert make_policy({}) == before


@pytest.mark.parametrize(
    ("section", "key", "least", "largest"),
    [
        ("bake", "max_abs_logit", 0, None),
        ("bake", "top1_disagreements", -1, None),
        ("dtype", "float32", 0, None),
        ("dtype", "float16", 0, None),
        ("dtype", "bfloat16", 0, None),
        ("dtype", "rounding", 0, None),
        ("convert", "mean_kld", 0, None),
        ("convert", "top1", -1e-9, 1 + 1e-9),
        ("convert", "rounding", 0, None),
        ("quantise", "tensors_differ", -1, None),
        ("quantise", "unexplained", -1, None),
        ("quantise", "output_error", 0, None),
        ("quantise", "codes_error", 0, None),
        ("quantise", "kld_ratio", 0, None),
        ("controls", "differs_from_base", 0, None),
        ("controls", "transposed", 0, None),
        ("evidence", "positions", 0, None),
        ("evidence", "chunks", 1, None),
        ("evidence", "entropy", -1e-9, None),
        ("evidence", "entropy_share", 0, 1 + 1e-9),
        ("evidence", "alignment", 1 - 1e-9, None),
    ],
)
def test_bounds_outside_their_range_are_refused(section: str, key: str, least: float, largest: float | None) -> None:
    """`least` is the first value below the range, `largest` the first above it; just inside is taken."""
    for value in (least, largest):
        if value is not None:
            with pytest.raises(InputError, match=rf"^policy: `{section}\.{key}` = {value!r}: Input should be "):
                make_policy({section: {key: value}})
    whole = key in ("tensors_differ", "unexplained", "top1_disagreements", "positions", "chunks")
    inside = least + (1 if whole else 1e-6)
    assert make_policy({section: {key: inside}}).model_dump()[section][key] == inside
    if largest is not None:
        assert make_policy({section: {key: 1}}).model_dump()[section][key] == 1


def test_a_policy_cannot_be_changed_after_it_was_read() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        BakeBounds(max_abs_logit=1, top1_disagreements=0).max_abs_logit = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([1], "policy must be a mapping of keys, got list"),
        ({"bake": 3}, "policy: `bake` = 3: Input should be a valid dictionary or instance of BakeBounds"),
        ({"bakes": 3}, "policy: `bakes` = 3: unknown key"),
        ({"convert": {"BF16": {"mean_kld": 1, "top1": 2}}}, "policy: `convert.BF16.top1` = 2: Input should be less"),
        ({"required": {"bake": 1}}, "policy: `required` = {'bake': 1}: Input should be a valid list"),
        ({"bakes": {"top1": 1}}, "policy: `bakes` = {'top1': 1}: unknown key"),
        ({"bake": 3, "bakes": 3}, "policy: `bake` = 3: Input should be a valid dictionary"),  # the first of several
        ({"waivers": [{"check": "", "reason": "x"}]}, "policy: `waivers.0.check` = '': String should have at least 1"),
        ({"waivers": [{"check": "x", "reason": ""}]}, "policy: `waivers.0.reason` = '': String should have at least 1"),
        ({"waivers": [{"check": "x", "reason": "\t"}]}, "policy: `waivers.0.reason` = '\\t': String should match"),
    ],
)
def test_a_bad_policy_is_refused_with_key_value_and_bound(overrides: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        make_policy(overrides)
    assert str(error.value).startswith(message)
    assert make_policy({"waivers": [{"check": "x", "reason": "y"}]}).waivers[0].reason == "y"


def test_an_unreadable_policy_is_named_with_its_path(tmp_path: Any) -> None:
    path = tmp_path / "gate.yaml"
    with pytest.raises(InputError) as error:
        load_policy(path)
    assert str(error.value) == f"policy {path} does not exist; start from {DEFAULT_POLICY}"
    path.write_text("a: [\n" + "# filler\n" * 90, encoding="utf-8")
    with pytest.raises(InputError) as error:
        load_policy(path)
    assert str(error.value).startswith(f"policy {path} cannot be read: while parsing a flow node ")
    assert "\n" not in str(error.value)
    see = f"; every key is explained in {DEFAULT_POLICY}"
    path.write_text(f"a: !{'x' * 300} 1", encoding="utf-8")
    with pytest.raises(InputError) as error:
        load_policy(path)
    assert len(str(error.value)) == len(f"policy {path} cannot be read: {see}") + 200
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match="cannot be read: 'utf-8' codec"):
        load_policy(path)
    with pytest.raises(InputError, match="cannot be read: it is not a regular file"):
        load_policy(tmp_path)
    path.write_text("# nothing but comments\n", encoding="utf-8")
    assert load_policy(path) == load_policy(str(path)) == make_policy({})
    path.write_text("wrong: 1\n", encoding="utf-8")
    with pytest.raises(InputError) as error:
        load_policy(path)
    assert str(error.value) == f"{path}: `wrong` = 1: unknown key, known are {', '.join(Policy.model_fields)}{see}"


def test_the_sentences_of_a_policy_that_cannot_be_used(tmp_path: Any) -> None:
    path, see = tmp_path / "gate.yaml", f"every key is explained in {DEFAULT_POLICY}"

    def said(data: bytes) -> str:
        path.write_bytes(data)
        with pytest.raises(InputError) as error:
            load_policy(path)
        return str(error.value)

    assert said(b"a: [*b]") == f"policy {path} cannot be read: it uses an alias (*name); write the value out; {see}"
    assert said(b"#" * 65537) == f"policy {path} cannot be read: 65537 bytes, at most 65536 are read; {see}"
    path.write_bytes(b"#" * 65536)
    assert load_policy(path) == make_policy({})
    path.write_bytes(b"\xef\xbb\xbfconvert: {top1: 0.5}")  # as some editors write it
    assert load_policy(path).convert.top1 == 0.5
    assert said(b"bake: {max_abs_logit: true}") == (
        f"{path}: `bake.max_abs_logit` = True: true and false are no bounds; {see}"
    )
    assert said(b'{"a\\e\\n  b": 1}') == (
        f"{path}: `a? b` = 1: unknown key, known are {', '.join(Policy.model_fields)}; {see}"
    )
    assert said(b"{" + b"x" * 300 + b": 1}").startswith(f"{path}: `{'x' * 200}` = 1: unknown key, known are required, ")
    assert said(b"[1]") == f"{path} must be a mapping of keys, got list; {see}"
    assert said(b"quality: {Q8_0: {mean_kld: 1, top1: 1, x: 1}}").endswith(
        f": `quality.Q8_0.x` = 1: unknown key, known are mean_kld, top1; {see}"
    )
    assert said(b"cells: {Q2_K: {mean_kld: 1, top1: 1, x: 1}}").endswith(
        f": `cells.Q2_K.x` = 1: unknown key, known are mean_kld, top1; {see}"
    )
    with pytest.raises(InputError) as error:
        load_policy(tmp_path)
    assert str(error.value) == f"policy {tmp_path} cannot be read: it is not a regular file; {see}"


@pytest.mark.parametrize("number", [1 << 63, -(1 << 63), 1 << 5000])
def test_a_bound_beyond_64_bits_is_refused(number: int) -> None:
    with pytest.raises(InputError, match=r"`quantise.tensors_differ` = .*: a bound has 64 bits at most; every key"):
        make_policy({"quantise": {"tensors_differ": number}})
    assert make_policy({"quantise": {"tensors_differ": (1 << 63) - 1}}).quantise.tensors_differ == (1 << 63) - 1


def test_what_is_no_report_is_refused_with_the_first_missing_key() -> None:
    with pytest.raises(InputError) as error:
        decide({**report().model_dump(), "legs": [{"name": "bake"}]})
    assert str(error.value) == "this is not an SO8T report: `legs.0.title`: Field required"
    stored = report().model_copy(update={"policy": {"bake": 1}})
    with pytest.raises(InputError, match=r"^the report's policy: `bake` = 1"):
        decide(stored)


def artefact(role: str, label: str = "") -> Artefact:
    return Artefact(role=role, path="x", sha256="0" * 64, bytes=1, label=label)  # type: ignore[arg-type]


RUN = ["evidence." + name for name in ("positions", "chunks", "entropy", "entropy_share", "repeat", "noise_floor")]
CELLS = [
    f"cells.{cell}.{value}"
    for cell in ("mid", "short", "n_ctx_shipped", "n_ubatch", "decode", "no_bos")
    for value in ("mean_kld", "top1", "non_finite")
]
CONTRACT = [
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
]
FILE = [*CONTRACT, "evidence.alignment", *CELLS]
FLOATS = ["convert.rounding", "convert.mean_kld", "convert.top1", "convert.non_finite"]
QUANTS = ["quantise.tensors_differ", "quantise.unexplained", "quality.mean_kld", "quality.top1", "quality.non_finite"]
ADAPTED = [
    "bake.max_abs_logit",
    "bake.top1_disagreements",
    "dtype.rounding",
    "dtype.non_finite",
    "controls.differs_from_base",
    "controls.transposed",
    "dtype.mean_kld.bfloat16",
]


@pytest.mark.parametrize(
    ("artefacts", "of_subject", "of_run"),
    [
        ([artefact("reference"), artefact("base"), artefact("corpus"), artefact("policy")], [], []),
        ([artefact("candidate", "F16")], [*FILE, *FLOATS], RUN),
        ([artefact("candidate", "BF16 (a.gguf)")], [*FILE, *FLOATS], RUN),
        ([artefact("candidate", "Q8_0")], [*FILE, *QUANTS], RUN),
        ([artefact("adapter")], [], [*ADAPTED, *RUN]),
    ],
)
def test_what_a_report_has_to_hold_follows_from_its_inputs(
    artefacts: list[Artefact], of_subject: list[str], of_run: list[str]
) -> None:
    """Every check that is called for, and nothing else: leaving one out leaves exactly that one open."""
    subject = artefacts[0].label
    given = {"artefacts": artefacts, "tensors": [tensor(subject, subject.split(" ")[0])]}
    wanted = [*((name, subject) for name in of_subject), *((name, "") for name in of_run)]
    whole = report(*[zero_check(name, "X", 0, subject=subject) for name, subject in wanted])
    whole = whole.model_copy(update=given)
    assert not [
        c for leg in decide(whole, make_policy({"required": []})).legs for c in leg.checks if ".complete" in c.name
    ]
    for name, subject in wanted:
        kept = [zero_check(n, "X", 0, subject=s) for n, s in wanted if (n, s) != (name, subject)]
        decided = decide(report(*kept).model_copy(update=given), make_policy({"required": []}))
        (gap,) = [c for leg in decided.legs for c in leg.checks if c.name.endswith(".complete")]
        assert gap.name == f"{name.split('.')[0]}.complete"
        assert gap.title == "All of the leg's checks are there"
        assert gap.status == "not evaluated"
        said = name.removesuffix(".bfloat16")  # of three types, one of which is enough
        assert gap.detail == f"the report has no {said}" + (f" of {subject}" if subject else "")


def test_several_gaps_of_a_leg_are_counted() -> None:
    given = {"artefacts": [artefact("candidate", "Q8_0")], "tensors": [tensor("Q8_0", "Q8_0")]}
    empty = report().model_copy(update=given)
    decided = decide(empty, make_policy({"required": []}))
    assert [leg.name for leg in decided.legs] == ["quantise", "quality", "contract", "evidence", "cells"]
    details = {leg.name: leg.checks[0].detail for leg in decided.legs}
    assert details["quantise"] == "the report has no quantise.tensors_differ of Q8_0 and 1 more"
    assert details["quality"] == "the report has no quality.mean_kld of Q8_0 and 2 more"
    assert details["contract"] == "the report has no contract.token_ids of Q8_0 and 11 more"
    assert all(leg.status == "not evaluated" and leg.compared == "" for leg in decided.legs)
    assert decide(decided, make_policy({"required": []})) == decided
    first = plain_check("quality.mean_kld", "Mean KLD", 0.01, subject="Q8_0", interval=(0.009, 0.011))
    two = decide(report(first).model_copy(update=given))
    (quality,) = [leg for leg in two.legs if leg.name == "quality"]
    assert quality.checks[-1].detail.endswith(" and 1 more")


def test_a_report_decided_again_carries_the_policy_it_was_decided_by() -> None:
    other = make_policy({"required": [], "quality": {"Q8_0": {"mean_kld": 0.5, "top1": 0.1}}})
    decided = decide(report(*healthy()), other)
    assert decided.policy == json.loads(other.model_dump_json())
    assert decided.policy != decide(report(*healthy()), make_policy({})).policy


def test_a_required_leg_without_anything_says_why_it_is_open() -> None:
    decided = decide(report(*healthy()), make_policy({"required": ["convert", "dtype"]}))
    leg = decided.legs[-1]
    assert (leg.name, leg.title, leg.compared, leg.status) == ("dtype", "Saved precision", "", "not evaluated")
    (only,) = leg.checks
    assert (only.name, only.title, only.status) == ("dtype.evaluated", "Leg evaluated", "not evaluated")
    assert only.detail == "the policy requires this leg, but nothing was given to measure it with"
    assert decided.summary == f"Incomplete: dtype, leg evaluated was not evaluated: {only.detail}."


def test_legs_have_their_names_and_their_order() -> None:
    assert list(LEG_TITLES.items()) == [
        ("bake", "Bake"),
        ("dtype", "Saved precision"),
        ("convert", "Conversion"),
        ("quantise", "Quantisation"),
        ("quality", "Quality"),
        ("contract", "Contract"),
        ("controls", "Controls"),
        ("evidence", "Evidence"),
        ("cells", "Cells"),
    ]
    mixed = report(zero_check("quality.non_finite", "X", 0, subject="Q8_0"), zero_check("contract.metadata", "X", 0))
    named = mixed.model_copy(update={"legs": [leg.model_copy(update={"compared": leg.name}) for leg in mixed.legs]})
    legs = decide(named, make_policy({"required": []})).legs
    assert [(leg.name, leg.title, leg.compared) for leg in legs] == [
        ("quality", "Quality", "quality"),
        ("contract", "Contract", "contract"),
    ]


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ([], "not evaluated"),
        (["pass"], "pass"),
        (["waived"], "waived"),
        (["waived", "pass"], "pass"),
        (["waived", "inconclusive"], "inconclusive"),
        (["inconclusive", "not evaluated"], "not evaluated"),
        (["inconclusive", "not evaluated", "fail"], "fail"),
    ],
)
def test_a_leg_takes_its_worst_status(statuses: list[Any], expected: str) -> None:
    assert leg_status(statuses) == expected


def test_a_report_of_waived_legs_only_is_no_pass() -> None:
    policy = make_policy({"required": [], "waivers": [{"check": "contract.metadata", "reason": "r"}]})
    assert decide(report(zero_check("contract.metadata", "X", 1)), policy).verdict == "incomplete"


def status_of(value: Any, relation: Any, bound: Any) -> str:
    """Status of a check with this relation; its name is no statistic's, so no interval is asked for."""
    return _evaluate(
        Check(name="convert.other", title="X", status="not evaluated", value=value, relation=relation, bound=bound)
    )


@pytest.mark.parametrize(
    ("value", "relation", "bound", "expected"),
    [
        (1, "<=", 1, "pass"),
        (2, "<=", 1, "fail"),
        (1, ">=", 1, "pass"),
        (0, ">=", 1, "fail"),
        ("a", "==", "a", "pass"),
        ("a", "==", "b", "fail"),
        ("a", "!=", "b", "pass"),
        ("a", "!=", "a", "fail"),
        ("a", "<=", "b", "fail"),
        (1, "<=", "2", "fail"),
        ("1", ">=", 1, "fail"),
        (math.nan, "<=", 1, "fail"),
        (math.nan, ">=", 1, "fail"),
        (None, "<=", 1, "not evaluated"),
        (1, "<=", None, "not evaluated"),
        (1, None, 1, "not evaluated"),
    ],
)
def test_relations_hold_or_not(value: Any, relation: Any, bound: Any, expected: str) -> None:
    assert status_of(value, relation, bound) == expected


def test_a_statistic_that_is_a_text_was_not_evaluated() -> None:
    stored = Check(name="quality.mean_kld", title="X", subject="Q8_0", status="pass", value="0", interval=(0, 1))
    assert decide(report(stored), make_policy({"required": []})).legs[0].checks[0].status == "fail"


@pytest.mark.parametrize("value", [1.5, math.inf])
def test_open_evidence_that_is_no_number_fails(value: float) -> None:
    (leg,) = decide(report(plain_check("evidence.entropy_share", "X", value)), make_policy({"required": []})).legs
    assert leg.status == ("inconclusive" if value == 1.5 else "fail")


def test_open_evidence_that_is_a_text_or_no_number_is_a_failure_in_words() -> None:
    assert decided_check(plain_check("evidence.entropy", "X", "much")).status == "fail"
    nothing = plain_check("evidence.entropy", "Mean entropy", math.nan)
    assert summary(nothing) == "Do not release: evidence, mean entropy is nan, bound >= 0.5."


def test_every_status_is_a_word() -> None:
    for name in ("cells.decode.mean_kld", "quality.mean_kld", "quality.non_finite"):
        assert decided_check(plain_check(name, "X", 0.0, subject="Q8_0", interval=(0.0, 0.0))).status == "pass"


def decided_check(stored: Check, **overrides: Any) -> Check:
    return decide(report(stored), make_policy({"required": [], **overrides})).legs[0].checks[0]


def test_fallback_types_are_shown_as_allowed_or_held_to_zero() -> None:
    stored = plain_check("contract.fallback_types", "X", 5, subject="Q4_K_M")
    strict = decided_check(stored, contract={"allow_fallback_types": False})
    assert (strict.relation, strict.bound, strict.status) == ("<=", 0, "fail")
    loose = decided_check(stored)
    assert (loose.relation, loose.bound, loose.status) == (None, "any, by policy", "pass")


def test_a_statistic_without_a_bound_says_which_key_the_policy_lacks() -> None:
    stored = plain_check("quality.mean_kld", "X", 0.1, subject="IQ3_M (a b.gguf)").model_copy(
        update={"relation": "<=", "bound": 1.0, "status": "pass"}
    )
    found = decided_check(stored)
    assert (found.relation, found.bound, found.status) == (None, None, "not evaluated")
    assert (
        found.detail
        == "the policy has no quality bound for IQ3_M; add `quality: {IQ3_M: {mean_kld: .., top1: ..}}` to it"
    )


def test_a_saved_type_without_a_bound_is_named() -> None:
    stored = plain_check("dtype.mean_kld.float8", "X", 0.1)
    assert decided_check(stored).detail == "float8 has no bound; save in float32, float16 or bfloat16"


@pytest.mark.parametrize("status", ["fail", "inconclusive"])
def test_a_waiver_covers_what_was_measured_and_does_not_hold_and_nothing_that_passes(status: str) -> None:
    value = {"fail": 0.3, "inconclusive": 0.019}[status]
    interval = {"fail": (0.2, 0.4), "inconclusive": (0.01, 0.03)}[status]
    stored = plain_check("quality.mean_kld", "X", value, subject="Q8_0", interval=interval)
    assert decided_check(stored).status == status
    waiver = {"check": "quality.mean_kld", "reason": "because"}
    waived = decided_check(stored, waivers=[{"check": "quality.top1", "reason": "no"}, waiver])
    assert (waived.status, waived.reason) == ("waived", "because")
    assert decided_check(waived).reason == ""
    good = plain_check("quality.mean_kld", "X", 0.01, subject="Q8_0")
    assert (decided_check(good, waivers=[waiver]).status, decided_check(good, waivers=[waiver]).reason) == ("pass", "")


@pytest.mark.parametrize("value", [None, 0.01])
def test_a_waiver_never_accepts_what_was_not_measured(value: float | None) -> None:
    """Neither a value that is not there nor a mean without its interval."""
    stored = plain_check("quality.mean_kld", "X", 0.01, subject="Q8_0")
    stored = stored.model_copy(update={"value": value, "interval": None})
    waiver = {"check": "quality.mean_kld", "reason": "because"}
    assert decided_check(stored, waivers=[waiver]).status == "not evaluated"
    assert decide(report(*healthy(), stored), make_policy({"waivers": [waiver]})).verdict == "incomplete"


@pytest.mark.parametrize("order", [1, -1])
def test_a_leg_that_stands_twice_in_a_report_counts_twice(order: int) -> None:
    legs = [
        report(plain_check("bake.max_abs_logit", "X", value)).legs[0].model_copy(update={"compared": word})
        for value, word in ((99.0, "first"), (0.0, "second"))
    ]
    twice = report(*healthy())
    twice = twice.model_copy(update={"legs": [*twice.legs, *legs[::order]]})
    assert decide(twice, make_policy({})).verdict == "fail"
    alone = twice.model_copy(update={"legs": [leg for leg in twice.legs if leg is not legs[0]]})
    assert decide(alone, make_policy({})).verdict == "pass"


@pytest.mark.parametrize("bound", [float("inf"), float("nan")])
def test_a_bound_that_is_no_number_is_refused(bound: float) -> None:
    with pytest.raises(InputError, match=r"bake\.max_abs_logit.*finite"):
        make_policy({"bake": {"max_abs_logit": bound}})


def summary(*checks: Check, **overrides: Any) -> str:
    return decide(report(*checks), make_policy({"required": [], **overrides})).summary


def test_sentences_of_a_failure() -> None:
    long = plain_check("quality.mean_kld", "Mean KL divergence", 0.12345, subject="Q8_0", detail="3060 positions")
    assert summary(long) == (
        "Do not release: quality, mean KL divergence of Q8_0 is 0.123, bound <= 0.02: 3060 positions."
    )
    count = zero_check("contract.metadata", "Metadata", 1)
    assert summary(count) == "Do not release: contract, metadata is 1, bound <= 0."
    assert summary(long, count, *healthy()) == (
        "Do not release: quality, mean KL divergence of Q8_0 is 0.123, bound <= 0.02 (1 more): 3060 positions."
    )
    odd = {"quality": {"Q8_0": {"mean_kld": 0.0123456, "top1": 0.9}}, "evidence": {"entropy": 0.54321}}
    assert "is 0.123, bound <= 0.0123: 3060" in summary(long, **odd)
    near = plain_check("quality.mean_kld", "Mean KLD", 0.012, subject="Q8_0", interval=(0.011, 0.013))
    assert summary(near, **odd) == "Inconclusive: mean KLD of Q8_0 may reach 0.013, bound 0.0123; use more chunks."
    flat = plain_check("evidence.entropy", "Entropy", 0.5)
    assert summary(flat, **odd) == "Inconclusive: entropy is 0.5, bound >= 0.543."
    low = plain_check("convert.top1", "Same top", 0.5, subject="F16", interval=(0.4, 0.6))
    assert summary(low) == "Do not release: convert, same top of F16 is 0.5, bound >= 0.995."


def test_sentences_of_an_open_verdict() -> None:
    high = plain_check("quality.mean_kld", "Mean KLD", 0.019, subject="Q8_0", interval=(0.018, 0.0216))
    assert summary(high) == "Inconclusive: mean KLD of Q8_0 may reach 0.0216, bound 0.02; use more chunks."
    low = plain_check("convert.top1", "Same top", 0.999, subject="F16", interval=(0.9876, 1.0))
    assert summary(low) == "Inconclusive: same top of F16 may reach 0.988, bound 0.995; use more chunks."
    assert summary(low, high, zero_check("contract.metadata", "M", 0)) == (
        "Inconclusive: same top of F16 may reach 0.988, bound 0.995 (1 more); use more chunks."
    )
    text = plain_check("evidence.positions", "Scored Positions", 999, detail="use more text")
    assert summary(text) == "Inconclusive: scored Positions is 999, bound >= 1000: use more text."
    assert summary(text, plain_check("evidence.chunks", "Chunks", 2)) == (
        "Inconclusive: scored Positions is 999, bound >= 1000 (1 more): use more text."
    )
    unknown = Check(name="quality.top1", title="Top", subject="Q8_0", status="not evaluated", detail="nothing finite")
    assert summary(unknown) == "Incomplete: quality, top of Q8_0 was not evaluated: nothing finite."
    assert summary(unknown, unknown) == "Incomplete: quality, top of Q8_0 was not evaluated (1 more): nothing finite."


def some_divergence(label: str, mean: float) -> Divergence:
    return Divergence(
        reference="r",
        candidate=label,
        tokens=1,
        chunks=1,
        n_ctx=8,
        vocab=2,
        mean_kld=mean,
        mean_kld_interval=(0, 1),
        mean_kld_llama_cpp=0,
        max_kld=0,
        kld_percentiles={},
        top1=1,
        top1_interval=(0, 1),
        rms_dp=0,
        ppl_reference=1,
        ppl_candidate=1,
        ppl_ratio=1,
        ppl_ratio_interval=(1, 1),
        reference_entropy=1,
        kld_by_position=[],
        kld_by_confidence=[],
        histogram=[],
    )


def test_sentences_of_a_release() -> None:
    assert summary(*healthy()) == "Release: all 3 checks in 3 legs passed."
    waiver = {"check": "contract.layout", "reason": "r"}
    broken = zero_check("contract.layout", "X", 2)
    assert summary(*healthy(), broken, waivers=[waiver]) == "Release: all 3 checks in 3 legs passed, 1 waived."
    seen = report(*healthy()).model_copy(
        update={"divergences": [some_divergence("F16", 1e-6), some_divergence("Q8_0", 0.01234)]}
    )
    assert decide(seen, make_policy({"required": []})).summary == (
        "Release: all 3 checks in 3 legs passed; largest mean KLD 0.012 nats (Q8_0)."
    )


def test_the_gate_and_the_reader_agree_on_what_a_float_file_is() -> None:
    from verification.gate import decide as decision
    from verification.gguf import reader

    assert decision.FLOAT_TYPES == reader.FLOAT_TYPES
