"""tokens/s and peak VRAM of every method at the exact Phi-3.5 shape where there is a GPU; tiny on a CPU."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from benchmarks.methods import METHODS, PHI35, TINY, build, floor, ids_for, training_step
from benchmarks.side_by_side import of_memory

TOKENS = 1024


@pytest.mark.parametrize("method", METHODS[1:])
def bench_method_tiny(figures: Any, method: str) -> None:
    """A tiny Phi-3 in float32 on the CPU: small figures that show the path which a GPU takes."""
    model, ids = build(method, TINY, "cpu", torch.float32), ids_for(TINY, 256, "cpu")
    figures(
        f"method, training step, Phi-3 256 x 2, 256 tokens: {method}",
        {method: training_step(model, ids), "adapter off": floor(model, ids)},
        rounds=15,
        lower_is_better=True,
    )


@pytest.mark.parametrize("method", METHODS[1:])
def bench_method_at_phi35(figures: Any, record: Any, absent: Any, method: str) -> None:
    name = f"method, training step, Phi-3.5 shape, {TOKENS} tokens: {method}"
    if not torch.cuda.is_available():
        absent(name, "no GPU")
    base, _ = _peak("base")
    model_peak, model = _peak(method)
    record(
        of_memory(
            f"method, peak VRAM, Phi-3.5 shape, {TOKENS} tokens: {method}", {method: [model_peak], "base": [base]}
        )
    )
    ids = ids_for(PHI35, TOKENS, "cuda")
    step = training_step(model, ids)
    for figure in figures(name, {method: step, "adapter off": floor(model, ids)}, rounds=9, lower_is_better=True):
        for who in (method, "adapter off"):
            print(f"{who}: {1e3 * TOKENS / figure.milliseconds[who]:.0f} tokens/s")


def _peak(method: str) -> tuple[float, Any]:
    """(MB of device memory at the peak of two steps, the model)."""
    gc.collect()
    torch.cuda.empty_cache()
    model, ids = build(method, PHI35, "cuda"), ids_for(PHI35, TOKENS, "cuda")
    torch.cuda.reset_peak_memory_stats()
    step = training_step(model, ids)
    step()
    step()
    return torch.cuda.max_memory_allocated() / 1e6, model if method != "base" else None
