"""exp of 8x8 skew matrices, in float64, with a backward of its own; `rotation.exp_so8` is its public face.

B = A A is symmetric with the four eigenvalues -a^2 (a: a plane's angle), each twice, so B satisfies a polynomial of
degree 4: chi(B) = 0, its coefficients Newton's identities of the traces of B, B^2, B^3, B^4 (Cayley, Hamilton). Hence
exp(A) = P(B) + A Q(B), with P = sum z^k/(2k)! mod chi and Q = sum z^k/(2k+1)! mod chi of degree 3: four matrix products
at any usual angle, and the power series runs over four numbers a block instead of 64. The backward is reverse mode.
Angles beyond REACH are halved first and squared back (Moler, Van Loan 2003). float64 for float32 parameters costs 1.3
times the float32 products on a CPU and gives R correctly rounded but for one unit in the last place.
Shapes: theta (n, 28), A, B, R (n, 8, 8), polynomials mod chi (..., 4, n), lowest coefficient first.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from so8t_core.errors import InputError

BLOCK = 8
PARAMETERS = BLOCK * (BLOCK - 1) // 2  # 28
LARGEST = 1e4  # rad; each doubling of the angle doubles the rounding error, here to 1e4 * 1e-16 = 1e-12
CHUNK = 2048  # blocks at a time on a CPU: a megabyte a tensor, few enough calls

# By theta's dtype: the largest |theta| that is not halved, and the first power of B left out. Left out is at most
# REACH^(2k)/(2k)!: 6.5^34/34! = 1.5e-11 for float32 parameters (rounding: 6e-8), 2^28/28! = 9e-22 for float64 (1e-16).
# 6.5 is just above 2 pi, the length of four planes turned by pi. float64 stays at 2, because terms up to
# REACH^(2k)/(2k)! cancel in the cosine: two digits at 6.5.
REACH = {torch.float32: 6.5, torch.float64: 2.0}
_TERMS = {torch.float32: 17, torch.float64: 14}


@cache
def generators(device: torch.device, dtype: torch.dtype) -> Tensor:
    """(28, 64): row k is the basis matrix of so(8) with +1 at (i, j) and -1 at (j, i), flattened."""
    i, j = torch.triu_indices(BLOCK, BLOCK, 1)
    E = torch.zeros(PARAMETERS, BLOCK, BLOCK, dtype=dtype)
    E[torch.arange(PARAMETERS), i, j] = 1.0
    return (E - E.mT).reshape(PARAMETERS, BLOCK * BLOCK).to(device)


@cache
def _series(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(2, terms) float64: 1/(2k)! and 1/(2k+1)!."""
    terms = range(_TERMS[dtype])
    return torch.tensor(
        [[1.0 / math.factorial(2 * k + odd) for k in terms] for odd in (0, 1)], dtype=torch.float64, device=device
    )


def squarings_for(theta: Tensor) -> int:
    """How often to halve A so that no plane's angle exceeds REACH. |theta|_2 bounds the angle: |A|_F^2 = 2 |theta|^2.

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
    return max(0, math.ceil(math.log2(largest / REACH[theta.dtype]))) if largest > 0 else 0


class Workings(NamedTuple):
    """What the backward needs of the forward, for the scaled A: five matrices and 20 numbers a block."""

    A: Tensor
    B: Tensor
    B2: Tensor
    B3: Tensor
    Q: Tensor  # (n, 8, 8)
    chi: Tensor  # (4, n): z^4 mod chi
    remainders: Tensor  # (2, 4, n): P and Q
    quotients: Tensor  # (2, 4, n): (series - remainder) / chi, mod chi: how P and Q change with chi


class Exponential(torch.autograd.Function):
    """theta (n, 28), s -> R (n, 8, 8) in theta's dtype."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, squarings: int) -> Tensor:
        R, workings = exponential(theta, squarings, workings=ctx.needs_input_grad[0])
        ctx.squarings = squarings
        ctx.save_for_backward(*(tensor for part in workings for tensor in part))
        return R

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        saved = ctx.saved_tensors
        width = len(Workings._fields)
        workings = [Workings(*saved[k : k + width]) for k in range(0, len(saved), width)]
        return pull_back(workings, grad, ctx.squarings), None


def exponential(theta: Tensor, squarings: int, *, workings: bool) -> tuple[Tensor, list[Workings]]:
    """theta (n, 28) -> R (n, 8, 8) in theta's dtype, and per chunk what `pull_back` needs (if wanted)."""
    parts = [_exponential(part, squarings, workings) for part in _chunks(theta)]  # n = 0 is one empty piece
    return torch.cat([R for R, _ in parts]), [kept for _, kept in parts if kept is not None]


def pull_back(workings: list[Workings], grad: Tensor, squarings: int) -> Tensor:
    """dL/dR (n, 8, 8) -> dL/dtheta (n, 28), in grad's dtype."""
    parts = zip(workings, _chunks(grad), strict=True)
    return torch.cat([_pull_back(kept, part, squarings) for kept, part in parts])


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x, CHUNK) if x.device.type == "cpu" else (x,)


def _exponential(theta: Tensor, squarings: int, workings: bool) -> tuple[Tensor, Workings | None]:
    A = (theta @ generators(theta.device, theta.dtype)).double().mul_(0.5**squarings).view(-1, BLOCK, BLOCK)  # exact
    B = A @ A
    B2 = B @ B
    B3 = B @ B2
    chi = _characteristic(B, B2)
    polynomials = _reduced_series(chi, _series(theta.dtype, theta.device), quotients=workings)  # (2, 4 or 8, n)
    P = _polynomial(polynomials[0], B, B2, B3)
    Q = _polynomial(polynomials[1], B, B2, B3)
    R = _finish(P.baddbmm_(A, Q), squarings, theta.dtype).to(theta.dtype)
    if not workings:
        return R, None
    return R, Workings(A, B, B2, B3, Q, chi, polynomials[:, :4], polynomials[:, 4:])


def _characteristic(B: Tensor, B2: Tensor) -> Tensor:
    """z^4 mod chi = (-e4, e3, -e2, e1), e_k the elementary symmetric functions of B's four double eigenvalues."""
    p1 = B.diagonal(dim1=-2, dim2=-1).sum(-1) / 2  # power sums: half the traces of B^k
    p2, p3, p4 = (torch.linalg.vecdot(X.flatten(1), Y.flatten(1)) / 2 for X, Y in ((B, B), (B, B2), (B2, B2)))
    e1 = p1  # Newton's identities
    e2 = (e1 * p1 - p2) / 2
    e3 = (e2 * p1 - e1 * p2 + p3) / 3
    e4 = (e3 * p1 - e2 * p2 + e1 * p3 - p4) / 4
    return torch.stack([-e4, e3, -e2, e1])


def _reduced_series(chi: Tensor, series: Tensor, *, quotients: bool) -> Tensor:
    """sum_k series[:, k] z^k mod chi (2, 4, n); with `quotients` mod chi^2 as remainder + chi quotient (2, 8, n).

    Times z moves every coefficient up by one; what leaves the top comes back as that many times z^4 mod chi. What
    leaves the remainder's top is also what enters the quotient, so one shift over all eight rows does both.
    """
    halves, n = 2 if quotients else 1, chi.shape[1]
    terms = series.shape[1]
    powers = chi.new_zeros(terms, 1 + 4 * halves, n)  # z^k; row 0 stays zero, it is what a shift brings in
    for k in range(4):
        powers[k, 1 + k] = 1.0
    for k in range(4, terms):
        shifted = powers[k - 1, :-1].view(halves, 4, n)
        tops = powers[k - 1, 4::4].unsqueeze(1)  # (halves, 1, n)
        torch.addcmul(shifted, chi, tops, out=powers[k, 1:].view(halves, 4, n))
    return (series @ powers.flatten(1)).view(2, 1 + 4 * halves, n)[:, 1:]


def _polynomial(c: Tensor, B: Tensor, B2: Tensor, B3: Tensor) -> Tensor:
    """c0 I + c1 B + c2 B^2 + c3 B^3; c (4, n) or more rows, which are not read."""
    c0, c1, c2, c3 = c[:4, :, None, None].unbind()
    out = (B * c1).addcmul_(B2, c2).addcmul_(B3, c3)
    out.diagonal(dim1=-2, dim2=-1).add_(c0.squeeze(-1))
    return out


def _finish(root: Tensor, squarings: int, dtype: torch.dtype) -> Tensor:
    R = root
    for _ in range(squarings):
        R = R @ R
    # Each squaring doubles what rounding took from orthogonality; one Newton-Schulz step towards the nearest orthogonal
    # matrix, R (3 I - R^T R) / 2, gives it back. float32 results round it away anyway.
    return R if dtype == torch.float32 else torch.baddbmm(R, R, R.mT @ R, beta=1.5, alpha=-0.5)


def _pull_back(w: Workings, grad: Tensor, squarings: int) -> Tensor:
    A, B, B2, B3 = w.A, w.B, w.B2, w.B3
    G = grad.double()
    if squarings:
        roots = [_polynomial(w.remainders[0], B, B2, B3).baddbmm_(A, w.Q)]
        for _ in range(squarings - 1):
            roots.append(roots[-1] @ roots[-1])
        for R in reversed(roots):  # d(R R) = dR R + R dR
            G = (R.mT @ G).baddbmm_(G, R.mT)
    # P and Q are symmetric and A Q is skew: P sees the symmetric half of G, A Q the skew half K.
    P_bar = (G + G.mT).mul_(0.5)
    K = G - P_bar
    KA = K @ A
    Q_bar = (KA + KA.mT).mul_(-0.5)  # the symmetric half of A^T K
    bars = torch.stack([_dots(P_bar, B, B2, B3), _dots(Q_bar, B, B2, B3)])  # (2, 4, n): by P's and Q's coefficients
    chi_bar = _quotient_step(w.chi, w.quotients, bars)
    traces = _trace_weights(w.chi, chi_bar)[:, :, None, None]
    # By B with fixed coefficients: sum_k c_k sum_{i+j=k-1} B^i X B^j = T0 + S + S^T, where
    # S = B (T1 + B T2 + (T2 B)/2), T_k = c_(k+1) X summed over P and Q. The traces add polynomials of B to the same.
    T0, T1, T2 = (
        (P_bar * p).addcmul_(Q_bar, q)
        for p, q in zip(*w.remainders[:, 1:, :, None, None].unbind(), strict=True)  # each (n, 1, 1)
    )
    U = B @ T2
    Z = T1.add_(U).add_(U.mT, alpha=0.5).addcmul_(B, traces[2] / 2).addcmul_(B2, traces[3] / 2)
    Z.diagonal(dim1=-2, dim2=-1).add_(traces[1].squeeze(-1) / 2)
    S = B @ Z
    B_bar = T0.add_(S).add_(S.mT)
    B_bar.diagonal(dim1=-2, dim2=-1).add_(traces[0].squeeze(-1))
    # d(A A) = dA A + A dA: both terms give the generators the same.
    A_bar = (K @ w.Q).baddbmm_(B_bar, A, alpha=-2)
    out = A_bar.view(-1, BLOCK * BLOCK) @ generators(grad.device, torch.float64).mT
    return out.mul_(0.5**squarings).to(grad.dtype)


def _dots(X: Tensor, B: Tensor, B2: Tensor, B3: Tensor) -> Tensor:
    """(4, n): the inner products of X with I, B, B^2, B^3."""
    flat = X.flatten(1)
    trace = X.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.stack([trace, *(torch.linalg.vecdot(flat, Y.flatten(1)) for Y in (B, B2, B3))])


def _quotient_step(chi: Tensor, quotients: Tensor, bars: Tensor) -> Tensor:
    """dL/d(z^4 mod chi) (4, n): a change d of it changes a remainder by d(z) quotient(z) mod chi."""
    q, out = quotients, []
    for power in range(4):
        out.append((bars * q).sum((0, 1)))
        if power < 3:
            shifted = torch.cat([torch.zeros_like(q[:, :1]), q[:, :3]], dim=1)
            q = torch.addcmul(shifted, chi, q[:, 3:])
    return torch.stack(out)


def _trace_weights(chi: Tensor, bar: Tensor) -> Tensor:
    """(4, n): w_j with dL = sum_j w_j tr(B^(j-1) dB), by Newton's identities, de_k/dp_j = (-1)^(j-1) e_(k-j) / j."""
    c, b = chi, bar
    return 0.5 * torch.stack(
        [
            b[3] - b[0] * c[1] - b[1] * c[2] - b[2] * c[3],
            b[2] - b[0] * c[2] - b[1] * c[3],
            b[1] - b[0] * c[3],
            b[0],
        ]
    )
