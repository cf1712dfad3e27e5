"""The run of the original project (docs/original.md).

Its configuration says what that project's log says, the dry run treats it as any other, and on the miniature it goes
from JSONL files to a passed gate with only base and amounts changed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from phi3_miniature import finished_miniature, miniature_run, prepare_miniature, save_miniature

from pipeline.cli import main as cli
from pipeline.config import load_config
from pipeline.data.think_form import format_assistant
from pipeline.progress import Reporter
from pipeline.run.plan import Plan, make_plan
from pipeline.run.steps import STEPS, Run
from so8t_core.files import sha256_file

SHIPPED = "borea_phi35_so8t_thinking.yaml"
BASE = "AXCXEPT/Borea-Phi-3.5-mini-Instruct-Jp"
CONFIG = Path(__file__).parents[3] / "configs" / SHIPPED
# All that the miniature needs changed besides the base: it has 2 layers, random weights and two CPU cores.
AMOUNTS = (
    "threads=1",
    "train.steps=2",
    "answers.prompts=0",
    "verify.chunks=24",
    "verify.n_ctx=128",
    "verify.base_damage=false",
)


def write_data(folder: Path, rows: int) -> None:
    """The two files that the configuration names, in two formats and with three rows in common, and their manifest."""
    asked = [
        {
            "instruction": "Add the numbers.",
            "input": f"{n} and {n + 7}",
            "four_class_label": "ALLOW",
            "output": f"{n} + {n + 7} = {2 * n + 7}. The answer is {2 * n + 7}",
        }
        for n in range(11, 11 + rows)
    ]
    thought = [
        {
            "prompt": f"{n}個のりんごを2箱買いました。全部で何個ですか。",
            "response": format_assistant(f"1箱に{n}個です。{n} × 2 = {2 * n}", f"{2 * n}個"),
        }
        for n in range(11, 11 + rows)
    ]
    (folder / "data").mkdir()
    files = {"four_class.jsonl": asked, "domain_knowledge.jsonl": thought + asked[:3]}
    for name, content in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        (folder / "data" / name).write_text(text, encoding="utf-8")
    facts = {"licence": "CC0-1.0", "robots": "not-applicable", "collected": "2025-11-13", "purpose": "training"}
    listed = {"version": 1, "sources": [{"path": name, **facts} for name in files]}
    (folder / "data" / "sources.yaml").write_text(yaml.safe_dump(listed), encoding="utf-8")


def planned(folder: Path, *overrides: str) -> Plan:
    config = miniature_run(folder / "base", folder / "run", *overrides, shipped=SHIPPED, amounts=AMOUNTS)
    return make_plan(Run(config, Reporter(quiet=True)))


def test_the_configuration_is_the_run_that_the_log_describes() -> None:
    config = load_config(CONFIG)
    lora, pet = config.train.lora, config.train.pet
    assert lora is not None
    assert pet is not None
    assert config.model.base == BASE
    assert (config.train.layers, config.train.init_scale, config.train.orthogonality_weight) == (None, 0.05, 1e-4)
    assert (pet.warmup, pet.main, pet.anneal, pet.huber_delta) == (0.01, 0.05, 0.1, None)
    assert (config.train.quantization, lora.r, lora.alpha, lora.dropout) == ("8bit", 64, 128, 0.05)
    assert lora.targets == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    assert len(config.data.sources) > 1
    assert config.data.generator is None  # the log's rows come from files alone
    assert config.train.batch_size * config.train.gradient_accumulation == 16
    assert config.convert.types == ["F16", "Q8_0", "Q4_K_M"]


def test_a_dry_run_without_the_model_names_the_base_and_the_manifest(
    tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["so8t", "run", str(CONFIG), "--dry-run"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capfd.readouterr()
    assert stop.value.code == 2
    assert f"model.base = '{BASE}' is no directory here" in err
    assert "data.manifest data/sources.yaml does not exist" in err
    assert all(f"\n{step} " in out for step in STEPS)
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_finds_nothing_against_all_layers_or_chosen_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_miniature(tmp_path / "base", name=BASE)
    write_data(tmp_path, rows=8)
    monkeypatch.chdir(tmp_path)
    for layers in ("null", "[0]", "[-1]"):
        found = planned(tmp_path, f"train.layers={layers}")
        assert (found.problems, found.notes) == ([], []), layers
        assert [step.name for step in found.steps] == list(STEPS)


def test_it_passes_the_gate_on_the_miniature_with_only_base_and_amounts_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(tmp_path, rows=60)
    config = prepare_miniature(tmp_path, name=BASE, shipped=SHIPPED, amounts=AMOUNTS)
    monkeypatch.chdir(tmp_path)  # where the relative data files are looked for
    Run(config, Reporter(quiet=True)).execute()
    done = finished_miniature(tmp_path)
    report = done.report
    assert report.verdict == "pass", report.summary
    # the rows of both files, each common row once
    counts = json.loads((done.dir / "data" / "report.json").read_text(encoding="utf-8"))["sources"]
    assert {name: (one["read"], one["kept"], one["duplicates"]) for name, one in counts.items()} == {
        "four_class.jsonl": (60, 60, 0),
        "domain_knowledge.jsonl": (63, 60, 3),
    }
    # 8-bit base, rotations on every layer, PET
    trained = report.training
    assert trained is not None
    assert [layer for layer, _, _ in trained.angles_by_layer] == [0, 1]
    assert {curve.name for curve in trained.curves} >= {"loss", "pet", "lambda"}
    assert report.trained_function is not None
    assert report.trained_function.quantization == "8bit"
    # metadata
    manifest = json.loads((done.dir / "manifest.json").read_text(encoding="utf-8"))["steps"]
    assert list(manifest) == list(STEPS[1:])
    files = {kind: done.file(kind) for kind in ("F16", "Q8_0", "Q4_K_M")}
    assert {file.name.startswith("Borea-Phi-3.5-mini-Instruct-Jp-so8t") for file in files.values()} == {True}
    sums = (done.dir / "gguf" / "SHA256SUMS").read_text(encoding="utf-8")
    assert all(sha256_file(file) in sums for file in files.values())
