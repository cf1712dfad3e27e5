"""Laws of QLoRA: the bake comes from the original checkpoint, and the report says what was trained instead."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from sample_report import sample_report
from verification_models import Family

from so8t_core import InputError, bake, bake_checkpoint, load_adapter
from so8t_core.versions import check_version
from verification.engines.bitsandbytes_base import load_quantised, weight_error
from verification.engines.huggingface import load_hf
from verification.gate.report import Divergence, Report, TrainedFunction
from verification.gate.statement import check_statement
from verification.logit_parity.bake import saved_rounding
from verification.logit_parity.compare import Reference, passages_of, run_reference, saved_against
from verification.logit_parity.kl import DivergenceAccumulator
from verification.logit_parity.quantised_base import trained_function
from verification.logit_parity.text import Corpus
from verification.reference.checkpoint import Checkpoint
from verification.show.terminal import verdict_table
from verification.show.write import load_report, to_html, to_json, to_markdown, write_report

needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
KINDS = ("8bit", "4bit")


@pytest.fixture(scope="module")
def text(family: Family) -> Corpus:
    rng = np.random.default_rng(0)
    return Corpus((), tuple(rng.integers(3, family.vocab, 64) for _ in range(3)), "random")


@pytest.fixture(scope="module")
def reference(family: Family, text: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    passages = passages_of(text.chunks)
    folder = tmp_path_factory.mktemp("spool")
    return run_reference(load_hf(family.reference), passages, folder, name="saved checkpoint", tell=lambda *_: None)


def _plain(family: Family, text: Corpus, reference: Reference) -> Divergence:
    model = load_adapter(load_hf(family.base), family.adapter)
    return saved_against(model, text, reference, name="plain", seed="", tell=lambda *_: None, stage="")


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_the_trained_function_is_measured_through_the_quantised_base(
    kind: str, family: Family, text: Corpus, reference: Reference
) -> None:
    found = trained_function(
        family.base,
        family.adapter,
        kind,
        text,
        reference,
        seed="",
        tell=lambda *_: None,  # type: ignore[arg-type]
    )
    # nf4: 9 % of a Gaussian weight's norm (the mean squared error of its 16 levels); int8: a step of max/127 a row
    assert 0.08 < found.weight_error < 0.11 if kind == "4bit" else 0.002 < found.weight_error < 0.02
    assert found.weights == 2 * 7  # every linear layer of two decoder layers, none twice
    saved = _plain(family, text, reference)
    assert found.divergence.mean_kld > 10 * saved.mean_kld  # had it used the original base, this would be saved's
    assert found.divergence.tokens == saved.tokens == 3 * 31


@needs_bitsandbytes
def test_weight_error_is_the_relative_frobenius_norm(family: Family) -> None:
    import bitsandbytes as bnb

    original = Checkpoint(family.base)
    model = load_quantised(family.base, "4bit")
    apart = whole = 0.0
    for name in original:
        if name.endswith("_proj.weight"):
            weight = original.tensor(name).float()
            packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            again = bnb.functional.dequantize_4bit(packed, state)
            apart, whole = apart + float((again - weight).square().sum()), whole + float(weight.square().sum())
    assert weight_error(model, original.tensor)[0] == pytest.approx((apart / whole) ** 0.5, rel=1e-4)
    with pytest.raises(InputError, match="no quantised weight"):
        weight_error(load_hf(family.base), original.tensor)


def _worst(base: Path, adapter: Path, baked: Path) -> float:
    """What the leg `dtype` holds against its bound of one rounding."""
    return saved_rounding(bake(load_adapter(load_hf(base), adapter)), Checkpoint(baked))[0]


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_a_bake_from_the_quantised_weights_would_be_seen(kind: str, family: Family, tmp_path: Path) -> None:
    from peft.utils.integrations import dequantize_bnb_weight
    from safetensors.torch import save_file

    model = load_quantised(family.base, kind)  # type: ignore[arg-type]
    tensors = {name: Checkpoint(family.base).tensor(name) for name in Checkpoint(family.base)}
    for name, module in model.named_modules():
        if f"{name}.weight" in tensors and type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            weight = dequantize_bnb_weight(module.weight, getattr(module, "state", None))
            tensors[f"{name}.weight"] = weight.to(torch.bfloat16)
    wrong = tmp_path / "dequantised"
    wrong.mkdir()
    (wrong / "config.json").write_bytes((family.base / "config.json").read_bytes())
    save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
    bake_checkpoint(wrong, family.adapter, tmp_path / "baked")
    assert _worst(family.base, family.adapter, family.reference) <= 1.01
    assert _worst(family.base, family.adapter, tmp_path / "baked") > 10


def test_the_report_says_it_everywhere_and_decides_nothing_by_it(tmp_path: Path) -> None:
    plain = sample_report("pass")
    d = plain.divergences[0].model_copy(update={"mean_kld": 0.321, "mean_kld_interval": (0.3, 0.35), "top1": 0.608})
    trained = TrainedFunction(quantization="4bit", weight_error=0.092, weights=14, divergence=d)
    report = plain.model_copy(update={"trained_function": trained})
    console = Console(width=400)
    with console.capture() as shown:
        console.print(verdict_table(report))
    for page in (to_html(report), to_markdown(report), shown.get()):
        assert "4-bit base" in page
        assert all(figure in page for figure in ("0.321 nats", "60.8 %", "9.2 %"))
    assert "4-bit base" not in to_markdown(plain)
    written = write_report(report, tmp_path)
    again = load_report(written["json"])
    assert again.trained_function == trained
    assert again.verdict == plain.verdict
    check_statement(again, written["json"])
    old = to_json(plain).replace('"trained_function": null,', "")  # a report of schema 1.1
    assert Report.model_validate_json(old).trained_function is None


@pytest.mark.parametrize("version", ["0.43.1", "0.48.0", "0.49.9"])
def test_an_old_bitsandbytes_is_refused_with_the_reason(version: str) -> None:
    with pytest.raises(InputError, match=rf"bitsandbytes {version} is too old: .* wrong .*; pip install"):
        check_version("bitsandbytes", version)


def test_a_newer_bitsandbytes_is_warned_of_and_the_tested_one_is_not(recwarn: pytest.WarningsRecorder) -> None:
    check_version("bitsandbytes", "0.50.2")
    assert not recwarn
    with pytest.warns(UserWarning, match=r"bitsandbytes 0\.51\.0 was not tested"):
        check_version("bitsandbytes", "0.51.0")


def test_chunks_measured_apart_are_put_together_exactly() -> None:
    """As several processes do it; and their order counts, so a mistake in it would show."""
    rng = np.random.default_rng(1)
    chunks = [tuple(rng.normal(size=(2, 9, 40)).astype(np.float32)) for _ in range(5)]

    def new() -> DivergenceAccumulator:
        return DivergenceAccumulator(reference="a", candidate="b", n_ctx=20, vocab=40, seed="s")

    def add(into: DivergenceAccumulator, place: int) -> None:
        into.begin_chunk()
        into.add(*chunks[place], np.arange(9), first_position=10)

    whole = new()
    for place in range(5):
        add(whole, place)
    parts = {}
    for share in ((0, 2, 4), (1, 3)):
        part = new()
        for place in share:
            add(part, place)
            parts[place] = part.take()
    together, shuffled = new(), new()
    for place in range(5):
        together.extend(parts[place])
        shuffled.extend(parts[4 - place])
    assert together.result() == whole.result() != shuffled.result()
