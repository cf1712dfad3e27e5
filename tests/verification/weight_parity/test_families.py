"""Each family that people publish is judged in miniature: a healthy Q4_K_M passes, one wrong tensor in it is named."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from verification.commands import lint as module
from verification.commands.lint import lint
from verification.commands.lint_result import LintReport
from verification.engines.convert import convert
from verification.engines.quantise import quantise
from verification.fault_catalogue.edit import scaled, transposed, without_tensor
from verification.fault_catalogue.models import SENTENCEPIECE, save_model
from verification.gguf.reader import read_gguf
from verification.gguf.writer import Raw
from verification.reference.checkpoint import Checkpoint
from verification.weight_parity.expected import PREDICTION, inventory_by_conversion, left_out

# family -> (a tensor of its own kind, which is scaled; a square matrix, which is transposed)
FAULTS = {
    "granitemoe": ("blk.1.ffn_up_exps.weight", "blk.0.attn_output.weight"),
    "granitehybrid": ("blk.0.ssm_in.weight", "blk.1.attn_output.weight"),
    "granite": ("blk.0.ffn_down.weight", "blk.1.attn_output.weight"),
    "qwen3moe": ("blk.1.ffn_down_exps.weight", "blk.0.attn_output.weight"),
    "qwen35": ("blk.0.ssm_out.weight", "blk.0.attn_gate.weight"),
    "gemma4": ("blk.1.proj.weight", "blk.0.inp_gate.weight"),
    "gpt-oss": ("blk.1.ffn_gate_exps.weight", "blk.1.attn_output.weight"),
    "lfm2": ("blk.0.shortconv.in_proj.weight", "blk.0.shortconv.out_proj.weight"),
    "llama4": ("blk.1.ffn_up_exps.weight", "blk.0.attn_output.weight"),
    "gemma3": ("blk.0.ffn_gate.weight", ""),
    "olmo2": ("blk.0.ffn_gate.weight", "blk.1.attn_output.weight"),
    "smollm3": ("blk.0.ffn_gate.weight", "blk.1.attn_output.weight"),
    "phi3": ("blk.0.ffn_up.weight", "blk.1.attn_output.weight"),
    "llama": ("blk.0.ffn_gate.weight", "blk.1.attn_output.weight"),
    "mistral": ("blk.0.ffn_gate.weight", ""),
}
SAMPLE = "granitemoe"


@dataclasses.dataclass(frozen=True)
class Miniature:
    """A random checkpoint of a family and two files made from it."""

    reference: Path
    floats: Path
    quant: Path


def make(family: str, folder: Path, tokenizer: Any = None) -> Miniature:
    reference = save_model(family, folder / "hf", tokenizer)
    floats = convert(reference, folder / "F16.gguf", model_name=f"tiny-{family}")
    return Miniature(reference, floats, quantise(floats, folder / "Q4_K_M.gguf", "Q4_K_M"))


def failed(report: LintReport) -> dict[str, set[str]]:
    return {c.name: {f.where for f in c.findings} for c in report.checks if c.status in ("fail", "not evaluated")}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Miniature:
    """Its float file is the conversion that lint itself makes where none is given."""
    folder = tmp_path_factory.mktemp(SAMPLE)
    reference = save_model(SAMPLE, folder / "hf")
    floats = module._oracle(None, Checkpoint(reference), folder / "own.gguf", None, whole=True)
    return Miniature(reference, floats, quantise(floats, folder / "Q4_K_M.gguf", "Q4_K_M"))


@pytest.mark.parametrize("family", [pytest.param(f, marks=[] if f == SAMPLE else pytest.mark.soak) for f in FAULTS])
def test_a_family_is_judged(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if family == SAMPLE:
        mini: Miniature = request.getfixturevalue("sample")
        healthy = lint(mini.quant, reference=mini.reference, oracle=mini.floats)
    else:
        tokenizer = None if family in SENTENCEPIECE else request.getfixturevalue("tokenizer")
        mini = make(family, tmp_path, tokenizer)
        healthy = lint(mini.quant, reference=mini.reference)
    assert (failed(healthy), healthy.verdict) == ({}, "pass")
    assert {row.drawer for row in healthy.tensors} == {"proven"}
    one, square = FAULTS[family]
    wrong = [(one, scaled(mini.floats, tmp_path / "scaled.gguf", one, 1.01))]
    wrong += [(square, transposed(mini.floats, tmp_path / "transposed.gguf", square))] if square else []
    for name, source in wrong:
        file = quantise(source, tmp_path / "wrong.gguf", "Q4_K_M")
        report = lint(file, reference=mini.reference, oracle=mini.floats)
        assert (report.verdict, {place for places in failed(report).values() for place in places}) == ("fail", {name})
        assert {row.name for row in report.tensors if row.drawer == "unexplained"} == {name}


def test_a_tensor_that_is_missing_or_extra_is_named(sample: Miniature, tmp_path: Path) -> None:
    name = "blk.0.ffn_gate_inp.weight"
    fewer = without_tensor(sample.quant, tmp_path / "fewer.gguf", name)
    report = lint(fewer, reference=sample.reference, oracle=sample.floats)
    assert failed(report)["inventory"] == {name}
    found = inventory_by_conversion(Checkpoint(sample.reference), read_gguf(sample.quant), read_gguf(fewer))
    assert (found.missing, found.extra) == ([], [name])


def test_a_conversion_without_tensors_judges_none(sample: Miniature, tmp_path: Path) -> None:
    raw = Raw.read(sample.floats)
    raw.tensors.clear()
    report = lint(sample.quant, reference=sample.reference, oracle=raw.write(tmp_path / "keys.gguf"))
    assert report.verdict == "incomplete"
    assert {"inventory", "weights", "hypotheses"} <= failed(report).keys()
    assert any("holds metadata alone" in check.detail for check in report.checks)


def test_a_full_disk_is_said_before_the_converter_starts(sample: Miniature, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1 << 40, used=1 << 40, free=1))
    report = lint(sample.quant, reference=sample.reference)
    (weights,) = [check.detail for check in report.checks if check.name == "weights"]
    assert (report.verdict, "set TMPDIR to a larger disk" in weights) == ("incomplete", True)


class Named(dict[str, Any]):
    """A checkpoint's names alone."""

    def __init__(self, name: str) -> None:
        super().__init__({name: None})
        self.config = {"num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("mtp.fc.weight", PREDICTION),
        ("model.mtp.layers.0.input_layernorm.weight", PREDICTION),
        ("model.layers.2.eh_proj.weight", PREDICTION),
        ("model.vision_tower.blocks.0.weight", "pictures or sound"),
        ("model.layers.1.mlp.down_proj.weight", None),
    ],
)
def test_parts_beside_the_text_model_are_accounted_for(sample: Miniature, name: str, part: str | None) -> None:
    file = read_gguf(sample.floats)
    checkpoint: Any = Named(name)
    assert left_out(checkpoint, file) == ({} if part is None else {part: [name]})
    with_layers = {**file.metadata, "granitemoe.nextn_predict_layers": 1}
    found = left_out(checkpoint, dataclasses.replace(file, metadata=with_layers))
    assert found == ({} if part in (None, PREDICTION) else {part: [name]})
