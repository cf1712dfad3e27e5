"""exp of 8x8 skew matrices, in float64, with its own backward; `rotation.exp_so8` is its public face.

exp(A) = P(B) + A Q(B) with B = A A, P = sum z^k/(2k)! and Q = sum z^k/(2k+1)! modulo chi, the polynomial of degree 4
that vanishes at B (Cayley, Hamilton). Angles too large for the series are halved first, and the result is squared back
(Moler, Van Loan 2003). docs/core.md derives both, the backward by reverse mode, and the errors.
Shapes: theta (n, 28), A, B, R (n, 8, 8), polynomials mod chi (..., 4, n), lowest coefficient first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from so8t_core.errors import InputError

BLOCK = 8
PARAMETERS = BLOCK * (BLOCK - 1) // 2  # 28
LARGEST = 1e4  # rad; each doubling of the angle doubles the rounding error, here to 1e4 * 1e-16 = 1e-12
CHUNK = 2048  # blocks at a time on a CPU: one megabyte for each tensor, and few calls

# By theta's dtype: pairs of the largest |theta| and the terms of the series that it needs. Beyond the last pair, A is
# halved. The remaining terms are far below the rounding (docs/core.md, "How many terms").
TERMS = {torch.float32: ((2.0, 10), (6.5, 17)), torch.float64: ((2.0, 14),)}


@cache
def generators(device: torch.device) -> Tensor:
    """(28, 64) float64: row k is the basis matrix of so(8) with +1 at (i, j) and -1 at (j, i), flattened."""
    i, j = torch.triu_indices(BLOCK, BLOCK, 1, device=device)
    E = torch.zeros(PARAMETERS, BLOCK, BLOCK, dtype=torch.float64, device=device)
    E[torch.arange(PARAMETERS), i, j] = 1.0
    return (E - E.mT).reshape(PARAMETERS, BLOCK * BLOCK)


@cache
def _series(terms: int, device: torch.device) -> Tensor:
    """(2, terms) float64: 1/(2k)! and 1/(2k+1)!."""
    rows = [[1.0 / math.factorial(2 * k + odd) for k in range(terms)] for odd in (0, 1)]
    return torch.tensor(rows, dtype=torch.float64, device=device)


class Plan(NamedTuple):
    """The way to compute exp for a theta of some length."""

    squarings: int
    terms: int


def plans(thetas: Sequence[Tensor], names: Sequence[str] = ()) -> list[Plan]:
    """Choose how to compute each exp; waits for the device once for all thetas.

    |theta|_2 bounds every plane's angle: |A|_F^2 = 2 |theta|^2.

    Raises:
        InputError: (a ValueError) NaN, Inf, or a block beyond LARGEST; the message starts with the name, if given.
    """
    found = []
    for k, length in enumerate(_lengths(thetas)):
        if not length <= LARGEST:
            what = (
                f"is {length:.3g} rad long, the limit is {LARGEST:g}" if math.isfinite(length) else "has a NaN or Inf"
            )
            where = f"{names[k]}: " if names else ""
            raise InputError(f"{where}theta {what}; lower the learning rate, or start again from an earlier checkpoint")
        choices = TERMS[thetas[k].dtype]
        reach, most = choices[-1]
        squarings = math.ceil(math.log2(length / reach)) if length > reach else 0
        found.append(Plan(squarings, next((terms for far, terms in choices if length <= far), most)))
    return found


def _lengths(thetas: Sequence[Tensor]) -> list[float]:
    """The length of the longest block of each theta."""
    longest = [
        torch.linalg.vector_norm(t, dim=-1, dtype=torch.float64).max() if t.numel() else torch.zeros(()).double()
        for t in (theta.detach() for theta in thetas)
    ]
    return torch.stack([length.to(longest[0].device) for length in longest]).tolist() if longest else []


class Workings(NamedTuple):
    """Values of the forward that the backward needs, for the scaled A: five matrices and 20 numbers for each block."""

    A: Tensor
    B: Tensor
    B2: Tensor
    B3: Tensor
    Q: Tensor  # (n, 8, 8)
    chi: Tensor  # (4, n): z^4 mod chi
    remainders: Tensor  # (2, 4, n): P and Q
    quotients: Tensor  # (2, 4, n): (series - remainder) / chi, mod chi: how P and Q change with chi

    def of(self, blocks: slice) -> Workings:
        """The workings of some blocks of the batch."""
        matrices, polynomials = self[:5], self[5:]
        return Workings(*(M[blocks] for M in matrices), *(p[..., blocks] for p in polynomials))


Batch = tuple[list[tuple[int, int]], int, Workings]  # [(index of a theta, number of its blocks)], squarings, workings


@dataclass(frozen=True, eq=False)
class Evaluated:
    """exp of several thetas, and the workings that the backward needs."""

    R: list[Tensor]  # (n_k, 8, 8) each, in its theta's dtype
    batches: list[Batch]  # empty if the workings were not asked for

    def connected(self, thetas: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """R (n, 8, 8) of each, with a graph to every theta that is given and trained; one node serves all thetas."""
        out: tuple[Tensor, ...] = Exponential.apply(self, *thetas)  # type: ignore[no-untyped-call]
        return out


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a backward refuse create_graph. `once_differentiable` would not refuse it where only saved values carry the
    second derivative: the gradient would lack that part."""

    @wraps(backward)
    def guarded(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("SO8T's rotation is differentiable once: leave out create_graph=True")
        return backward(ctx, *grads)

    return guarded


class Exponential(torch.autograd.Function):
    """(Evaluated, each theta (n_k, 28) or None) -> each R (n_k, 8, 8), connected to its theta.

    The backward uses the batches of the evaluation. It saves nothing with autograd, so that several backward passes may
    each run it, with the gradients of some of the R.
    """

    @staticmethod
    def forward(ctx: Any, known: Evaluated, *thetas: Tensor | None) -> tuple[Tensor, ...]:
        ctx.known = known
        ctx.set_materialize_grads(False)
        return tuple(R.detach() for R in known.R)  # new tensors with the same values: autograd marks what it returns

    @staticmethod
    @once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        rest = [g if wanted else None for g, wanted in zip(grads, ctx.needs_input_grad[1:], strict=True)]
        pulled: list[list[Tensor]] = [[] for _ in grads]
        for owners, squarings, workings in ctx.known.batches:
            pieces, start = [], 0
            for owner, count in owners:
                R_bar = rest[owner]
                if R_bar is not None:
                    pieces.append((owner, slice(start, start + count), R_bar[:count]))
                    rest[owner] = R_bar[count:]
                start += count
            if len(pieces) == len(owners):
                together = _pull_back(workings, torch.cat([part for _, _, part in pieces]), squarings)
                parts = torch.split(together, [count for _, count in owners])
            else:
                parts = tuple(_pull_back(workings.of(blocks), part, squarings) for _, blocks, part in pieces)
            for (owner, _, _), theta_bar in zip(pieces, parts, strict=True):
                pulled[owner].append(theta_bar)
        return None, *(torch.cat(parts) if parts else None for parts in pulled)


def evaluate(thetas: Sequence[Tensor], *, workings: bool, names: Sequence[str] = ()) -> Evaluated:
    """exp of several thetas (n_k, 28), float32 or float64, in a few large batches that do not change any result.

    Raises:
        InputError: see `plans`.
    """
    planned = plans(thetas, names)
    batches: dict[Any, list[list[tuple[int, Tensor]]]] = {}  # for each plan: batches of (owner, blocks)
    for owner, theta in enumerate(thetas):
        alike = batches.setdefault((planned[owner], theta.dtype, theta.device), [[]])
        most = CHUNK if theta.device.type == "cpu" else max(1, len(theta) * len(thetas))
        for piece in torch.split(theta.detach(), most):
            if sum(len(other) for _, other in alike[-1]) + len(piece) > most:
                alike.append([])
            alike[-1].append((owner, piece))
    results: list[list[Tensor]] = [[] for _ in thetas]
    kept = []
    for (plan, _, _), alike in batches.items():
        for batch in alike:
            R, known = _exponential(torch.cat([piece for _, piece in batch]), plan, workings)
            owners = [(owner, len(piece)) for owner, piece in batch]
            for (owner, _), part in zip(owners, torch.split(R, [count for _, count in owners]), strict=True):
                results[owner].append(part)
            if known is not None:
                kept.append((owners, plan.squarings, known))
    return Evaluated([parts[0] if len(parts) == 1 else torch.cat(parts) for parts in results], kept)


def _exponential(theta: Tensor, plan: Plan, workings: bool) -> tuple[Tensor, Workings | None]:
    # Everything is float64 from here, and mixed precision leaves float64 alone.
    A = (theta.double() @ generators(theta.device)).mul_(0.5**plan.squarings).view(-1, BLOCK, BLOCK)
    B = A @ A
    B2 = B @ B
    B3 = B @ B2
    chi = _characteristic(B, B2)
    polynomials = _reduced_series(chi, _series(plan.terms, theta.device), quotients=workings)  # (2, 4 or 8, n)
    P = _polynomial(polynomials[0], B, B2, B3)
    Q = _polynomial(polynomials[1], B, B2, B3)
    R = _finish(P.baddbmm_(A, Q), plan.squarings, theta.dtype).to(theta.dtype)
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

    A product with z moves every coefficient up by one. The coefficient that leaves the top multiplies z^4 mod chi, and
    the product is added. The coefficient that leaves the remainder also enters the quotient: one shift does both.
    """
    halves, n = 2 if quotients else 1, chi.shape[1]
    terms = series.shape[1]
    powers = chi.new_zeros(terms, 1 + 4 * halves, n)  # z^k; row 0 stays zero, for the shift
    for k in range(4):
        powers[k, 1 + k] = 1.0
    for k in range(4, terms):
        shifted = powers[k - 1, :-1].view(halves, 4, n)
        tops = powers[k - 1, 4::4].unsqueeze(1)  # (halves, 1, n)
        torch.addcmul(shifted, chi, tops, out=powers[k, 1:].view(halves, 4, n))
    return (series @ powers.flatten(1)).view(2, 1 + 4 * halves, n)[:, 1:]


def _polynomial(c: Tensor, B: Tensor, B2: Tensor, B3: Tensor) -> Tensor:
    """c0 I + c1 B + c2 B^2 + c3 B^3; c (4, n), or more rows than the four that are read."""
    c0, c1, c2, c3 = c[:4, :, None, None].unbind()
    out = (B * c1).addcmul_(B2, c2).addcmul_(B3, c3)
    out.diagonal(dim1=-2, dim2=-1).add_(c0.squeeze(-1))
    return out


def _finish(root: Tensor, squarings: int, dtype: torch.dtype) -> Tensor:
    R = root
    for _ in range(squarings):
        R = R @ R
    # One Newton-Schulz step, R (3 I - R^T R) / 2, restores the orthogonality that rounding lost; float32 needs no step.
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
    # The names and steps are those of docs/core.md, "The backward".
    P_bar = (G + G.mT).mul_(0.5)
    K = G - P_bar
    KA = K @ A
    Q_bar = (KA + KA.mT).mul_(-0.5)  # the symmetric half of A^T K
    bars = torch.stack([_dots(P_bar, B, B2, B3), _dots(Q_bar, B, B2, B3)])  # (2, 4, n): by P's and Q's coefficients
    chi_bar = _quotient_step(w.chi, w.quotients, bars)
    traces = _trace_weights(w.chi, chi_bar)[:, :, None, None]
    # T0 + S + S^T, T_k = c_(k+1) X summed over P and Q; the traces add polynomials of B to the same.
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
    A_bar = (K @ w.Q).baddbmm_(B_bar, A, alpha=-2)
    out = A_bar.view(-1, BLOCK * BLOCK) @ generators(grad.device).mT
    return out.mul_(0.5**squarings).to(grad.dtype)


def _dots(X: Tensor, B: Tensor, B2: Tensor, B3: Tensor) -> Tensor:
    """(4, n): the inner products of X with I, B, B^2, B^3."""
    flat = X.flatten(1)
    trace = X.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.stack([trace, *(torch.linalg.vecdot(flat, Y.flatten(1)) for Y in (B, B2, B3))])


def _quotient_step(chi: Tensor, quotients: Tensor, bars: Tensor) -> Tensor:
    """dL/d(z^4 mod chi) (4, n): a change d of it changes a remainder by d(z) quotient(z) mod chi."""
    times = chi.new_zeros(4, 2, 5, chi.shape[1])  # z^k quotient mod chi; row 0 stays zero, see `_reduced_series`
    times[0, :, 1:] = quotients
    for k in range(1, 4):
        torch.addcmul(times[k - 1, :, :4], chi, times[k - 1, :, 4:], out=times[k, :, 1:])
    return (bars * times[:, :, 1:]).sum((1, 2))


def _trace_weights(chi: Tensor, bar: Tensor) -> Tensor:
    """(4, n): w_j with dL = sum_j w_j tr(B^(j-1) dB), by Newton's identities, de_k/dp_j = (-1)^(j-1) e_(k-j) / j."""
    _, c1, c2, c3 = chi.unbind()
    b0, b1, b2, b3 = bar.unbind()
    return 0.5 * torch.stack([b3 - b0 * c1 - b1 * c2 - b2 * c3, b2 - b0 * c2 - b1 * c3, b1 - b0 * c3, b0])
