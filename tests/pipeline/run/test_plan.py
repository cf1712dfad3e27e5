"""Laws of the dry run: it resolves what the run would do, writes nothing, finds what would end the run, and its
estimates stand beside measured runs."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from phi3_miniature import MiniatureRun, Size, miniature_run, save_miniature

from pipeline.cli import main as cli
from pipeline.config import parse_config
from pipeline.progress import Reporter
from pipeline.run.estimate import mean_length, shape_of
from pipeline.run.plan import Plan, make_plan
from pipeline.run.steps import STEPS, Run
from so8t_core.errors import InputError
from so8t_core.files import size_of


def planned(base: Path, run_dir: Path, *overrides: str, **options: Any) -> Plan:
    return make_plan(Run(miniature_run(base, run_dir, *overrides), Reporter(quiet=True)), **options)


def states(found: Plan) -> dict[str, str]:
    return {step.name: step.state for step in found.steps}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.json and tokenizer alone."""
    return save_miniature(tmp_path_factory.mktemp("bare") / "base", weights=False)


# --- what would run


def test_a_finished_run_is_up_to_date_and_a_changed_setting_runs_its_step_and_what_hangs_on_it(
    phi35_run: MiniatureRun,
) -> None:
    before = {path: path.stat().st_mtime_ns for path in phi35_run.dir.rglob("*")}
    found = planned(phi35_run.base, phi35_run.dir)
    assert states(found) == dict.fromkeys(STEPS, "up to date")
    assert all(step.cost.seconds == step.cost.disk == 0 for step in found.steps)
    assert (found.problems, found.notes) == ([], [])
    changed = states(planned(phi35_run.base, phi35_run.dir, "train.steps=3"))
    assert changed["data"] == "up to date"
    assert changed["train"] == "settings changed (train)"
    assert changed["bake"] == changed["verify"] == "if train gives something else"
    assert changed["convert"] == "if bake gives something else"
    forced = states(planned(phi35_run.base, phi35_run.dir, first="convert", until="convert"))
    assert list(forced) == ["base", "data", "train", "bake", "convert"]
    assert (forced["bake"], forced["convert"]) == ("up to date", "forced")
    assert {path: path.stat().st_mtime_ns for path in phi35_run.dir.rglob("*")} == before


def test_a_dry_run_writes_nothing(phi35_run: MiniatureRun, tmp_path: Path) -> None:
    found = planned(phi35_run.base, tmp_path / "run")
    assert set(states(found).values()) == {"up to date", "not done yet"}  # the base is there
    assert all(step.cost.seconds > 0 for step in found.steps if step.name not in ("base", "answers"))
    assert list(tmp_path.iterdir()) == []


# --- what speaks against it


def test_without_weights_the_plan_stands_and_the_exit_code_is_2(
    bare: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"run_dir: {tmp_path / 'run'}\nmodel: {{base: {bare}}}\ndata: {{generator: {{rows: 4, heldout_rows: 4}}}}\n"
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["so8t", "run", str(tmp_path / "run.yaml"), "--dry-run"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capfd.readouterr()
    assert stop.value.code == 2
    said = [line for line in err.splitlines() if line.startswith("so8t: ")]
    assert len(said) == 1
    assert "3 of 3 weight files are missing, first model-00001-of-00003.safetensors" in said[0]
    assert all(f"\n{step} " in out for step in STEPS)
    assert "Estimates, not measurements: Phi3ForCausalLM" in out
    assert not (tmp_path / "run").exists()


def _cut(base: Path) -> None:
    shard = base / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])


def _no_map(base: Path) -> None:
    (base / "model.safetensors.index.json").write_text("{}", encoding="utf-8")


def _no_config(base: Path) -> None:
    (base / "config.json").unlink()


def _no_template(base: Path) -> None:
    fields = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    del fields["chat_template"]
    (base / "tokenizer_config.json").write_text(json.dumps(fields), encoding="utf-8")


def _quantised(base: Path) -> None:
    fields = json.loads((base / "config.json").read_text(encoding="utf-8"))
    fields["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (base / "config.json").write_text(json.dumps(fields), encoding="utf-8")


def _own_code(base: Path) -> None:
    fields = json.loads((base / "config.json").read_text(encoding="utf-8"))
    fields |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (base / "config.json").write_text(json.dumps(fields), encoding="utf-8")


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "a shard was cut": (_cut, "model-00002-of-00003.safetensors is damaged"),
    "the index names nothing": (_no_map, "has no weight_map"),
    "its weights are quantised": (_quantised, "quantization_config in config.json, method gptq"),
    "it needs its own code": (_own_code, "needs Python code of its own"),
    "config.json is gone": (_no_config, "has no config.json"),
    "no chat template": (_no_template, "has no chat template"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_base_that_would_end_the_run_is_named(fault: str, phi35_run: MiniatureRun, tmp_path: Path) -> None:
    plant, words = BROKEN[fault]
    base = Path(shutil.copytree(phi35_run.base, tmp_path / "base"))
    plant(base)
    found = planned(base, tmp_path / "run")
    assert any(words in problem for problem in found.problems), found.problems
    assert list(states(found)) == list(STEPS)


SETTINGS = {
    "train.layers=[7]": "layer 7 is out of range",
    "train.lora={targets: [q_proj]}": "q_proj",
    "convert.types=[Q9_9]": "unknown quantisation type 'Q9_9'",
    "convert.converter=./nowhere": "no convert_hf_to_gguf.py",
    "verify.policy={surprise: 1}": "surprise",
    "verify.policy=./gone.yaml": "gone.yaml does not exist",
    "verify.corpus=./gone.txt": "gone.txt",
    "data.sources=[gone.jsonl]": "gone.jsonl",
    "data.manifest=gone.yaml": "gone.yaml",
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_that_would_end_the_run_is_named(setting: str, bare: Path, tmp_path: Path) -> None:
    found = planned(bare, tmp_path / "run", setting)
    assert any(SETTINGS[setting] in problem for problem in found.problems), found.problems


def test_a_missing_package_converter_or_room_is_named(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else real(name))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    (tmp_path / "converter").mkdir()
    (tmp_path / "converter" / "convert_hf_to_gguf.py").write_text("# knows nothing\n", encoding="utf-8")
    told = planned(
        bare, tmp_path / "run", "train.quantization=8bit", f"convert.converter={tmp_path / 'converter'}"
    ).problems
    assert any("bitsandbytes is not installed" in problem for problem in told)
    assert any("does not know Phi3ForCausalLM" in problem for problem in told)
    assert any("GB free, the run needs about" in problem for problem in told)


def test_what_the_gate_will_find_is_noted(bare: Path, tmp_path: Path) -> None:
    odd = save_miniature(tmp_path / "odd", Size(intermediate=320), weights=False)
    (note,) = planned(odd, tmp_path / "run").notes
    assert "rows of 320 are no multiples of 256" in note
    assert "the policy refuses that" in note
    (note,) = planned(bare, tmp_path / "run", "convert.n_ctx=8192").notes
    assert note == "LongRoPE: the Modelfile will say num_ctx 4096, not 8192"


def test_the_run_itself_refuses_before_any_work(bare: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="3 of 3 weight files are missing"):
        Run(miniature_run(bare, tmp_path / "run"), Reporter(quiet=True)).execute()
    assert not (tmp_path / "run" / "data").exists()


# --- what it would take


def test_the_miniature_took_what_was_estimated(phi35_run: MiniatureRun, tmp_path: Path) -> None:
    """Memory within 1.5: most of it is the packages, which is measured and not derived.

    Disk within 1.25: sizes are counted, and only logs, tokenizers and reports (0.5 MB of 60) are not.
    """
    found = planned(phi35_run.base, tmp_path / "run")
    memory = max(step.cost.host for step in found.steps)
    assert phi35_run.peak_bytes / 1.5 < memory < 1.5 * phi35_run.peak_bytes, (memory, phi35_run.peak_bytes)
    cost = {step.name: step.cost for step in found.steps}
    kept = {"bake": size_of(phi35_run.dir / "baked"), "convert": size_of(phi35_run.dir / "gguf")}
    for name, actual in kept.items():
        assert actual / 1.25 < cost[name].disk < 1.25 * actual, (name, cost[name].disk, actual)


@pytest.mark.soak
def test_the_miniature_took_the_time_that_was_estimated(phi35_run: MiniatureRun, tmp_path: Path) -> None:
    """On a machine that does nothing else: a busy one slows the sampled product by another factor than the run.

    Within a factor of three: half of it is starting Python and its packages, which differs by two between machines
    that could be measured, and a sampled matrix product differs by as much from one moment to the next.
    """
    found = planned(phi35_run.base, tmp_path / "run")
    seconds = sum(step.cost.seconds for step in found.steps)
    assert phi35_run.cpu_seconds / 3 < seconds < 3 * phi35_run.cpu_seconds, (seconds, phi35_run.cpu_seconds)


def test_counts_are_exact(phi35_run: MiniatureRun) -> None:
    shape = shape_of(phi35_run.base, phi35_run.config.train)
    index = json.loads((phi35_run.base / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert shape.parameters * 2 == index["metadata"]["total_size"]
    trained = phi35_run.report.training
    assert trained is not None
    assert shape.trainable == trained.trainable_parameters


def test_rows_are_measured_through_the_models_own_template(bare: Path, tmp_path: Path) -> None:
    from pipeline.tokenizer import load_tokenizer

    lines = [
        {"prompt": f"{i} apples", "response": "# 思考ステップ\n" + "one " * 50 + "\n\n# 最終回答\n2"} for i in range(9)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    settings = parse_config(f"data: {{sources: [{tmp_path / 'a.jsonl'}], max_tokens: 2048}}")
    long = mean_length(settings, load_tokenizer(bare))
    assert 120 < long < 400
    cut = settings.model_copy(update={"data": settings.data.model_copy(update={"max_tokens": 64})})
    assert mean_length(cut, load_tokenizer(bare)) == 64
