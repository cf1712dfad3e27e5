"""Fold: what an adapter does to one weight, W' = (W + s B A) @ R with R = blockdiag(exp(theta)), and its inverse.

Everything is computed in float64 and rounded once to the storage dtype. Rows are independent of each other, so a few
at a time stay in the processor's cache, and float64 memory is needed for those alone.
Shapes: W (out, in), A (r, in), B (out, r), theta (in/8, 28), R (in/8, 8, 8).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from so8t_core.errors import InputError
from so8t_core.exponential import BLOCK
from so8t_core.rotation import exp_so8
from so8t_core.rounding import all_finite, round_once

ROWS = 64  # folded at a time: 1.5 MB of float64 at 3072 columns
CPU = torch.device("cpu")


@dataclass
class Fold:
    """What has to be folded into one weight: LoRA pairs first, then the rotation."""

    loras: list[tuple[Tensor, Tensor, float]] = field(default_factory=list)  # (A (r, in), B (out, r), scale)
    theta: Tensor | None = None  # (in/8, 28)

    def apply(self, W_OI: Tensor, dtype: torch.dtype | None = None, *, undo: bool = False) -> Tensor:
        """W (out, in) of any dtype -> W' (out, in) in `dtype` (None: that of W), computed in float64, rounded once.

        Args:
            undo: W' -> W = W' @ R^T - s B A instead.

        Raises:
            ValueError: a NaN or Inf, or a value that overflows `dtype`.
        """
        sign = -1.0 if undo else 1.0
        exact = W_OI.device, torch.float64
        pairs = [(sign * scale * A.detach().to(*exact), B.detach().to(*exact)) for A, B, scale in self.loras]
        with torch.inference_mode(False):  # the workers write into it, and they know nothing of the caller's mode
            out = torch.empty(W_OI.shape, dtype=dtype or W_OI.dtype, device=W_OI.device)

        def exponential(theta: Tensor) -> Tensor:
            return exp_so8(sign * theta.detach().to(*exact))  # R^T = exp(-A)

        def fold(start: int) -> None:
            rows = slice(start, start + ROWS)
            W = W_OI.detach()[rows].double()
            for R in turns if undo else ():
                W = rotate_rows(W, R)
            for A, B in pairs:
                W = W + B[rows] @ A
            for R in () if undo else turns:
                W = rotate_rows(W, R)
            out[rows] = rounded(W, out.dtype)

        with mapping(W_OI.device) as run:
            turns = list(run(exponential, [] if self.theta is None else [self.theta]))
            list(run(fold, range(0, W_OI.shape[0], ROWS)))
        return out


@contextmanager
def mapping(device: torch.device = CPU) -> Iterator[Callable[..., Iterator[Any]]]:
    """A `map` with as many threads as torch uses, each of which does whole items by itself.

    torch's own threads would meet after every operation of some 50 microseconds, and whenever another process takes one
    core away, all wait there for its time slice to end (seen on two busy cores: 4.6 s instead of 0.04).
    """
    threads = torch.get_num_threads()
    if threads == 1 or device.type != "cpu":
        yield map
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(threads)  # the caller's own number never changed, but that of threads to come did


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x, any shape and floating-point type, rounded once to `dtype`.

    Raises:
        ValueError: a NaN or Inf, or a value that overflows `dtype`.
    """
    y = round_once(x, dtype)
    if not all_finite(y):
        raise InputError("a NaN or Inf after baking; check the adapter and the base checkpoint")
    return y


@contextmanager
def named(name: str) -> Iterator[None]:
    """Put the weight's name before what is wrong with it.

    Raises:
        InputError: what the block raised, with the name in front.
    """
    try:
        yield
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None


def rotate_weight(W_OI: Tensor, theta: Tensor) -> Tensor:
    """W @ blockdiag(exp(theta)) in float64: W (out, 8 n), theta (n, 28) -> (out, 8 n) float64."""
    return rotate_rows(W_OI.detach().double(), exp_so8(theta.detach().double()))


def rotate_rows(W_OI: Tensor, R: Tensor) -> Tensor:
    """W @ blockdiag(R) for any number of rows: W (out, 8 n), R (n, 8, 8), both float64 -> (out, 8 n)."""
    W_NOK = W_OI.reshape(W_OI.shape[0], -1, BLOCK).transpose(0, 1)  # (n, out, 8), strided: bmm needs no copy
    return torch.bmm(W_NOK, R).transpose(0, 1).reshape(W_OI.shape)
