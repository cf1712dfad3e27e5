"""A low-rank part in the error: a LoRA missing, merged twice, or of another checkpoint.

The part of E along F is removed and every quantisation block is divided by its RMS, so that rounding is white. Then the
singular values are divided by those of the same matrix with random signs *per block* (JUDGE: signs per element give a
null 2.7 times too small), and these ratios by the ratio in the middle of the spectrum. *leading* is the largest of the
first ratios, *trailing* the median of the last. Rounding gives both near 1. A low-rank part raises only the leading
ratio. A quantiser with error feedback (GPTQ) changes the whole spectrum: its triangular filter has determinant 1, so it
raises one end and lowers the other. A high leading ratio with a normal trailing one is a fault; a high leading and a
low trailing ratio are error feedback, on which only the layer's output can decide.
Measured, healthy, five matrices and six makers: leading <= 1.044, trailing >= 0.973; GPTQ 1.2 to 1.7 and 0.71 to 0.85.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
ROWS = 768  # of more rows (columns), evenly spaced ones are used: a low-rank part shows in any of them
COLUMNS = 2048
DRAWS = 2  # random draws of the null
LEADING = 1.06  # largest leading ratio of healthy files, without chance
CHANCE = 4.0  # standard deviations of the largest singular value
# the largest singular value of an n x m white matrix fluctuates by about 0.6 n^(-2/3) of itself, n <= m (Tracy-Widom)
FLUCTUATION = 0.6
COLOURED = 0.93  # trailing ratio below which the spectrum is coloured as a whole


@dataclass(frozen=True)
class LowRank:
    """The singular values of an error compared with those of rounding."""

    leading: float
    trailing: float
    threshold: float
    coloured: bool

    @property
    def detected(self) -> bool:
        return self.leading > self.threshold and not self.coloured


def low_rank(values: Array, error: Array, *, block: int) -> LowRank | None:
    """The spectrum of `error` E compared with that of rounding; None if the tensor is too small or has partial blocks.

    Args:
        values: F, (out, in).
        block: number of weights that share a scale, 16 or 32.
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
    last = slice(rank - max(rank // 16, 4), rank - 1)  # the very last one was removed with the part along F
    threshold = LEADING + CHANCE * FLUCTUATION * rank ** (-2 / 3) * float(np.sqrt(1 + 1 / DRAWS))
    trailing = float(np.median(ratio[last])) / middle
    return LowRank(float(ratio[:8].max()) / middle, trailing, threshold, trailing < COLOURED)


def _singular(values: Float64) -> Float64:
    """Singular values of (rows, units, block) as a matrix, the largest first."""
    flat = values.reshape(len(values), -1)
    gram = flat @ flat.T if flat.shape[0] <= flat.shape[1] else flat.T @ flat
    found: Float64 = np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0))
    return found
