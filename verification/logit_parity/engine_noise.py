"""The noise floor: the KLD between two runs of one file with different settings, caused by llama.cpp's arithmetic.

The file is opened twice. The same settings must give the same bits, otherwise no number of the report is repeatable.
Other batch sizes and thread counts choose other kernels and orders of summation. A KLD below the KLD of these runs has
no meaning with this build, so a smaller bound decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from verification.engines.llama_logits import LlamaLogits
from verification.engines.llama_model import LlamaModel, usable_cores
from verification.gate.check import plain_check
from verification.gate.report import Check, NoiseRow
from verification.logit_parity.kl import mean_kld
from verification.logit_parity.run_modes import Passage

Array = npt.NDArray[np.float32]
SAME = "same again"
PASSAGES = 2  # 76 of 80 tokens are compared; no reference is needed


def settings(threads: int) -> dict[str, dict[str, int]]:
    """The varied settings: name -> arguments of `LlamaLogits`."""
    other = 1 if threads > 1 else 2
    return {
        SAME: {"threads": threads},
        "n_batch 16": {"threads": threads, "n_batch": 16},
        "n_ubatch 8": {"threads": threads, "n_ubatch": 8},
        f"{other} thread{'s' if other > 1 else ''}": {"threads": other},
    }


def noise_floor(
    label: str,
    path: Path,
    passages: Sequence[Passage],
    *,
    threads: int | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> list[NoiseRow]:
    """Run one file over a few passages, once as usual and once with each other setting."""
    used = list(passages[:PASSAGES])
    threads = threads or usable_cores()
    varied = settings(threads)
    with LlamaModel(path) as model:
        usual = _run(model, used, {"threads": threads})
    rows = []
    with LlamaModel(path) as model:
        for number, (name, arguments) in enumerate(varied.items()):
            tell(number, len(varied))
            rows.append(_row(label, name, usual, _run(model, used, arguments)))
    tell(len(varied), len(varied))
    return rows


def _run(model: LlamaModel, passages: Sequence[Passage], arguments: dict[str, Any]) -> list[Array]:
    longest = max(len(p.tokens) for p in passages)
    with LlamaLogits(model, n_ctx=longest, **arguments) as engine:
        return [engine.chunk(p.tokens, first=1) for p in passages]


def _row(label: str, name: str, usual: list[Array], other: list[Array]) -> NoiseRow:
    pairs = list(zip(usual, other, strict=True))
    counts = np.array([len(a) for a, _ in pairs])
    equal = [int(np.count_nonzero(a.argmax(axis=1) == b.argmax(axis=1))) for a, b in pairs]
    return NoiseRow(
        candidate=label,
        setting=name,
        positions=int(counts.sum()),
        mean_kld=float(np.average([0.0 if np.array_equal(a, b) else mean_kld(a, b) for a, b in pairs], weights=counts)),
        max_abs_logit=float(np.max([np.max(np.abs(a - b)) for a, b in pairs])),  # NaN if any is NaN
        top1=sum(equal) / int(counts.sum()),
    )


def noise_checks(rows: Sequence[NoiseRow]) -> list[Check]:
    """Checks that the same settings give the same bits, and that the floor is below the conversion's bound."""
    same = [row.max_abs_logit for row in rows if row.setting == SAME]
    others = [row for row in rows if row.setting != SAME]
    worst = max(others, key=lambda row: math.inf if math.isnan(row.mean_kld) else row.mean_kld, default=None)
    return [
        plain_check(
            "evidence.repeat",
            "Same file opened twice (largest logit difference)",
            same[0] if same else None,
            detail=f"{rows[0].candidate}, {rows[0].positions} positions" if rows else "",
        ),
        plain_check(
            "evidence.noise_floor",
            "Noise floor: other batch sizes and threads (mean KLD)",
            worst.mean_kld if worst else None,
            unit="nats",
            detail=f"{worst.candidate}, {worst.setting}; held against the conversion's bound" if worst else "",
        ),
    ]
