"""One fault of the catalogue: an error between a checkpoint and its GGUF file, planted at several strengths.

A fault takes a healthy pair (checkpoint and files) and a strength and writes a faulty file. It names the class and the
place (a key, a tensor) of a right diagnosis. Strengths run from strong to weak; one of them is the strength that people
really met (docs/detection.md names the threads). The catalogue measures the gate, but does not define it: the gate's
code knows no fault by name.
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
    """The strength of a planted fault: a number for `plant`, words for the reader."""

    value: float
    label: str


@dataclass(frozen=True)
class Fault:
    """One kind of fault."""

    name: str
    kind: Kind
    plant: Plant
    where: tuple[str, ...]  # the place in the diagnosis must contain one of these
    strengths: tuple[Strength, ...] = (Strength(math.nan, "yes"),)
    real: int = 0  # index of the strength that people met
    pair: str = "main"  # "{:g}" in the name takes the strength, if the pair itself has the fault
    judged: Literal["file", "checkpoint"] = "file"  # a checkpoint is compared with base and adapter
    level: str = "F16"
    quick: bool = True  # whether the short run has the fault
    logits: bool = False  # always measure the F16 or quality leg too


def steps(template: str, *values: float) -> tuple[Strength, ...]:
    """Strengths with labels like "x 1.01"."""
    return tuple(Strength(value, template.format(value)) for value in values)


def layer_of(pair: Healthy, tensor: str) -> str:
    """`tensor` of the middle layer: "attn_norm.weight" -> "blk.2.attn_norm.weight"."""
    return f"{pair.middle}.{tensor}"
