"""The plan's estimates against the record of a run at Phi-3.5-mini's own size, and the script that made the record."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from phi3_miniature import FULL, config, miniature_run

from pipeline.run.estimate import Machine, bytes_a_weight, costs, shape_of, training

ROOT = Path(__file__).parents[3]
RECORD = ROOT / "docs" / "phi35_full_size.json"


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Phi-3.5-mini's own shape under its shipped configuration, and the record of scripts/phi35_full_size.py."""
    folder = tmp_path_factory.mktemp("full")
    (folder / "config.json").write_text(json.dumps(config(FULL)), encoding="utf-8")
    settings = miniature_run(folder, folder / "run", "answers.prompts=100", "train.batch_size=1", "data.max_tokens=64")
    return shape_of(folder, settings.train), settings, json.loads(RECORD.read_text(encoding="utf-8"))["stages"]


def test_the_full_size_took_what_was_estimated(full: Any) -> None:
    """Memory within a factor of 1.5 of the recorded peaks, file sizes within 3 %."""
    shape, settings, stages = full
    assert shape.parameters == 3_821_079_552
    assert shape.trainable == stages["train"]["trainable"]
    machine = Machine(device=5e10, cpu=5e10, cuda=False, threads=1)
    found = costs(settings, shape, machine, rows=100, tokens=64)
    found["train"] = training(settings.train, shape, machine, longest=64, tokens=64, width=2)  # a bfloat16 base there
    for name, stage, kind in (
        ("train", "train", "all_gb"),
        ("bake", "bake", "own_gb"),
        ("convert", "convert F16", "own_gb"),
    ):
        measured = 1e9 * stages[stage][kind]
        assert measured / 1.5 < found[name].host < 1.5 * measured, (name, found[name].host, measured)
    for kind in ("F16", "Q8_0", "Q4_K_M"):
        stage = stages[f"convert {kind}" if kind == "F16" else f"quantise {kind}"]
        assert shape.parameters * bytes_a_weight(kind) == pytest.approx(stage["bytes"], rel=0.03), kind


def test_a_wrong_formula_would_be_seen(full: Any) -> None:
    """The planted faults: weights of four bytes where there are two, or the state of training forgotten."""
    shape, settings, stages = full
    machine = Machine(device=5e10, cpu=5e10, cuda=False, threads=1)
    measured = 1e9 * stages["train"]["all_gb"]
    wide = training(settings.train, shape, machine, longest=64, tokens=64, width=4)
    assert not measured / 1.5 < wide.host < 1.5 * measured


@pytest.mark.soak
def test_the_script_that_made_the_record_works(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    command = [sys.executable, str(ROOT / "scripts" / "phi35_full_size.py"), "--miniature"]
    done = subprocess.run(
        [*command, "--work", str(tmp_path / "work"), "--out", str(out)], capture_output=True, text=True, check=True
    )
    stages = json.loads(out.read_text(encoding="utf-8"))["stages"]
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))["stages"]
    assert set(stages) >= set(recorded)  # the record ends before lint
    assert stages["lint Q4_K_M"]["verdict"] == "pass"
    assert len([line for line in done.stdout.splitlines() if line.startswith("| ")]) == len(stages) + 1
    assert not (tmp_path / "work").exists()
