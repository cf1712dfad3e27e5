"""tokens/s and peak VRAM of every method: at the exact Phi-3.5 shape on a GPU, at a tiny shape on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.methods import METHODS, PHI35, TINY, prepare
from benchmarks.side_by_side import of_memory

TOKENS = 1024


@pytest.mark.parametrize("method", METHODS[1:])
def bench_method_tiny(figures: Any, method: str) -> None:
    """A tiny Phi-3 in float32 on the CPU runs the same code as on a GPU."""
    made = prepare(method, TINY, 256, "cpu", torch.float32)
    figures(
        f"method, training step, Phi-3 256 x 2, 256 tokens: {method}",
        {method: made.step, "adapter off": made.floor},
        rounds=15,
        lower_is_better=True,
    )


@pytest.mark.parametrize("method", METHODS[1:])
def bench_method_at_phi35(figures: Any, record: Any, absent: Any, method: str) -> None:
    """One model in memory at a time; the base's memory is measured anew for every method."""
    name = f"method, training step, Phi-3.5 shape, {TOKENS} tokens: {method}"
    if not torch.cuda.is_available():
        absent(f"tokens/s and peak VRAM, Phi-3.5 shape, {TOKENS} tokens: {method}", "no GPU")
    base = prepare("base", PHI35, TOKENS, "cuda", torch.bfloat16).megabytes
    made = prepare(method, PHI35, TOKENS, "cuda", torch.bfloat16)
    memory = f"method, peak VRAM, Phi-3.5 shape, {TOKENS} tokens: {method}"
    record(of_memory(memory, {method: [made.megabytes], "base": [base]}))
    figures(name, {method: made.step, "adapter off": made.floor}, rounds=9, lower_is_better=True, tokens=TOKENS)
