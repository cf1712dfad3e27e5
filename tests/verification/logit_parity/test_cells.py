"""Cells: which apply and why not, and the trap that they are for: LongRoPE factors picked by the allocated n_ctx."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from so8t_core.errors import InputError
from verification.commands.request import VerifyRequest
from verification.engines.convert import convert
from verification.engines.huggingface import hf_chunk, load_hf
from verification.engines.llama_logits import LlamaLogits
from verification.gate.decide import decide
from verification.gate.policy import Policy, make_policy
from verification.gate.report import Check, Leg, Report
from verification.logit_parity import compare
from verification.logit_parity.compare import (
    FileResult,
    Reference,
    cell_checks,
    distinct,
    measure_file,
    passages_of,
    run_reference,
)
from verification.logit_parity.kl import mean_kld
from verification.logit_parity.run_modes import CACHE_LIMIT, Passage, Plan, cache_bytes, plan_cells, shipped_n_ctx
from verification.logit_parity.text import Corpus
from verification.reference.rope import depends_on_length, original_length

PHI35 = {
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "hidden_size": 3072,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "num_hidden_layers": 32,
    "sliding_window": 262144,
    "rope_scaling": {"type": "longrope"},
}
TEXT = [np.arange(100, 612) % 500 for _ in range(12)]


def reasons(plan: Plan) -> dict[str, str]:
    return {cell.name: cell.why for cell in plan.cells}


def test_every_cell_applies_or_says_why() -> None:
    plan = plan_cells("full", TEXT, PHI35, bos=1, chats=[np.arange(30)])
    why = reasons(plan)
    assert list(why) == [
        "short",
        "n_ctx_shipped",
        "n_ctx_larger",
        "n_ubatch",
        "decode",
        "no_bos",
        "bos",
        "chat",
        "kv_q8_0",
        "kv_q4_0",
        "flash_on",
        "flash_off",
        "long",
        "rope_straddle",
        "rope_beyond",
        "window",
        "context",
    ]
    assert {name for name, text in why.items() if text} == {"window"}
    by_name = {cell.name: cell for cell in plan.cells}
    assert (by_name["n_ctx_shipped"].n_ctx, by_name["n_ctx_larger"].n_ctx) == (4096, 8192)
    assert "LongRoPE factor choice" in by_name["n_ctx_larger"].note
    assert by_name["n_ctx_shipped"].note == ""
    lengths = {name: len(plan.passages[name][0].tokens) for name in ("long", "rope_straddle", "rope_beyond")}
    assert lengths == {"long": 1024, "rope_straddle": 4096 + 64, "rope_beyond": 4096 + 1024 + 128}
    assert [(len(p.tokens), p.rows) for p in plan.passages["context"]] == [(8192, 128)]
    straddling = plan.passages["rope_straddle"][0]
    assert straddling.first < 4096 < len(straddling.tokens)
    quick = reasons(plan_cells("quick", TEXT, PHI35, bos=None))
    assert quick["context"] == "measured with --cells full or --long-context"
    assert quick["long"] == quick["rope_beyond"] == "measured with --cells full"
    assert quick["bos"] == "the tokenizer has no BOS token"
    assert "no chat template" in quick["chat"]
    plain = reasons(plan_cells("full", TEXT, {"max_position_embeddings": 2048}, bos=1))
    assert "no original length" in plain["rope_straddle"]
    assert plain["n_ctx_larger"] == "the model's RoPE is the same for every length and allocated context"
    dynamic = {"max_position_embeddings": 2048, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    assert reasons(plan_cells("full", TEXT, dynamic))["n_ctx_larger"] == "the model's context ends at the shipped 2048"


@pytest.mark.parametrize(
    ("rope", "depends"),
    [
        (None, False),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}, False),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, False),
        ({"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "linear"}}, False),
        ({"type": "su", "long_factor": [1.0], "short_factor": [1.0]}, True),
        ({"rope_type": "dynamic", "factor": 2.0}, True),
        ({"full_attention": {"rope_type": "longrope"}, "sliding_attention": {"rope_type": "default"}}, True),
        ({"rope_type": "of next year"}, True),  # unknown: it may depend on the length
    ],
)
def test_a_larger_context_is_tried_wherever_rope_may_depend_on_it(rope: Any, depends: bool) -> None:
    for key in ("rope_parameters", "rope_scaling"):
        config = {"max_position_embeddings": 131072, key: rope}
        assert depends_on_length(config) is depends
        assert bool(reasons(plan_cells("quick", TEXT, config))["n_ctx_larger"]) is not depends


def test_cells_share_a_run_only_where_the_allocated_context_changes_nothing() -> None:
    def shared(**options: Any) -> tuple[str, str]:
        by_name = {cell.name: cell for cell in plan_cells("quick", TEXT, PHI35, **options).cells}
        return by_name["no_bos"].same_as, by_name["decode"].after

    assert shared() == ("n_ctx_shipped", "n_ctx_shipped")
    assert shared(n_ctx=8192) == ("", "")  # other factors there: a waiver of that cell must not hide these two
    assert shared(n_ctx=131072) == ("", "")  # more cache than cells may use: it does not run


def test_a_long_passage_is_asked_for_or_measured_in_full_and_ends_at_the_models_context() -> None:
    def found(level: Any, limit: int, length: int | None) -> tuple[str, list[int]]:
        plan = plan_cells(level, TEXT, {"max_position_embeddings": limit}, long_context=length)
        return reasons(plan)["context"], [len(p.tokens) for p in plan.passages.get("context", [])]

    assert found("quick", 32768, 9000) == ("", [9000])
    assert found("full", 32768, None) == ("", [8192])
    assert found("full", 4096, 32768) == ("", [4096])
    assert found("full", 1024, None) == ("the model's context is 1024", [])
    assert (
        "cache of 32768 tokens takes more than"
        in reasons(plan_cells("quick", TEXT, {**PHI35, "original_max_position_embeddings": None}, long_context=32768))[
            "context"
        ]
    )
    with pytest.raises(InputError, match="long_context = 1024 is no longer than the usual passages"):
        VerifyRequest("r", ["c"], long_context=1024).check()


def test_a_cell_never_allocates_more_than_its_limit() -> None:
    whole = reasons(plan_cells("quick", TEXT, PHI35, bos=1, n_ctx=131072))
    assert whole["n_ctx_shipped"] == "a cache of 131072 tokens takes 48 GiB, the cells use 4 at most"
    assert cache_bytes(PHI35, 4096) == 3 * 2**29 < CACHE_LIMIT  # 1.5 GiB: 393,216 bytes a token


def test_the_original_length_is_found_wherever_it_stands() -> None:
    assert original_length({"rope_parameters": {"original_max_position_embeddings": 256}}) == 256
    assert original_length({"rope_scaling": {"original_max_position_embeddings": 512}}) == 512
    assert original_length({"max_position_embeddings": 512}) is None
    assert shipped_n_ctx({"max_position_embeddings": 131072, "original_max_position_embeddings": 256}) == 256
    assert shipped_n_ctx({"max_position_embeddings": 131072}) == 4096


def test_passages_of_one_text_share_the_references_logits() -> None:
    plan = plan_cells("quick", TEXT, PHI35, bos=1)
    plain, decode = plan.passages["plain"], plan.passages["decode"]
    kept = distinct([decode, plan.passages["short"], plain])
    assert [len(p.tokens) for p in kept] == [len(p.tokens) for p in plain]
    assert {p.first for p in kept} == {1}  # the first position that any of them scores
    chunk = np.concatenate([plain[0].tokens, np.arange(1000)])
    long = [Passage(chunk, 520), plain[0]]
    assert len(distinct([long])) == 2  # a long text may lie beyond an original length, where the factors are others


def test_the_beginning_of_a_text_is_read_from_the_longer_one(phi3: Path, tmp_path: Path) -> None:
    model, tokens = load_hf(phi3), np.random.default_rng(1).integers(10, 790, 40)
    whole, short = Passage(tokens, 24), Passage(tokens[:12], 1)
    with run_reference(model, distinct([[whole, short]]), tmp_path, name="", tell=lambda *_: None).spool as spool:
        assert spool.rows == 38
        stored = Reference(spool, "", {tokens.tobytes(): (0, 1)})
        assert stored.mine([short, whole, Passage(tokens[1:], 3)]) == {0: short, 1: whole}
        # sums over 12 or 40 columns are ordered otherwise: 24 roundings of fp32 on logits of some units
        np.testing.assert_allclose(stored.read(short, 0, 10), hf_chunk(model, short.tokens, first=1), atol=1e-4)
        np.testing.assert_array_equal(stored.read(whole, 0, 15), hf_chunk(model, tokens, first=1)[23:])


def test_decoding_goes_on_from_the_cache_as_after_a_prefill_and_sees_a_wrong_cache(phi3: Path) -> None:
    path = phi3.parent / "m-F16.gguf"
    if not path.exists():
        convert(phi3, path, model_name="Phi-3 tiny")
    tokens, others = np.random.default_rng(2).integers(10, 790, (2, 40))
    with LlamaLogits(path, n_ctx=256, threads=1) as engine:
        wanted = engine.chunk(tokens, first=28, singly_from=28)
        engine.chunk(tokens, first=24)
        again = engine.chunk(tokens, first=28, singly_from=28, kept=28)
        engine.chunk(others, first=24)
        wrong = engine.chunk(tokens, first=28, singly_from=28, kept=28)
    assert mean_kld(wanted, again) < 1e-6 < 0.05 < mean_kld(wanted, wrong)


def test_a_quantised_cache_is_shown_and_held_to_no_bound_and_both_attentions_are_held(
    phi3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[FileResult] = []
    real = compare.measure_file

    def kept(*arguments: Any, **more: Any) -> FileResult:
        found.append(real(*arguments, **more))
        return found[-1]

    monkeypatch.setattr("test_cells.measure_file", kept)
    checks = {check.name for check in cells_of(phi3, tmp_path, "full")}
    by_cell = {cell.cell: cell.divergence for cell in found[0].cells}
    means = {name: d.mean_kld for name, d in by_cell.items() if d is not None}
    assert max(means["flash_on"], means["flash_off"]) < 1e-4  # the policy's bound of a float file's cells
    assert means["flash_on"] < means["kv_q8_0"] < means["kv_q4_0"]  # 16, 8 and 4 bits: the types are really set
    assert {"cells.flash_on.mean_kld", "cells.flash_off.top1"} <= checks
    assert not any("kv_q" in name for name in checks)
    narrow = {**PHI35, "hidden_size": 1280, "num_attention_heads": 16}
    assert reasons(plan_cells("full", TEXT, narrow))["kv_q4_0"] == "heads of 80 channels are no whole blocks of 32"
    assert reasons(plan_cells("quick", TEXT, PHI35))["flash_on"] == "measured with --cells full"


def test_the_text_as_it_is_has_the_result_of_the_run_that_it_shares(phi3: Path, tmp_path: Path) -> None:
    found = {check.name: check for check in cells_of(phi3, tmp_path, "quick")}
    alone = {check.name: check for check in cells_of(phi3, tmp_path, "quick", ship=512)}
    for value in ("mean_kld", "top1", "non_finite"):
        assert found[f"cells.no_bos.{value}"].value == found[f"cells.n_ctx_shipped.{value}"].value
    assert alone["cells.no_bos.mean_kld"].value < 1e-4 < alone["cells.n_ctx_shipped.mean_kld"].value
    assert alone["cells.decode.mean_kld"].value < 1e-4


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Phi-3 of two layers with LongRoPE, original length 256, and a SentencePiece vocabulary of its own."""
    import sentencepiece
    from transformers import Phi3Config, Phi3ForCausalLM

    folder = tmp_path_factory.mktemp("phi3") / "model"
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input="verification/logit_parity/corpus/default.txt",
        model_prefix=str(folder / "tokenizer"),
        vocab_size=800,
        byte_fallback=True,
        model_type="bpe",
        character_coverage=0.98,
        user_defined_symbols=["<|endoftext|>"],
        minloglevel=2,
        hard_vocab_limit=False,
    )
    torch.manual_seed(0)
    half = 16  # head_dim / 2
    config = Phi3Config(
        vocab_size=800,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        original_max_position_embeddings=256,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 256,
            "short_factor": [1.0] * half,
            "long_factor": np.linspace(1.0, 8.0, half).tolist(),
        },
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = Phi3ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                # sharper attention than at random, so that positions matter
                gain = 2.0 if "qkv" in name else 1.0
                weight.normal_(
                    std=0.2 if "lm_head" in name else 1.0 if "embed" in name else gain * weight.shape[1] ** -0.5
                )
    model.to(torch.float16).save_pretrained(folder)
    return folder


def cells_of(folder: Path, tmp_path: Path, level: Any, *, ship: int | None = None) -> list[Check]:
    """The cells of a model without a Hugging Face tokenizer: random ids, decided by a policy."""
    import json

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rng = np.random.default_rng(0)
    chunks = tuple(rng.integers(10, 790, 128) for _ in range(8))
    plan = plan_cells(level, chunks, config, bos=1, n_ctx=ship)
    text = Corpus((), chunks, "ids")
    path = folder.parent / "m-F16.gguf"
    if not path.exists():
        convert(folder, path, model_name="Phi-3 tiny")
    passages = distinct([passages_of(chunks), *plan.passages.values()])
    tell = lambda stage, done, total: None  # noqa: E731
    reference = run_reference(load_hf(folder), passages, tmp_path, name="saved checkpoint", tell=tell)
    with reference.spool:
        found = measure_file("F16", path, text, reference, plan=plan, seed="s", tell=tell)
    return cell_checks(found.cells, plan)


def decided(checks: list[Check], policy: Policy) -> Report:
    leg = Leg(name="cells", title="Cells", compared="", status="not evaluated", checks=checks)
    return decide(
        Report(
            verdict="incomplete",
            summary="",
            created="2026-01-01T00:00:00+00:00",
            artefacts=[],
            legs=[leg],
            policy={},
            versions={},
            durations={},
        ),
        policy,
    )


def test_longrope_factors_picked_by_the_allocated_n_ctx_are_caught_named_and_waivable(
    phi3: Path, tmp_path: Path
) -> None:
    """At n_ctx 256 the same tokens agree; above it llama.cpp takes the long factors, Hugging Face the short ones."""
    alone: dict[str, Any] = {"required": [], "cells": {"F16": {"mean_kld": 1e-4, "top1": 0.9}}}
    report = decided(cells_of(phi3, tmp_path, "full"), make_policy(alone))
    failed = {check.name for check in report.legs[0].checks if check.status != "pass"}
    assert report.verdict == "fail"
    assert failed == {"cells.n_ctx_larger.mean_kld", "cells.n_ctx_larger.top1"}
    found = {check.name: check for check in report.legs[0].checks}
    assert found["cells.n_ctx_larger.mean_kld"].value > 1000 * found["cells.n_ctx_shipped.mean_kld"].value
    assert "LongRoPE factor choice" in report.summary
    assert "allocate at most 256" in report.summary
    assert {"cells.rope_straddle.mean_kld", "cells.rope_beyond.mean_kld", "cells.long.mean_kld"} <= set(found)
    reason = "the Modelfile sets num_ctx 256"
    waivers = [{"check": name, "reason": reason} for name in failed]
    waived = decided(report.legs[0].checks, make_policy({**alone, "waivers": waivers}))
    assert waived.verdict == "pass"
    assert "2 waived" in waived.summary


def test_a_file_shipped_with_a_longer_context_than_the_original_fails_in_that_cell(phi3: Path, tmp_path: Path) -> None:
    alone: dict[str, Any] = {"required": [], "cells": {"F16": {"mean_kld": 1e-4, "top1": 0.9}}}
    report = decided(cells_of(phi3, tmp_path, "quick", ship=512), make_policy(alone))
    bad = {check.name for check in report.legs[0].checks if check.status == "fail"}
    assert "cells.n_ctx_shipped.mean_kld" in bad


def test_a_passage_knows_its_rows() -> None:
    assert Passage(np.arange(40), 24).rows == 15
    assert replace(Passage(np.arange(40), 24), first=1).rows == 38
