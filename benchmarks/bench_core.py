"""The core against its peers, side by side: groups of two, whose medians are to be compared as a ratio.

`tox -e bench` runs it. Shapes: all 12288 rotations of a Phi-3.5, and the bake of one of its 3072 x 3072 weights.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from so8t_core import exp_so8, skew
from so8t_core.baking import Fold

BLOCKS = 12288


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _theta(angle: float) -> torch.Tensor:
    theta = torch.randn(BLOCKS, 28, generator=torch.Generator().manual_seed(0))
    return theta / torch.linalg.matrix_norm(skew(theta), 2)[:, None] * angle


PEERS = {"so8t": exp_so8, "torch.matrix_exp": lambda theta: torch.matrix_exp(skew(theta))}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("angle", [1.0, 3.14159])
def bench_exponential_forward(benchmark: Any, angle: float, peer: str) -> None:
    benchmark.group = f"exponential of 12288 blocks, forward, angle {angle:g}"
    theta = _theta(angle)
    with torch.no_grad():
        benchmark.pedantic(PEERS[peer], (theta,), rounds=15, warmup_rounds=2)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("angle", [1.0, 3.14159])
def bench_exponential_with_gradient(benchmark: Any, angle: float, peer: str) -> None:
    benchmark.group = f"exponential of 12288 blocks, forward and backward, angle {angle:g}"
    theta, weight = _theta(angle).requires_grad_(True), torch.randn(BLOCKS, 8, 8)
    benchmark.pedantic(lambda: torch.autograd.grad(PEERS[peer](theta), theta, weight), rounds=9, warmup_rounds=1)


def _peft_merge(weight: torch.Tensor) -> torch.Tensor:
    """Stock PEFT OFT (block 8) merged into one linear layer of this weight."""
    from peft import OFTConfig, get_peft_model

    class One(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.o_proj = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
            self.o_proj.weight.data = weight.clone()

    config = OFTConfig(r=0, oft_block_size=8, target_modules=["o_proj"])
    return get_peft_model(One(), config)  # type: ignore[return-value, arg-type]


@pytest.mark.parametrize("peer", ["so8t", "peft"])
def bench_bake_of_one_weight(benchmark: Any, peer: str) -> None:
    benchmark.group = "bake of one 3072 x 3072 bfloat16 weight"
    weight = (torch.randn(3072, 3072) * 0.02).bfloat16()
    theta = 0.1 * torch.randn(384, 28)
    if peer == "so8t":
        benchmark.pedantic(lambda: Fold(theta=theta).apply(weight, torch.bfloat16), rounds=9, warmup_rounds=1)
    else:
        benchmark.pedantic(
            lambda model: model.merge_adapter(), setup=lambda: ((_peft_merge(weight),), {}), rounds=5, warmup_rounds=1
        )
