"""Rank decoder layers and targets by the gradient that a rotation gets there in the first step.

Every target of every layer gets a rotation at the identity; one backward over the rows of the first optimiser step
gives d loss / d theta, (n, 28) for each target. The score is its Frobenius norm: the fall of the loss, to first order,
when that rotation turns by one radian in the best direction.
Source: choosing where to rotate by first-step gradients, as in LOFT (arXiv 2605.11872).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pipeline.config import TrainConfig
from pipeline.train.collate import Collator
from so8t_core import InputError, SO8TConfig, attach, detach, gates
from so8t_core.adapter import layer_of


@dataclass(frozen=True)
class Place:
    """One possible rotation and its score."""

    layer: int
    target: str  # "o_proj"; for a shared rotation the first of its targets
    score: float  # norm of d loss / d theta, nats per radian
    parameters: int


def rank(model: nn.Module, settings: TrainConfig, rows: Sequence[Any], collator: Collator) -> list[Place]:
    """Every place by its score, largest first; `model` stays as it was, but its parameters are frozen.

    Raises:
        InputError: a target that does not exist, a width that is no multiple of 8, or a loss that is not finite.
    """
    config = SO8TConfig(targets=settings.targets, share=settings.share)
    attach(model, config)
    device = next(model.parameters()).device
    micro = settings.batch_size
    counts = []
    for start in range(0, len(rows), micro):
        batch = {name: value.to(device) for name, value in collator(list(rows[start : start + micro])).items()}
        count = int((batch["labels"][:, 1:] >= 0).sum())
        loss = model(**batch, use_cache=False).loss
        if not bool(loss.isfinite()):
            detach(model)
            raise InputError(f"the loss over the first rows is {loss.item()}; the gradient tells nothing about layers")
        (loss * count).backward()  # a mean over all labels of the step, for any split into batches
        counts.append(count)
    places = []
    for name, gate in gates(model).items():
        gradient = gate.theta.grad
        score = 0.0 if gradient is None else gradient.norm().item() / max(sum(counts), 1)
        places.append(Place(layer_of(name), name.rpartition(".")[2], score, gate.theta.numel()))
    detach(model)
    return sorted(places, key=lambda place: (-place.score, place.layer, place.target))


def best_layers(places: Sequence[Place], count: int, *, ranked: bool = False) -> list[int]:
    """The `count` layers with the largest gradient over all their places, by number, or `ranked` by gradient.

    Raises:
        InputError: fewer than `count` layers have a target.
    """
    of_layer: dict[int, float] = {}
    for place in places:
        of_layer[place.layer] = of_layer.get(place.layer, 0.0) + place.score**2
    if count > len(of_layer):
        raise InputError(
            f"train.layers = auto:{count}, but only {len(of_layer)} layers have a target; use null for all"
        )
    best = sorted(of_layer, key=lambda layer: (-of_layer[layer], layer))[:count]
    return best if ranked else sorted(best)


def wanted(layers: str | list[int] | None) -> int:
    """N of "auto:N"."""
    assert isinstance(layers, str)
    return int(layers.partition(":")[2])
