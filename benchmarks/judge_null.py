"""Measure healthy tensors, for the judge's thresholds: how far they differ from plain rounding.

Rows, columns and heads (`SCALE_Z`, `ROW_Z`): types whose codes have no cells, and Q4_0 to Q5_1, under matrices of
spread 0.5 to 2. Beyond 3 the tail is assumed to be exponential, P(z > t) = p3 exp(-(t - 3) / m), m the mean excess, and
extended to one false alarm in 1,000 files of 300 tensors of 2,000 rows.
Spectra (`LEADING`, `COLOURED`): every type, without a matrix and under two matrices.
Blocks (`last_bits`): two quantisations of weights that differ in float32's last bit, as sums of another processor do.
`last_bits` must explain every worse block. The layer's output (`output_error`): this package's quantiser under matrices
that the judge does not try.
Run: `python -m benchmarks.judge_null`.
"""

from __future__ import annotations

import json

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from benchmarks.elsewhere import tensors
from verification.engines.quantise import even_matrix, quantised_bytes
from verification.gguf.reader import GGUFTensor
from verification.weight_parity.judge import UNIT
from verification.weight_parity.last_bits import WORSE, damaged_blocks
from verification.weight_parity.layer_output_error import OpenTensor, output_ratio
from verification.weight_parity.own_quantiser import largest_row_errors, log_normal, own_spread, own_values
from verification.weight_parity.places import LEAST_SPREAD
from verification.weight_parity.structure.low_rank import CHANCE, COLOURED, DRAWS, FLUCTUATION, LEADING, low_rank
from verification.weight_parity.structure.rounding import LAST_BIT
from verification.weight_parity.structure.scale import SIGMA, group_scales

OPEN = ("Q4_0", "Q4_1", "Q5_0", "Q4_K", "Q5_K", "Q6_K", "Q3_K", "Q2_K", "IQ4_XS")
LATTICES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")  # rows' errors: no codes explain them
KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", *LATTICES)
ALL = (*KINDS, "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
SPREADS = (0.5, 1.0, 1.5, 2.0)
ROWS, SAMPLED = 192, 64
QUESTIONS = 1000 * 300 * 2000  # judged rows for one false alarm


def _tail(z: np.ndarray) -> dict[str, float]:
    """Share and mean excess beyond 3, and the threshold with one false alarm in `QUESTIONS` rows."""
    beyond = z[z > 3] - 3
    share, mean = len(beyond) / len(z), float(beyond.mean()) if len(beyond) else 0.0
    return {
        "questions": len(z),
        "largest": float(z.max()),
        "share_beyond_3": share,
        "mean_excess": mean,
        "threshold": 3 + mean * float(np.log(max(share, 1 / len(z)) * QUESTIONS)),
    }


def spectra() -> dict[str, dict[str, float]]:
    """Leading singular values in units of their chance fluctuation, and the distance of trailing ones below 1."""
    leading: list[float] = []
    trailing: list[float] = []
    for whole in tensors().values():
        W = whole[:384].astype(np.float16).astype(np.float32)
        for kind in ALL:
            for number, spread in enumerate((0.0, 1.0, 2.0)):
                F = own_values(kind, W, log_normal(W.shape[1], spread, 80 + number) if spread else None)
                assert F is not None
                found = low_rank(F, F - W, block=UNIT.get(kind, 32))
                assert found is not None
                chance = FLUCTUATION * len(W) ** (-2 / 3) * float(np.sqrt(1 + 1 / DRAWS))
                leading.append((found.leading - 1) / chance)
                trailing.append(found.trailing)
    chosen = (LEADING - 1) / chance + CHANCE
    return {
        "leading": _normal(np.array(leading)) | {"used": chosen},
        "trailing": _normal(1 - np.array(trailing)) | {"used": 1 - COLOURED},
    }


def _normal(x: np.ndarray) -> dict[str, float]:
    """Mean, deviation, largest, and mean + 4.5 deviations: one normal variable in 300,000 (1,000 files of 300)."""
    mean, deviation = float(x.mean()), float(x.std())
    return {
        "questions": len(x),
        "mean": mean,
        "deviation": deviation,
        "largest": float(x.max()),
        "threshold": mean + 4.5 * deviation,
    }


def blocks() -> dict[str, dict[str, float]]:
    """By type, the number of blocks, of those that another processor quantises differently, of the worse ones among
    these, and of the worse ones that no last bit explains."""
    found: dict[str, dict[str, float]] = {}
    for whole in tensors().values():
        W = whole[:ROWS].astype(np.float16).astype(np.float32)
        other = W * (1 + 2.0**-23 * np.random.default_rng(1).choice([-1, 1], W.shape)).astype(np.float32)
        for kind in ALL:
            size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]
            matrix = even_matrix(kind, W.shape)
            raws = [quantised_bytes(x, kind, matrix) for x in (W, other)]
            own, tensor = (GGUFTensor("", W.shape, kind, raw) for raw in raws if raw is not None)
            values, twin = tensor.values(), own.values()
            A, B, V = (x.reshape(-1, size) for x in (twin, values, W))
            moved = np.abs(A - B).max(axis=1) > 2 * LAST_BIT * np.abs(A).max(axis=1)
            theirs, mine = (((x - V).astype(np.float64) ** 2).sum(axis=1) for x in (B, A))
            matrices = None if matrix is None else matrix[None]
            one_type = found.setdefault(kind, dict.fromkeys(("blocks", "moved", "worse", "damaged"), 0.0))
            one_type["blocks"] += len(A)
            one_type["moved"] += int(moved.sum())
            one_type["worse"] += int((moved & (theirs > WORSE * mine)).sum())
            one_type["damaged"] += damaged_blocks(tensor, values, twin, W, W, moved, matrices)
    return found


def outputs() -> dict[str, float]:
    """The output error of files that this package's quantiser makes under matrices unknown to the judge."""
    found: list[float] = []
    for name, whole in tensors().items():
        W, rng = whole[:ROWS].astype(np.float16).astype(np.float32), np.random.default_rng(4)
        x = rng.standard_normal((512, W.shape[1])) * np.exp(0.5 * rng.standard_normal(W.shape[1]))
        for kind in OPEN:
            for number, spread in enumerate((0.5, 1.0, 1.5, 2.0)):
                matrix = log_normal(W.shape[1], spread, 60 + number)
                raw = quantised_bytes(W, kind, matrix)
                assert raw is not None
                found.append(
                    output_ratio(OpenTensor(GGUFTensor(name, W.shape, kind, raw), W, ""), x.astype(np.float32))
                )
    return _normal(np.array(found))


def measure() -> dict[str, dict[str, float]]:
    """The tails of the errors of rows, and of the scales of rows, columns and heads."""
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
    found = {"places": measure(), "spectra": spectra(), "blocks": blocks(), "outputs": outputs()}
    print(json.dumps(found, indent=1))
