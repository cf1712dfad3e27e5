"""Granite is mapped by principle: a healthy miniature passes, its four scales and its rotated rows are held to."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_bytes import F32, Value, with_keys

from verification.commands.lint import lint
from verification.commands.lint_result import LintReport
from verification.engines.convert import convert
from verification.engines.quantise import quantise
from verification.fault_catalogue.models import save_model


@pytest.fixture(scope="module")
def granite(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, F16 file)"""
    folder = tmp_path_factory.mktemp("granite")
    save_model("granite", folder / "reference")
    return folder / "reference", convert(folder / "reference", folder / "F16.gguf", model_name="tiny-granite")


def failed(report: LintReport) -> dict[str, str]:
    return {c.name: " ".join(f.where for f in c.findings) for c in report.checks if c.status == "fail"}


def test_a_healthy_granite_is_proven(granite: tuple[Path, Path], tmp_path: Path) -> None:
    reference, floats = granite
    for file in (floats, quantise(floats, tmp_path / "Q8_0.gguf", "Q8_0")):
        report = lint(file, reference=reference, oracle=floats)
        assert (failed(report), report.verdict) == ({}, "pass")
        assert {row.drawer for row in report.tensors} == {"proven"}


@pytest.mark.parametrize("key", ["attention.scale", "embedding_scale", "residual_scale", "logit_scale"])
def test_a_scale_that_is_off_is_named_by_config_json(granite: tuple[Path, Path], tmp_path: Path, key: str) -> None:
    reference, floats = granite
    wrong = with_keys(floats, tmp_path / "x.gguf", {f"granite.{key}": Value(F32, 1.5)})
    assert f"granite.{key}" in failed(lint(wrong, reference=reference, oracle=wrong))["metadata"]


@pytest.mark.parametrize(
    ("key", "check", "verdict"),
    [
        ("granite.new_switch", "unread_keys", "pass"),
        ("llama.rope.freq_base", "unread_keys", "pass"),
        ("granite.attention.clamp_kqv", "oracle_metadata", "fail"),
    ],
)
def test_a_key_counts_by_what_llama_cpp_does_with_it(
    granite: tuple[Path, Path], tmp_path: Path, key: str, check: str, verdict: str
) -> None:
    reference, floats = granite
    report = lint(with_keys(floats, tmp_path / "x.gguf", {key: Value(F32, 1.5)}), reference=reference, oracle=floats)
    named = {c.name: c.status for c in report.checks if any(f.where == key for f in c.findings)}
    assert (named, report.verdict) == ({check: "note" if verdict == "pass" else "fail"}, verdict)
