"""The positions of a chunk of tokens that are scored, the same for every engine.

A chunk has n_ctx tokens; positions n_ctx//2 .. n_ctx-2 are scored (T = n_ctx - 1 - n_ctx//2), so that each has at least
half a chunk of context and its target inside the chunk. Every chunk starts with an empty cache. Engines yield float32
rows (rows, V), a bounded number at a time. Positions: llama.cpp, tools/perplexity/perplexity.cpp.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


def scored(n_ctx: int) -> tuple[int, int]:
    """First scored position and one past the last."""
    return n_ctx // 2, n_ctx - 1


def joined(parts: list[Array]) -> Array:
    """The rows of an engine's parts as one array, (T, V)."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
