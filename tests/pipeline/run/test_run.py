"""Laws of the run: finished steps stay, changed ones run again, a failed one leaves nothing; a verdict is the end."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import pipeline.run.steps as run_module
from pipeline.config import RunConfig, parse_config
from pipeline.manifest import load_manifest, locked
from pipeline.progress import Reporter
from pipeline.run.steps import STEPS, Run
from so8t_core.errors import InputError
from so8t_core.files import sha256_path
from verification.gate.report import Report

TEXT = """
data: {generator: {rows: 16, heldout_rows: 24}}
train: {steps: 3, batch_size: 2, learning_rate: 2.0e-2, checkpoint_every: 2, heldout_rows: 2, so8t_only_steps: 2}
convert: {types: [F16, Q8_0, Q4_K_M]}
answers: {prompts: 3, max_new_tokens: 8}
verify: {chunks: 3, n_ctx: 128}
"""


def _config(base: Path, run_dir: Path, *overrides: str) -> RunConfig:
    return parse_config(TEXT, overrides=[f"model.base={base}", f"run_dir={run_dir}", *overrides])


def _execute(base: Path, run_dir: Path, *overrides: str, quiet: bool = True, **options: Any) -> Report | None:
    return Run(_config(base, run_dir, *overrides), Reporter(quiet=quiet)).execute(**options)


def _ran(monkeypatch: pytest.MonkeyPatch, *, changing: bool = False) -> list[str]:
    """Names of the steps that work from now on; `changing`: they only make a small difference to their outputs."""
    names: list[str] = []
    for name, step in run_module.WORK.items():

        def work(run: Run, name: str = name, step: run_module.Step = step) -> None:
            names.append(name)
            if not changing:
                step.work(run)
                return
            for output in (run.dir / relative for relative in step.outputs):
                target = output / "changed.txt" if output.is_dir() else output
                target.write_bytes((target.read_bytes() if target.exists() else b"") + b"\n")

        monkeypatch.setitem(run_module.WORK, name, run_module.Step(step.settings, step.inputs, step.outputs, work))
    return names


def test_run_directory_holds_what_the_contract_names(finished: tuple[Path, Report]) -> None:
    run_dir, _ = finished
    for name in ("config.resolved.yaml", "manifest.json", "data", "adapter", "baked", "gguf", "report"):
        assert (run_dir / name).exists(), name
    for name in ("report.json", "report.html", "report.md", "junit.xml"):
        assert (run_dir / "report" / name).is_file(), name
    assert {p.name for p in (run_dir / "gguf").iterdir()} >= {"Modelfile", "README.md", "SHA256SUMS", "types.json"}
    manifest = load_manifest(run_dir)
    assert list(manifest.steps) == list(STEPS[1:])
    assert all(record.seconds > 0 and record.inputs and record.outputs for record in manifest.steps.values())


def test_every_exact_leg_passes_on_the_tiny_model(finished: tuple[Path, Report]) -> None:
    """The quality bounds are for trained models; what must be exact is exact on any."""
    legs = {leg.name: leg for leg in finished[1].legs}
    for name in ("bake", "dtype", "convert", "quantise", "contract", "controls"):
        # 189 positions without a flip are too few to show a share of 99.5 %
        bad = [c for c in legs[name].checks if c.status != "pass" and (c.name, c.value) != ("convert.top1", 1.0)]
        assert bad == [], name
    assert {row.actual_type for row in finished[1].tensors if row.candidate == "Q4_K_M"} >= {"Q4_K"}  # no fallback


def test_report_carries_training_and_answers(finished: tuple[Path, Report]) -> None:
    _, report = finished
    assert report.training is not None
    assert report.answers is not None
    assert report.training.so8t_only is not None
    assert report.answers.prompts == 3


def test_second_run_does_nothing(copy: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sha256_path(copy / "report" / "report.json")
    names = _ran(monkeypatch)
    report = _execute(tiny_dir, copy)
    assert names == []
    assert report is not None
    assert sha256_path(copy / "report" / "report.json") == before


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("answers.max_new_tokens=9", ["answers", "verify"]),
        ("verify.chunks=2", ["verify"]),
        ("train.steps=4", ["train", "bake", "convert", "answers", "verify"]),
    ],
)
def test_changed_setting_runs_its_step_and_what_depends_on_it(
    override: str, expected: list[str], copy: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = _ran(monkeypatch, changing=True)
    _execute(tiny_dir, copy, override)
    assert names == expected


def test_same_inputs_give_the_same_artefacts(
    copy: Path, tiny_dir: Path, finished: tuple[Path, Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SO8T_CONVERTER")  # converted anew, not remembered
    _execute(tiny_dir, copy, first="data", until="convert")
    for name in ("data", "adapter/adapter_model.safetensors", "baked", "gguf"):
        assert sha256_path(copy / name) == sha256_path(finished[0] / name), name


def test_the_caller_keeps_its_threads(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over other numbers of threads differ in their last bits: a run must not decide on what comes after it."""
    step, seen = run_module.WORK["data"], []
    work = run_module.Step(step.settings, step.inputs, step.outputs, lambda run: seen.append(torch.get_num_threads()))
    monkeypatch.setitem(run_module.WORK, "data", work)
    before = torch.get_num_threads()
    with pytest.raises((InputError, FileNotFoundError)):  # the step wrote nothing
        _execute(tiny_dir, tmp_path / "run", f"threads={before + 1}", until="data")
    assert (seen, torch.get_num_threads()) == ([before + 1], before)


def test_artefact_changed_by_something_else_is_made_again(
    copy: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = next((copy / "gguf").glob("*-Q8_0.gguf"))
    with open(target, "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    names = _ran(monkeypatch)
    _execute(tiny_dir, copy)
    assert names == ["convert"]  # which gives the same bytes again, so nothing after it has to run


def test_from_until_and_force(copy: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = _ran(monkeypatch, changing=True)
    assert _execute(tiny_dir, copy, first="bake", until="convert") is None
    assert names == ["bake", "convert"]
    names.clear()
    _execute(tiny_dir, copy, force=("data",), until="train")
    assert names == ["data", "train"]
    with pytest.raises(InputError, match=r"unknown step 'cook'.*train"):
        _execute(tiny_dir, copy, until="cook")


@pytest.mark.parametrize("step", ["data", "bake", "convert"])
def test_failed_step_leaves_nothing_half_written(
    step: str, tiny_dir: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = {"data": copy / "data", "bake": copy / "baked", "convert": copy / "gguf"}
    before = {name: sha256_path(path) for name, path in outputs.items()}

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device", str(outputs[step]))

    target = {
        "data": "pipeline.data.build.build_dataset",
        "bake": "so8t_core.baking.rewrite",
        "convert": "pipeline.release.gguf_files.quantise",
    }[step]
    module, _, name = target.rpartition(".")
    monkeypatch.setattr(importlib.import_module(module), name, fail)
    with pytest.raises(InputError, match="no space left"):
        _execute(tiny_dir, copy, first=step)
    assert {name: sha256_path(path) for name, path in outputs.items()} == before
    assert [p.name for p in copy.iterdir() if p.name.endswith((".tmp", ".old"))] == []


def test_two_runs_in_one_directory_are_refused(tiny_dir: Path, tmp_path: Path) -> None:
    with locked(tmp_path / "run"), pytest.raises(InputError, match="another so8t run is working"):
        _execute(tiny_dir, tmp_path / "run")


def test_damaged_manifest_says_what_to_do(copy: Path, tiny_dir: Path) -> None:
    (copy / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json is damaged; delete it"):
        _execute(tiny_dir, copy)


def test_baked_checkpoint_is_a_plain_model(finished: tuple[Path, Report]) -> None:
    """That it loads where so8t is not installed is a law of the bake (tests/core/test_bake.py)."""
    model = AutoModelForCausalLM.from_pretrained(finished[0] / "baked")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert [name for name, _ in model.named_parameters() if "so8t" in name or "lora" in name] == []


def test_wrong_adapter_is_found_by_the_gate(copy: Path, tiny_dir: Path) -> None:
    """The adapter beside the files is not the one that was baked: its fp32 bake is not what was saved."""
    from safetensors.torch import load_file, save_file

    path = copy / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors = {k: v + 0.01 * torch.sign(v) if k.endswith("theta") else v for k, v in tensors.items()}
    save_file(tensors, path)
    types = json.loads((copy / "gguf" / "types.json").read_text(encoding="utf-8"))
    one = {name: of for name, of in types.items() if name.endswith("-F16.gguf")}  # it is no fault of the files
    (copy / "gguf" / "types.json").write_text(json.dumps(one), encoding="utf-8")
    little = "verify={chunks: 2, n_ctx: 64, base_damage: false}"
    run = Run(_config(tiny_dir, copy, little), Reporter(quiet=True))
    run.base_dir = tiny_dir
    run_module.WORK["verify"].work(run)
    report = json.loads((copy / "report" / "report.json").read_text(encoding="utf-8"))
    assert report["verdict"] == "fail"
    assert next(leg for leg in report["legs"] if leg["name"] == "dtype")["status"] == "fail"


def test_a_run_in_the_users_own_directory_touches_nothing_of_his(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = {".notes.tmp": "a", ".x.old": "b", ".so8t-plan.tmp": "c", "work/.draft.tmp": "d"}
    for name, text in own.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    leftover = tmp_path / ".so8t-data.abcdefgh.tmp"
    leftover.mkdir()
    _execute(tiny_dir, Path(), until="data")
    assert {name: (tmp_path / name).read_text() for name in own} == own
    assert (tmp_path / "data" / "train.jsonl").is_file()
    assert not leftover.exists()
    _execute(tiny_dir, Path(), until="data", force=("data",))  # its own data may be made again


def test_a_directory_that_no_run_made_is_not_replaced(tiny_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    _execute(tiny_dir, tmp_path / "new", until="data")
    (tmp_path / "data" / "rows.jsonl").write_text("mine")
    with pytest.raises(InputError, match=r"data is of no run .* choose another run_dir"):
        _execute(tiny_dir, tmp_path, until="data")
    assert (tmp_path / "data" / "rows.jsonl").read_text() == "mine"
