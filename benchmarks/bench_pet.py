"""The cost of PET: a training step with and without it, and the bytes that it keeps for the backward.

Shape: a Llama 768 x 6 in `number_type`'s type with a rotation on every layer, as in `bench_core`; PET on the last
layer, the default, and on all six.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_core import llama, saved_bytes
from benchmarks.number_type import DTYPE, NAME
from benchmarks.side_by_side import measured
from pipeline.train.pet import HiddenStates, penalty
from so8t_core import SO8TConfig, attach

LAYERS = {"the last layer": [-1], "all 6 layers": [0, 1, 2, 3, 4, 5]}


def _model(dtype: torch.dtype) -> Any:
    model: Any = attach(llama(dtype=dtype), SO8TConfig(init_scale=0.05))
    model.enable_input_require_grads()
    return model


def _loss(layers: list[int], ids: Tensor, dtype: torch.dtype = DTYPE) -> Callable[[], Tensor]:
    model, inputs = _model(dtype), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    states = HiddenStates(model, layers) if layers else None

    def run() -> Tensor:
        loss: Tensor = model(**inputs, labels=ids).loss
        return loss if states is None else loss + 0.05 * penalty(states.take(), inputs)

    return run


def bench_pet_training_step(figures: Any, quick: bool) -> None:
    tokens = 64 if quick else 1024
    ids = torch.randint(0, 4096, (2, tokens // 2), generator=torch.Generator().manual_seed(0))
    without = _loss([], ids)
    for name, layers in LAYERS.items():
        with_pet = _loss(layers, ids)
        figures(
            f"training step with PET on {name}, Llama 768 x 6 {NAME}, {tokens} tokens",
            {"with PET": lambda run=with_pet: run().backward(), "without PET": lambda: without().backward()},
            rounds=11,
            lower_is_better=True,
        )


def bench_pet_saved_bytes(record: Any) -> None:
    """Bytes a token, channel and PET layer that the backward needs more than without PET; always bfloat16."""
    ids = torch.randint(0, 4096, (1, 128), generator=torch.Generator().manual_seed(0))

    without = saved_bytes(_loss([], ids, torch.bfloat16))
    for name, layers in LAYERS.items():
        per = (saved_bytes(_loss(layers, ids, torch.bfloat16)) - without) / (128 * 768 * len(layers))
        record(
            measured(f"saved for PET on {name}, bytes a token, channel and layer, bfloat16", per, peer="without PET")
        )
