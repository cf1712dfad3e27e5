"""exp of 8x8 skew matrices, in float64, with a backward of its own; `rotation.exp_so8` is its public face.

With B = A A (symmetric): exp(A) = C(B) + A S(B), C = sum B^k / (2k)!, S = sum B^k / (2k+1)!, both evaluated in powers
of B^3 (Paterson and Stockmeyer 1973), after scaling A by 2^-s and before squaring s times (Moler, Van Loan 2003). The
backward is reverse mode through these few products, from theta alone, so nothing but theta is kept for it.
float64 for float32 parameters: an 8x8 product costs 1.3 times the float32 one on a CPU, and R comes out correctly
rounded but for one unit in the last place, at every angle.
Shapes: theta (n, 28), A, B, R (n, 8, 8).
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from so8t_core.errors import InputError

BLOCK = 8
PARAMETERS = BLOCK * (BLOCK - 1) // 2  # 28
LARGEST = 1e4  # rad; each doubling of the angle doubles the rounding error, here to 1e4 * 1e-16 = 1e-12
CHUNK = 1024  # blocks at a time on a CPU: half a megabyte a tensor stays in the cache

# Highest power of B by theta's dtype. After scaling every angle is at most 1, so the first term left out is at most
# 1/14! = 1.1e-11 for float32 parameters (rounding: 6e-8) and 1/20! = 4e-19 for float64 ones (rounding: 1e-16).
_DEGREE = {torch.float32: 6, torch.float64: 9}


@cache
def generators(device: torch.device) -> Tensor:
    """(28, 64) float64: row k is the basis matrix of so(8) with +1 at (i, j) and -1 at (j, i), flattened."""
    i, j = torch.triu_indices(BLOCK, BLOCK, 1)
    E = torch.zeros(PARAMETERS, BLOCK, BLOCK, dtype=torch.float64)
    E[torch.arange(PARAMETERS), i, j] = 1.0
    return (E - E.mT).reshape(PARAMETERS, BLOCK * BLOCK).to(device)


def squarings_for(theta: Tensor) -> int:
    """How often to halve A so that no plane's angle exceeds 1. |theta|_2 bounds the angle: |A|_F^2 = 2 |theta|^2.

    Raises:
        InputError: (a ValueError) NaN, Inf, or a block beyond LARGEST.
    """
    if theta.numel() == 0:
        return 0
    largest = float(torch.linalg.vector_norm(theta.detach().double(), dim=-1).max())
    if not largest <= LARGEST:
        length = f"is {largest:.3g} rad long, the limit is {LARGEST:g}"
        what = length if math.isfinite(largest) else "has a NaN or Inf"
        raise InputError(f"theta {what}; lower the learning rate, or start again from an earlier checkpoint")
    return max(0, math.ceil(math.log2(largest))) if largest > 1.0 else 0


class Exponential(torch.autograd.Function):
    """theta (n, 28), s -> R (n, 8, 8) in theta's dtype."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, squarings: int) -> Tensor:
        ctx.save_for_backward(theta)
        ctx.squarings = squarings
        pieces = [_exp(*_scaled(part, squarings), squarings, part.dtype) for part in _chunks(theta)]
        return torch.cat([piece.to(theta.dtype) for piece in pieces])  # n = 0 is one empty piece

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (theta,) = ctx.saved_tensors
        parts = zip(_chunks(theta), _chunks(grad), strict=True)
        return torch.cat([_pull_back(part, g, ctx.squarings).to(theta.dtype) for part, g in parts]), None


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x, CHUNK) if x.device.type == "cpu" else (x,)


def _scaled(theta: Tensor, squarings: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A 2^-s and its powers B = A^2, B^2, B^3."""
    A = ((theta.double() * 0.5**squarings) @ generators(theta.device)).view(-1, BLOCK, BLOCK)
    B = A @ A
    B2 = B @ B
    return A, B, B2, B @ B2


def _coefficients(odd: int, dtype: torch.dtype) -> list[float]:
    """1/(2k)! or 1/(2k+1)!, k = 0 to the degree; one more than a multiple of three, as `_series` needs."""
    return [1.0 / math.factorial(2 * k + odd) for k in range(_DEGREE[dtype] + 1)]


def _series(B: Tensor, B2: Tensor, B3: Tensor, c: list[float]) -> list[Tensor]:
    """Horner in B^3 over groups of three coefficients; the partial sums, the whole series first."""
    top = len(c) - 4  # the last group holds four terms: its B^3 needs no product
    partial = _group(B, B2, c[top : top + 3]).add_(B3, alpha=c[-1])
    sums = [partial]
    for k in range(top - 3, -1, -3):
        partial = _group(B, B2, c[k : k + 3]).baddbmm_(B3, partial)
        sums.insert(0, partial)
    return sums


def _group(B: Tensor, B2: Tensor, c: list[float]) -> Tensor:
    """c0 I + c1 B + c2 B^2."""
    out = (B * c[1]).add_(B2, alpha=c[2])
    out.diagonal(dim1=-2, dim2=-1).add_(c[0])
    return out


def _root(A: Tensor, B: Tensor, B2: Tensor, B3: Tensor, dtype: torch.dtype) -> Tensor:
    """exp of the scaled A."""
    C = _series(B, B2, B3, _coefficients(0, dtype))[0]
    return C.baddbmm_(A, _series(B, B2, B3, _coefficients(1, dtype))[0])


def _exp(A: Tensor, B: Tensor, B2: Tensor, B3: Tensor, squarings: int, dtype: torch.dtype) -> Tensor:
    R = _root(A, B, B2, B3, dtype)
    for _ in range(squarings):
        R = R @ R
    # Each squaring doubles what rounding took from orthogonality; one Newton-Schulz step towards the nearest orthogonal
    # matrix, R (3 I - R^T R) / 2, gives it back. float32 results round it away anyway.
    return R if dtype == torch.float32 else torch.baddbmm(R, R, R.mT @ R, beta=1.5, alpha=-0.5)


def _pull_back(theta: Tensor, grad: Tensor, squarings: int) -> Tensor:
    """dL/dtheta (n, 28) float64 from dL/dR (n, 8, 8)."""
    A, B, B2, B3 = _scaled(theta, squarings)
    G = grad.double()
    if squarings:
        roots = [_root(A, B, B2, B3, theta.dtype)]
        for _ in range(squarings - 1):
            roots.append(roots[-1] @ roots[-1])
        for R in reversed(roots):  # d(R R) = dR R + R dR
            G = (R.mT @ G).baddbmm_(G, R.mT)
    # C and S are symmetric and commute with A: C sees the symmetric half of G, A S the skew half.
    C_bar = (G + G.mT).mul_(0.5)
    K = G - C_bar
    S_coefficients = _coefficients(1, theta.dtype)
    S_sums = _series(B, B2, B3, S_coefficients)
    B_bars = [torch.zeros_like(B) for _ in range(3)]  # with respect to B, B^2, B^3
    _pull_back_series(
        C_bar, _series(B, B2, B3, _coefficients(0, theta.dtype)), B3, _coefficients(0, theta.dtype), B_bars
    )
    _pull_back_series((A @ K).neg_(), S_sums, B3, S_coefficients, B_bars)  # A^T = -A
    B_bar, B2_bar, B3_bar = B_bars
    B2_bar.baddbmm_(B, B3_bar)
    B_bar.baddbmm_(B3_bar, B2).baddbmm_(B, B2_bar + B2_bar.mT)
    # d(A A) = dA A + A dA, and B_bar counts by its symmetric half: both terms give the generators the same.
    A_bar = (K @ S_sums[0]).baddbmm_(B_bar + B_bar.mT, A, alpha=-1)
    flat = A_bar.view(-1, BLOCK * BLOCK)
    return (flat @ generators(theta.device).mT).mul_(0.5**squarings)


def _pull_back_series(bar: Tensor, sums: list[Tensor], B3: Tensor, c: list[float], bars: list[Tensor]) -> None:
    """Reverse mode of `_series`: adds to the gradients with respect to B, B^2 and B^3 (up to their skew halves)."""
    for group in range(len(sums)):
        bars[0].add_(bar, alpha=c[3 * group + 1])
        bars[1].add_(bar, alpha=c[3 * group + 2])
        if group + 1 < len(sums):
            bars[2].baddbmm_(bar, sums[group + 1])
            bar = B3 @ bar
    bars[2].add_(bar, alpha=c[-1])
