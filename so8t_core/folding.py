"""Fold an adapter into one weight, W' = (W + s B A) @ R with R = blockdiag(exp(theta)), and undo it.

With all options, R is P^T R2 P R_acc exp(theta) diag(exp(c)): see docs/core.md, "The fold".
The arithmetic is float64, on a few rows at a time so that they stay in the processor's cache. The result is rounded
once to the storage dtype.
Shapes: W (out, in), A (r, in), B (out, r), theta (in/8, 28), R (in/8, 8, 8), c (in,) or (in/8,), P (in,) as an order of
channels, z = x[P].
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

Step = Callable[[Tensor], Tensor]  # rows of W (k, in) -> (k, in), float64
ROWS = 64  # folded at a time: 1.5 MB of float64 at 3072 columns
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Turn:
    """blockdiag(R_acc exp(theta)): theta (n, 28), R_acc (n, 8, 8) float64 or None for the identity."""

    theta: Tensor
    accumulated: Tensor | None = None

    def matrix(self, device: torch.device = CPU) -> Tensor:
        """R (n, 8, 8), float64.

        Raises:
            InputError: theta holds a NaN, an Inf or an absurd angle.
        """
        R = exp_so8(self.theta.detach().to(device, torch.float64))
        return R if self.accumulated is None else self.accumulated.detach().to(R) @ R


@dataclass
class Fold:
    """The changes of one weight: first its LoRA pairs, then the rotations and scale of its input."""

    loras: list[tuple[Tensor, Tensor, float]] = field(default_factory=list)  # (A (r, in), B (out, r), scale)
    theta: Tensor | None = None  # (in/8, 28)
    accumulated: Tensor | None = None  # R_acc (in/8, 8, 8)
    log_scale: Tensor | None = None  # c
    shuffled: Turn | None = None  # R2, where there is a P
    order: Tensor | None = None  # P
    transposed: bool = False  # R^T instead of each R: the wrong bake, for negative controls

    def apply(self, W_OI: Tensor, dtype: torch.dtype | None = None, *, undo: bool = False) -> Tensor:
        """W (out, in) of any dtype -> W' (out, in) in `dtype` (None: that of W), computed in float64, rounded once.

        Args:
            undo: W' -> W = W' @ R^-1 - s B A instead.

        Raises:
            ValueError: a NaN or Inf, or a value that overflows `dtype`.
        """
        sign = -1.0 if undo else 1.0
        exact = W_OI.device, torch.float64
        pairs = [(sign * scale * A.detach().to(*exact), B.detach().to(*exact)) for A, B, scale in self.loras]
        with torch.inference_mode(False):  # the worker threads do not share the caller's mode
            out = torch.empty(W_OI.shape, dtype=dtype or W_OI.dtype, device=W_OI.device)

        def matrix(turn: Turn) -> Tensor:
            R = turn.matrix(W_OI.device)
            return R.mT.contiguous() if undo != self.transposed else R

        def fold(start: int) -> None:
            rows = slice(start, start + ROWS)
            W = W_OI.detach()[rows].double()
            for step in steps if undo else ():
                W = step(W)
            for A, B in pairs:
                W = W + B[rows] @ A
            for step in () if undo else steps:
                W = step(W)
            out[rows] = rounded(W, out.dtype)

        with mapping(W_OI.device) as run:
            turns = [] if self.theta is None else [Turn(self.theta, self.accumulated)]
            turns += [] if self.shuffled is None else [self.shuffled]
            steps = self._steps(list(run(matrix, turns)), W_OI.device, undo)
            list(run(fold, range(0, W_OI.shape[0], ROWS)))
        return out

    def _steps(self, R: list[Tensor], device: torch.device, undo: bool) -> list[Step]:
        """The products with rows of W, in order: P^T R2 P, then R1, then the scale; in reverse order to undo them."""
        steps: list[Step] = []
        if self.shuffled is not None and self.order is not None:
            order = self.order.to(device)
            back = order.argsort()
            steps.append(lambda W: rotate_rows(W[:, order], R[1])[:, back])
        if self.theta is not None:
            steps.append(lambda W: rotate_rows(W, R[0]))
        if self.log_scale is not None and self.theta is not None:
            c = self.log_scale.detach().to(device, torch.float64)
            c = c.repeat_interleave(BLOCK) if len(c) == len(self.theta) else c
            scale = torch.exp(-c if undo else c)
            steps.append(lambda W: W * scale)
        return steps[::-1] if undo else steps


@contextmanager
def mapping(device: torch.device = CPU) -> Iterator[Callable[..., Iterator[Any]]]:
    """A `map` with as many threads as torch uses; each thread computes whole items alone.

    torch's own threads wait for each other after every operation of some 50 microseconds. When another process takes a
    core, they all wait until its time slice ends (measured on two busy cores: 4.6 s instead of 0.04).
    """
    threads = torch.get_num_threads()
    if threads == 1 or device.type != "cpu":
        yield map
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(threads)  # the workers changed the number for later threads, not the caller's


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
    """Put the weight's name in front of an error's message.

    Raises:
        InputError: the block's error, with the name in front.
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
