"""A number of threads for torch, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(count: int | None) -> Iterator[int]:
    """torch with `count` threads inside (None: as many as it has); gives their number, and the caller's own back.

    Sums over other numbers of threads may differ in their last bits: what comes after must not depend on this.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
