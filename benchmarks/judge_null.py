"""How far rows, columns and heads of healthy tensors stand out, where no codes decide: the null of two thresholds.

For the types whose codes have no cells, and Q4_0 to Q5_1, healthy tensors are quantised under matrices of spread 0.5 to
2; the z of groups' scales (`SCALE_Z`) and of rows' errors (`ROW_Z`) are kept. Beyond 3 the tail is taken for
exponential, P(z > t) = p3 exp(-(t - 3) / m), m the mean excess, and extended to one false alarm in 1,000 files of
300 tensors of 2,000 rows. Run: `python -m benchmarks.judge_null`.
"""

from __future__ import annotations

import json

import numpy as np

from benchmarks.elsewhere import tensors
from verification.weight_parity.own_quantiser import largest_row_errors, log_normal, own_spread, own_values
from verification.weight_parity.places import LEAST_SPREAD
from verification.weight_parity.structure.scale import SIGMA, group_scales

LATTICES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")  # rows' errors: no codes explain them
KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", *LATTICES)
SPREADS = (0.5, 1.0, 1.5, 2.0)
ROWS, SAMPLED = 192, 64
QUESTIONS = 1000 * 300 * 2000  # rows asked until one false alarm


def _tail(z: np.ndarray) -> dict[str, float]:
    """Share and mean excess beyond 3, and the threshold that asks `QUESTIONS` times for one alarm."""
    beyond = z[z > 3] - 3
    share, mean = len(beyond) / len(z), float(beyond.mean()) if len(beyond) else 0.0
    return {
        "questions": len(z),
        "largest": float(z.max()),
        "share_beyond_3": share,
        "mean_excess": mean,
        "threshold": 3 + mean * float(np.log(max(share, 1 / len(z)) * QUESTIONS)),
    }


def measure() -> dict[str, dict[str, float]]:
    """The tails of rows' errors, and of rows', columns' and heads' scales."""
    found: dict[str, list[np.ndarray]] = {"row error": [], "row scale": [], "column scale": [], "head scale": []}
    at = np.linspace(0, ROWS - 1, SAMPLED).astype(np.int64)
    for whole in tensors().values():
        W = whole[:ROWS].astype(np.float16).astype(np.float32)
        for kind in KINDS:
            own = largest_row_errors(own_spread(kind, W), W)
            for number, spread in enumerate(SPREADS):
                F = own_values(kind, W, log_normal(W.shape[1], spread, 50 + number))
                assert F is not None
                ratios = np.log(np.linalg.norm((F - W).astype(np.float64), axis=1) / own)
                middle = np.median(ratios[at])
                scale = max(SIGMA * float(np.median(np.abs(ratios[at] - middle))), LEAST_SPREAD)
                found["row error"] += [(ratios - middle) / scale] if kind in LATTICES else []
                for name, axis, size in (("row scale", 0, 1), ("column scale", 1, 1), ("head scale", 1, 32)):
                    values, errors = group_scales(F, F - W, axis=axis, size=size)
                    apart = np.abs(values - np.median(values))
                    found[name].append(apart / np.maximum(errors, SIGMA * np.median(apart)))
    return {name: _tail(np.concatenate(z)) for name, z in found.items()}


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
