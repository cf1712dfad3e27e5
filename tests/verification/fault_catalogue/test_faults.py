"""The gate's detection power: a sample of the catalogue, and laws that no list of faults can replace.

Whatever differs from the reference is explained or refused: a key by its name, a tensor by its bytes. The laws change
random keys and random bytes; the catalogue's full run is `so8t verify --self-test`.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from verification.commands.lint_result import LintFinding
from verification.contract.file_structure import counts, layout, promised_types, vocabulary
from verification.contract.finding import Cause, Finding, as_check
from verification.contract.metadata import against_oracle, is_harmless, unread_differences
from verification.engines.quantise import quantise
from verification.fault_catalogue import run as runner
from verification.fault_catalogue.catalogue import catalogue
from verification.fault_catalogue.diagnosis import kind_of
from verification.fault_catalogue.edit import set_metadata
from verification.fault_catalogue.fault import Fault
from verification.fault_catalogue.file_gate import judge
from verification.fault_catalogue.models import Healthy, make_family, unknown_matrix
from verification.fault_catalogue.page import html_page, markdown
from verification.fault_catalogue.peer_checks import Others
from verification.fault_catalogue.plant import ELSEWHERE, Bench, as_quant
from verification.fault_catalogue.result import HealthyRow, Row, SelfTest
from verification.gate.report import Check
from verification.gguf.cache import Memory
from verification.gguf.candidate import Candidate
from verification.gguf.key_effects import TABLE
from verification.gguf.key_types import wanted
from verification.gguf.reader import STRING, read_gguf
from verification.gguf.writer import Raw
from verification.weight_parity.checks import weight_checks
from verification.weight_parity.compare import Examination
from verification.weight_parity.expected import inventory
from verification.weight_parity.explain import damage_cause, merge_cause

QUIET = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SAMPLE = (
    "llama3's RoPE factors wrong",
    "config.json with another epsilon",
    "heads counted wrong",
    "a token's score off",
    "more tokens than embedding rows",
    "a quantised tensor in a float file",
    "BOS missing",
    "untied head left out",
    "a bias left out",
    "a bias of zeros",
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with Others() as others:
        yield Bench(tmp_path_factory.mktemp("bench"), None, None, others, quick=True)


@pytest.fixture(scope="module")
def pair(bench: Bench) -> Healthy:
    return bench.pair("llama")


def by_name(name: str) -> Fault:
    return next(fault for fault in catalogue() if fault.name == name)


def test_the_catalogue_covers_the_classes_and_has_forty_faults() -> None:
    faults = catalogue()
    assert len({fault.name for fault in faults}) >= 40
    assert len({fault.kind for fault in faults}) >= 15
    for fault in faults:
        assert 0 <= fault.real < len(fault.strengths), fault.name
        assert len({strength.label for strength in fault.strengths}) == len(fault.strengths), fault.name


@pytest.mark.parametrize("name", SAMPLE)
def test_a_fault_at_its_real_strength_is_refused_and_named(
    bench: Bench, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_others", lambda *_: None)  # what others say is the published run's matter
    fault = replace(by_name(name), pair="llama")
    row = bench.row(fault, fault.strengths[fault.real], real=True)
    assert row.caught
    assert row.named_right, (row.named_kind, row.named_where, row.diagnosis)
    assert not row.identical


@pytest.mark.parametrize(
    "name",
    ["attn_k of one layer rotated twice", "ffn_down of one layer rotated back", "attn_qkv of one layer not rotated"],
)
def test_a_wrong_fold_of_any_target_is_refused_and_named(
    bench: Bench, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_others", lambda *_: None)
    fault = by_name(name)
    assert judge(bench.pair(fault.pair), bench.pair(fault.pair).files["F16"], bench.policy).caught_by == []
    row = bench.row(fault, fault.strengths[fault.real], real=True)
    assert row.caught
    assert row.named_right, (row.named_kind, row.named_where, row.diagnosis)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_K_M"])
def test_a_healthy_file_raises_no_alarm(bench: Bench, pair: Healthy, kind: str) -> None:
    judgement = judge(pair, pair.files[kind], bench.policy)
    assert judgement.passed
    assert judgement.caught_by == []


def test_a_healthy_file_made_elsewhere_raises_no_alarm(bench: Bench, pair: Healthy) -> None:
    judgement = judge(pair, pair.elsewhere.path, bench.policy)
    assert judgement.caught_by == []
    assert judgement.passed
    assert judgement.linted is not None
    assert any(row.drawer == "judged" for row in judgement.linted.tensors)


@pytest.mark.parametrize("name", ["tensors of two layers exchanged", "two heads exchanged", "norm's gain off"])
def test_a_fault_in_a_file_made_elsewhere_is_refused_and_named(bench: Bench, name: str) -> None:
    fault = replace(by_name(name), pair="llama")
    row = bench.elsewhere_row(fault, fault.strengths[fault.real], real=True)
    assert row.level == ELSEWHERE
    assert row.caught
    assert row.named_right, (row.named_kind, row.named_where, row.diagnosis)


def test_a_miss_made_elsewhere_fails_the_self_test_only_beyond_its_share(bench: Bench) -> None:
    row = {"fault": "f", "kind": "weights", "pair": "main", "level": ELSEWHERE, "strength": "x", "value": None}
    seen = Row(**row, real=True, caught=True, named_right=True)
    missed = seen.model_copy(update={"caught": False})
    assert runner._result([seen] * 39 + [missed], [], bench, True, 1.0).verdict == "pass"
    result = runner._result([seen] * 19 + [missed], [], bench, True, 1.0)
    assert result.verdict == "fail"
    assert "made elsewhere 19 of 20 refused" in result.summary
    assert len(result.missed) == 1


def test_a_fault_of_which_nothing_is_left_is_none(bench: Bench) -> None:
    fault = by_name("a token's score off")
    strengths = {strength.label: strength for strength in fault.strengths}
    seen = bench.row(fault, strengths["0.01"], real=False)
    assert seen.caught
    assert not seen.identical
    lost = bench.row(fault, strengths["1e-06"], real=False)  # float32 stores the same number
    assert not lost.caught
    assert lost.identical


def test_a_judged_file_is_let_go(bench: Bench) -> None:
    """Held open it would keep its disk and its mapped memory for the rest of the run, 270 MB each with SmolLM2."""
    fault = replace(by_name("config.json with another epsilon"), pair="llama")
    before = len(bench.digests)
    assert bench.row(fault, fault.strengths[fault.real], real=True).nmse is not None
    assert len(bench.digests) > before  # what it computes was looked up by its content
    gc.collect()
    assert "faulty" not in Path("/proc/self/maps").read_text()


def test_verify_sees_rope_factors_closer_than_lint_can(bench: Bench) -> None:
    """lint computes them with another library's powers, verify has the converter's own bytes."""
    fault = by_name("llama3's RoPE factors wrong")
    row = bench.row(fault, fault.strengths[-1], real=False)
    assert row.strength == "last x 1.000001"
    assert "verify contract.inventory" in row.caught_by
    assert all(check.startswith("verify ") for check in row.caught_by), row.caught_by


def _other(value: Any, number: int) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1 + number
    if isinstance(value, float):
        return float(np.float32(value) * np.float32(1 + 2.0 ** -(number % 20)) + np.float32(value == 0))
    if isinstance(value, str):
        return value + "x" * (1 + number % 3)
    if not value:
        return [1]
    at = number % len(value)
    return [*value[:at], _other(value[at], number), *value[at + 1 :]]


@QUIET
@given(st.data(), st.integers(0, 400))
def test_no_key_can_change_unnoticed(pair: Healthy, tmp_path: Path, data: st.DataObject, number: int) -> None:
    """Every key but the harmless ones, in any value of its type; removed; or added."""
    healthy = pair.opened["F16"]
    key = data.draw(st.sampled_from(sorted(k for k in healthy.metadata if not is_harmless(k))))
    raw = Raw.read(healthy.path)
    kind, value = raw.keys[key]
    if data.draw(st.booleans()):
        raw.keys[key] = kind, _other(value, number)
    else:
        del raw.keys[key]
    path = raw.write(tmp_path / "f.gguf")
    file = read_gguf(path)
    findings = [*against_oracle(file, healthy, pair.checkpoint.config), *counts(file), *vocabulary(file), *layout(file)]
    default = {"general.type", "tokenizer.ggml.add_sep_token", "llama.attention.head_count_kv"}
    absent_is_the_same = key not in file.metadata and (
        key in default
        or key.split(".", 1)[1]
        in ("attention.key_length", "attention.value_length", "rope.dimension_count", "vocab_size")
    )
    assert findings or absent_is_the_same, key
    assert not findings or any(key.split("[")[0] in f.where or f.where in key or "token" in key for f in findings)


@pytest.mark.parametrize("key", ["general.sampling.temp", "general.tensor_extra.name", "llama.attention.clamp_kqv"])
def test_no_key_that_llama_cpp_reads_can_be_added_unnoticed(pair: Healthy, tmp_path: Path, key: str) -> None:
    file = read_gguf(set_metadata(pair.files["F16"], tmp_path / "f.gguf", {key: 7.0}))
    assert [f.where for f in against_oracle(file, pair.opened["F16"])] == [key]
    assert unread_differences(file, pair.opened["F16"]) == []


@pytest.mark.parametrize("key", ["llama.new_switch", "qwen2.rope.freq_base", "tokenizer.ggml.fast", "x.y"])
def test_a_key_that_llama_cpp_does_not_read_is_a_note(pair: Healthy, tmp_path: Path, key: str) -> None:
    file = read_gguf(set_metadata(pair.files["F16"], tmp_path / "f.gguf", {key: 7.0}))
    assert against_oracle(file, pair.opened["F16"]) == []
    assert [f.where for f in unread_differences(file, pair.opened["F16"])] == [key]


def test_harmless_keys_may_say_anything(bench: Bench, pair: Healthy, tmp_path: Path) -> None:
    """Words; not the file type, which another check holds."""
    harmless = {key for key, effect in TABLE.items() if effect.kind == "information" and "{" not in key}
    lists = {"imatrix.datasets", "tokenizer.chat_templates"}
    rules = {key: wanted(key) for key in sorted(harmless - lists - {"general.file_type"})}
    words = {key: "anything" if rule is None or rule.allows(STRING, None) else 7 for key, rule in rules.items()}
    path = set_metadata(pair.files["F16"], tmp_path / "f.gguf", words)
    assert judge(pair, path, bench.policy).passed
    raw = Raw.read(path)
    raw.keys["general.file_type"] = raw.keys["general.file_type"][0], 15
    assert promised_types(read_gguf(raw.write(tmp_path / "g.gguf")))


BYTES = given(st.floats(0, 1, exclude_max=True), st.integers(1, 255))


@QUIET
@BYTES
def test_no_byte_of_a_float_tensor_can_change_unnoticed(
    pair: Healthy, tmp_path: Path, share: float, pattern: int
) -> None:
    assert_byte_is_noticed(pair, tmp_path, "F16", share, pattern)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M"])
@settings(QUIET, max_examples=8)
@BYTES
def test_no_byte_of_a_tensor_can_change_unnoticed(
    pair: Healthy, tmp_path: Path, kind: str, share: float, pattern: int
) -> None:
    assert_byte_is_noticed(pair, tmp_path, kind, share, pattern)


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_K_M"])
@settings(QUIET, max_examples=500)
@BYTES
def test_no_byte_of_a_tensor_can_change_unnoticed_among_many(
    pair: Healthy, tmp_path: Path, kind: str, share: float, pattern: int
) -> None:
    assert_byte_is_noticed(pair, tmp_path, kind, share, pattern)


def assert_byte_is_noticed(pair: Healthy, tmp_path: Path, kind: str, share: float, pattern: int) -> None:
    file = pair.opened[kind]
    data = bytearray(file.path.read_bytes())
    first = min(tensor.offset for tensor in file.tensors.values())
    at = first + int(share * (len(data) - first))
    data[at] ^= pattern
    path = tmp_path / "f.gguf"
    path.write_bytes(data)
    faulty = read_gguf(path)
    found = Examination(faulty, pair.sources, inventory(pair.checkpoint, faulty), memory=pair.memory).run(1)
    findings = [finding for result in found for finding in result.findings] + layout(faulty)
    hit = next(t.name for t in file.tensors.values() if at < -(-(t.offset + t.raw.size) // 32) * 32 and at >= t.offset)
    if not findings:  # lint explains single blocks by another machine and RoPE factors by another library; verify not
        refused = [check for check in _legs(pair, faulty, kind) if check.value and hit in check.detail]
        values = faulty.tensors[hit].values(), file.tensors[hit].values()
        assert refused or np.array_equal(*values)  # the sign of a zero means nothing
        return
    assert {finding.where for finding in findings} <= {hit, *_next(file, hit)}
    if pattern.bit_count() == 1 and at < file.tensors[hit].offset + file.tensors[hit].raw.size:
        finite = bool(np.isfinite(faulty.tensors[hit].values()).all())
        assert not finite or {finding.cause for finding in findings} & {"one flipped bit", "scaled by 0", ""}


def _legs(pair: Healthy, faulty: Any, kind: str) -> list[Any]:
    """The legs of verify that hold a file's bytes against the oracle's."""
    weights = weight_checks(Candidate(kind, faulty), pair.conversions, pair.sources, memory=pair.memory)
    return [*weights.contract, *weights.quantise]


def _next(file: Any, name: str) -> list[str]:
    """The tensor behind: padding is named by the tensor that follows it."""
    names = [t.name for t in sorted(file.tensors.values(), key=lambda t: t.offset)]
    at = names.index(name) + 1
    return names[at : at + 1]


def test_a_remembered_examination_is_the_examination(pair: Healthy, tmp_path: Path) -> None:
    path = tmp_path / "f.gguf"
    by_name("a bias of zeros").plant(pair, pair.files["F16"], path, math.nan)
    file = read_gguf(path)
    found = inventory(pair.checkpoint, file)
    memory = Memory()
    Examination(pair.opened["F16"], pair.sources, found, memory=memory).run(1)
    assert Examination(file, pair.sources, found, memory=memory).run(1) == Examination(file, pair.sources, found).run(1)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_spliced_quant_is_what_the_quantiser_writes(pair: Healthy, tmp_path: Path, elsewhere: bool) -> None:
    path = tmp_path / "f.gguf"
    by_name("v_proj scaled").plant(pair, pair.files["F16"], path, 1.1)
    faulty = read_gguf(path)
    spliced = read_gguf(as_quant(pair, faulty, tmp_path / "s.gguf", elsewhere=elsewhere))
    matrix = unknown_matrix(faulty) if elsewhere else {}
    whole = read_gguf(quantise(path, tmp_path / "q.gguf", "Q4_K_M", threads=1, imatrix=matrix))
    assert spliced.metadata == whole.metadata
    for name, tensor in whole.tensors.items():
        assert np.array_equal(tensor.raw, spliced.tensors[name].raw), name


@pytest.mark.parametrize(
    ("where", "code", "kind"),
    [
        ("blk.1.attn_q.weight", "head_rows", "attention layout"),
        ("blk.1.attn_q.weight", "row_order", "attention layout"),
        ("blk.1.ffn_up.weight", "row_order", "weights"),
        ("blk.1.ffn_up.weight", "flipped_bit", "file"),
        ("blk.1.ffn_up.weight", "f16_overflow", "number range"),
        ("blk.1.ffn_up.weight", "merge", "adapter"),
        ("blk.1.attn_v.weight", "rotation", "adapter"),
        ("blk.1.ffn_up.weight", "", "weights"),
    ],
)
def test_a_diagnosis_reads_codes_and_no_words(where: str, code: str, kind: str) -> None:
    for words in ("", "one flipped bit", "rotated twice", "q/k rows permuted", "F16 overflow"):
        finding = {"where": where, "expected": words, "found": words, "cause": words, "code": code}
        assert kind_of("weights", LintFinding.model_validate(finding)) == kind


def test_a_check_names_its_place_and_code_apart_from_its_sentence() -> None:
    finding = Finding("blk.1.attn_q.weight", "a", "b", cause="one flipped bit", code="flipped_bit")
    check = as_check("contract.hypotheses", "title", [finding, Finding("other", "a", "b")], subject="F16")
    assert (check.where, check.code, check.value) == ("blk.1.attn_q.weight", "flipped_bit", 2)
    old = check.model_dump(exclude={"code", "where"})  # a check before schema 1.3
    assert (Check.model_validate(old).code, Check.model_validate(old).where) == ("", "")


def test_causes_are_named_exactly() -> None:
    rng = np.random.default_rng(0)
    base, change = rng.standard_normal((2, 8, 64)).astype(np.float32)
    wanted = base + np.float32(0.01) * change
    assert merge_cause(base + np.float32(0.02) * change, wanted, base) == Cause(
        "the change from the base scaled by 2", "merge"
    )
    assert merge_cause(base, wanted, base) == Cause("the change from the base scaled by 0", "merge")
    assert (
        merge_cause(wanted + np.float32(0.01) * rng.standard_normal((8, 64)).astype(np.float32), wanted, base) is None
    )
    raw = wanted.view(np.uint8).reshape(-1).copy()
    flipped = raw.copy()
    flipped[100] ^= 16
    assert damage_cause(flipped, raw, 8) == Cause("one flipped bit", "flipped_bit")
    flipped[101] ^= 16
    assert damage_cause(flipped, raw, 8) is None
    rolled = np.roll(wanted, 1, axis=0).copy().view(np.uint8).reshape(-1)
    assert damage_cause(rolled, raw, 8) == Cause("the reference's rows in another order", "row_order")


def _harmless_fault(pair: Healthy, source: Path, target: Path, strength: float) -> None:
    set_metadata(source, target, {"general.description": "x"})


def test_the_self_test_itself_can_fail(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that nobody can see, met in the real world, fails it; so does an alarm, so does naming wrong."""
    monkeypatch.setattr(bench, "_others", lambda *_: None)
    monkeypatch.setattr(bench, "_logits", lambda *_: None)
    invisible = Fault("invisible", "file", _harmless_fault, ("x",), pair="llama")
    seen = by_name("a bias left out")
    missed = bench.row(invisible, invisible.strengths[0], real=True)
    good = bench.row(seen, seen.strengths[0], real=True)
    alarm = HealthyRow(pair="llama", level="F16", passed=False, alarms=["lint weights"])
    assert runner._result([good], [], bench, True, 1.0).verdict == "pass"
    for rows, healthy in (
        ([good, missed], []),
        ([good], [alarm]),
        ([good.model_copy(update={"named_right": False})], []),
    ):
        result = runner._result(rows, healthy, bench, True, 1.0)
        assert result.verdict == "fail"
    result = runner._result([good, missed], [alarm], bench, True, 1.0)
    assert result.missed == ["invisible (F16, yes)"]
    page, table = html_page(result), markdown(result)
    for text in (page, table):
        assert "invisible" in text
        assert "1 of 2" in text
    assert "://" not in page
    assert "<script" not in page


MAIN = {  # a checkpoint, a GGUF's tensor, its metadata and its bytes; all faults: `tox -e soak`
    "norm's gain off",
    "chat template's end cut",
    "LoRA's scale wrong in one layer",
    "saved without the rotation in one layer",
    "cut off",
}


def test_a_part_of_the_catalogue_through_the_whole_runner(tokenizer: Any, tmp_path: Path) -> None:
    """Every fault of it is refused and named; the rest, all strengths and the healthy files: `tox -e soak`."""
    told: list[str] = []
    result = runner.self_test(
        tokenizer=tokenizer,
        quick=True,
        only=lambda fault: fault.name in MAIN,
        healthy=False,
        out=tmp_path / "out",
        work=tmp_path / "work",
        elsewhere=False,
        tell=lambda stage, done, total: told.append(f"{stage} {done}/{total}"),
    )
    assert {row.fault for row in result.rows} == MAIN
    assert result.verdict == "pass", (result.missed, result.alarms)
    assert [row.fault for row in result.rows if not row.named_right] == []
    assert told[-1] == f"faults {len(result.rows)}/{len(result.rows)}"
    blind = [row for row in result.rows if row.nmse_says == "pass" and row.kld_says == "pass"]
    assert len(blind) >= 2  # what the usual checks let pass
    assert (tmp_path / "out" / "self_test.html").is_file()


@pytest.mark.soak
def test_the_quick_run_passes(tokenizer: Any, tmp_path: Path) -> None:
    result = runner.self_test(tokenizer=tokenizer, quick=True, out=tmp_path)
    assert result.verdict == "pass", (result.missed, result.alarms)
    assert (tmp_path / "self_test.html").is_file()


@pytest.mark.soak
def test_a_pair_whose_size_moved_lies_below_f16s_normal_range(tmp_path: Path) -> None:
    pair = make_family("llama small=18", tmp_path)
    file = pair.opened["F16"]
    assert np.abs(file.tensors["blk.0.attn_v.weight"].values()).max() < 1e-5


@pytest.mark.parametrize("name", ["detection", "detection_smollm2", "detection_elsewhere"])
def test_the_published_table_is_the_published_run(name: str) -> None:
    """docs/detection.md is written from the JSON beside it by scripts/publish_detection.py."""
    docs = Path(__file__).parents[3] / "docs"
    result = SelfTest.model_validate_json((docs / f"{name}.json").read_text(encoding="utf-8"))
    assert markdown(result) in (docs / "detection.md").read_text(encoding="utf-8")
    assert result.verdict == "pass"
    assert name != "detection" or {row.fault for row in result.rows} >= {fault.name for fault in catalogue()}
