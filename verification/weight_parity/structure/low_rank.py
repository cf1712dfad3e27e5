"""A low-rank part in the error: a LoRA missing, merged twice, or of another checkpoint.

The part along F is taken out and every quantisation block divided by its own RMS, so that rounding is white; then the
singular values are compared with those of the same matrix under random signs *per block* (JUDGE: signs per element
give a null 2.7 times too small). Ratios to that null, each divided by the ratio of the middle of the spectrum:
*leading*, the largest of the first; *trailing*, of the last. Rounding has both near 1. A low-rank part lifts the
leading ones alone. A quantiser with error feedback (GPTQ) colours the whole spectrum: its triangular filter has
determinant 1, so what it lifts at one end it lowers at the other. Leading without trailing is a fault; both together
are error feedback, which only the layer's output can judge.
Measured, healthy, five matrices and six makers: leading <= 1.044, trailing >= 0.973; GPTQ 1.2 to 1.7 and 0.71 to 0.85.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
ROWS = 768  # more rows and columns are left out evenly: a low-rank part shows in any of them
COLUMNS = 2048
DRAWS = 2  # of the null
LEADING = 1.06  # healthy files' systematic part, on top of chance
CHANCE = 4.0  # standard deviations of the largest singular value
# the largest singular value of an n x m white matrix fluctuates by about 0.6 n^(-2/3) of itself, n <= m (Tracy-Widom)
FLUCTUATION = 0.6
COLOURED = 0.93  # trailing ratio below which the spectrum is coloured as a whole


@dataclass(frozen=True)
class LowRank:
    """How the singular values of an error stand to those of rounding."""

    leading: float
    trailing: float
    threshold: float
    coloured: bool

    @property
    def detected(self) -> bool:
        return self.leading > self.threshold and not self.coloured


def low_rank(values: Array, error: Array, *, block: int) -> LowRank | None:
    """The spectrum of `error` E against rounding's; None for a tensor too small to have one.

    Args:
        values: F, (out, in).
        block: weights that share a scale: the smallest unit of a type, 16 or 32.
    """
    out, width = values.shape
    if out < 64 or width < 64 or width % block:
        return None
    at = np.unique(np.linspace(0, out - 1, min(out, ROWS)).astype(np.int64))
    units = width // block
    some = np.unique(np.linspace(0, units - 1, min(units, COLUMNS // block)).astype(np.int64))
    F, E = (x[at].reshape(len(at), units, block)[:, some].astype(np.float64) for x in (values, error))
    square = float(np.vdot(F, F)) or 1.0
    E = E - float(np.vdot(E, F)) / square * F
    rms = np.sqrt((E**2).mean(axis=2, keepdims=True))
    white = E / np.where(rms > 0, rms, np.inf)  # (rows, units, block)
    rng = np.random.default_rng(0)
    null: Float64 = np.mean(
        [_singular(white * rng.choice([-1.0, 1.0], size=(*white.shape[:2], 1))) for _ in range(DRAWS)], axis=0
    )
    found = _singular(white)
    rank = len(found)
    ratio = found / np.maximum(null, 1e-30)
    middle = float(np.median(ratio[rank // 8 : rank // 2])) or 1.0
    last = slice(rank - max(rank // 16, 4), rank - 1)  # the very last one is taken out along F
    threshold = LEADING + CHANCE * FLUCTUATION * rank ** (-2 / 3) * float(np.sqrt(1 + 1 / DRAWS))
    trailing = float(np.median(ratio[last])) / middle
    return LowRank(float(ratio[:8].max()) / middle, trailing, threshold, trailing < COLOURED)


def _singular(values: Float64) -> Float64:
    """Singular values of (rows, units, block) as a matrix, the largest first."""
    flat = values.reshape(len(values), -1)
    gram = flat @ flat.T if flat.shape[0] <= flat.shape[1] else flat.T @ flat
    found: Float64 = np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0))
    return found
