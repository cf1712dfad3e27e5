"""Logits and small reference files for the tests of this room."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def logits_like_a_models(generator: np.random.Generator, rows: int, vocab: int) -> npt.NDArray[np.float32]:
    """(rows, vocab) logits with a few likely tokens and a long tail, of varied sharpness."""
    sharpness = generator.uniform(1.5, 5.0, (rows, 1))
    return (sharpness * generator.standard_normal((rows, vocab))).astype(np.float32)
