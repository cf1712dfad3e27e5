"""The GPU script runs without one: its functions at a tiny shape on the CPU, its command refuses in one line."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks.methods import METHODS, TINY, build, floor, ids_for, training_step

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_check.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def test_without_a_gpu_it_says_so_and_ends_with_2(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main([]) == 2
    assert capsys.readouterr().err == "gpu_check: no CUDA device; nothing was measured\n"


def test_every_method_and_the_rotation_are_measured(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    methods = script.methods_table(TINY, 32, "cpu", torch.float32, rounds=2)
    assert [row["method"] for row in methods] == list(METHODS)
    assert all("failed" not in row and row["tokens_per_second"] > 0 for row in methods), methods
    applied = script.apply_table(64, 256, "cpu", torch.float32, rounds=2)
    assert [figure.peer for figure in applied] == ["PEFT OFT", "memcpy", "PEFT OFT", "2 memcpy"]
    script.show([*methods, {"method": "x", "failed": "out of memory"}], applied)
    assert "out of memory" in capsys.readouterr().out


@pytest.mark.parametrize("method", METHODS)
def test_a_step_trains_the_adapter_and_the_floor_does_not(method: str) -> None:
    """The two that take turns: one moves the adapter's parameters and only those, the other nothing."""
    model, ids = build(method, TINY, "cpu", torch.float32), ids_for(TINY, 16, "cpu")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def moved() -> set[bool]:
        return {p.requires_grad for name, p in model.named_parameters() if not torch.equal(p, before[name])}

    floor(model, ids)()
    assert moved() == set()
    assert not any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    training_step(model, ids)()
    assert moved() == (set() if method == "base" else {True})


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="'DoRA' is not one of base, LoRA"):
        build("DoRA", TINY, "cpu")
