"""Faults of the engine: file and checkpoint agree, but the engine computes other logits.

These pairs are healthy files of models that the engine, or the file's number format, cannot represent exactly.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from verification.fault_catalogue.fault import Fault, steps
from verification.fault_catalogue.models import Healthy


def _as_it_is(pair: Healthy, source: Path, target: Path, strength: float) -> None:
    shutil.copyfile(source, target)


FAULTS = [
    Fault(
        "sliding window that llama.cpp does not apply",
        "window and soft-cap",
        _as_it_is,
        ("sliding_window",),
        steps("{:g} of 128 tokens", 32, 96),
        pair="mistral sliding_window={:g}",
    ),
    Fault(
        "weights below F16's smallest number",
        "number range",
        _as_it_is,
        ("attn_v",),
        steps("2^-{:g} of their size", 18, 14, 10),
        pair="llama small={:g}",
    ),
]
