"""One fault of the catalogue: what goes wrong between a checkpoint and its GGUF, planted at several strengths.

A fault takes a healthy pair and a strength and writes a faulty file. It names the class that a right diagnosis has and
what it must point to (a key, a tensor). Strengths run from loud to quiet; one of them is what people really met (the
threads are named in docs/detection.md). The catalogue measures the gate, it does not define it: nothing in the gate
knows a fault's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from verification.fault_catalogue.models import Healthy

Kind = Literal[
    "rope",
    "norm",
    "window and soft-cap",
    "attention layout",
    "tokenizer",
    "BOS and stop",
    "chat template",
    "embedding and head",
    "number range",
    "adapter",
    "weights",
    "other source",
    "types",
    "shape",
    "engine settings",
    "file",
    "running",
]
Plant = Callable[[Healthy, Path, Path, float], object]  # pair, healthy file, faulty file, strength


@dataclass(frozen=True)
class Strength:
    """How strong a fault is planted: a number for the planter, words for the reader."""

    value: float
    label: str


@dataclass(frozen=True)
class Fault:
    """One kind of fault."""

    name: str
    kind: Kind
    plant: Plant
    where: tuple[str, ...]  # one of these must stand in the place that the diagnosis names
    strengths: tuple[Strength, ...] = (Strength(math.nan, "yes"),)
    real: int = 0  # index of the strength that people met
    pair: str = "main"  # "{:g}" in it takes the strength: the pair itself is what is wrong
    judged: Literal["file", "checkpoint"] = "file"  # a checkpoint is held against base and adapter
    level: str = "F16"
    quick: bool = True  # also in the short run
    logits: bool = False  # measure the F16 or quality leg as well, whatever the file legs say


def steps(template: str, *values: float) -> tuple[Strength, ...]:
    """Strengths with labels like "x 1.01"."""
    return tuple(Strength(value, template.format(value)) for value in values)


def layer_of(pair: Healthy, tensor: str) -> str:
    """`tensor` of the middle layer: "attn_norm.weight" -> "blk.2.attn_norm.weight"."""
    return f"{pair.middle}.{tensor}"
