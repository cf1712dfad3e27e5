"""Sets torch's number of threads for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(count: int | None) -> Iterator[int]:
    """Run the block with `count` torch threads (None: as many as torch has); yield that number, restore the former
    number at the end.

    The last bits of a sum depend on the number of threads, so later results must not depend on `count`.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
