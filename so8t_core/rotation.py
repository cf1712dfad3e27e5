"""Rotations of SO(8): exponential, logarithm and their block-wise application.

A block's parameters are the strictly upper triangle of a skew-symmetric A in so(8), 28 numbers in the row-major order
of `torch.triu_indices(8, 8, 1)`: A[i, j] = +theta, A[j, i] = -theta. R = exp(A) is orthogonal with determinant +1, and
theta = 0 gives exactly the identity. A rotation of R^8 turns up to four orthogonal planes; its angles are the
imaginary parts of A's eigenvalues.
Shapes: theta (..., 28), A and R (..., 8, 8), x (..., D) with D = 8 n.
Source: `exponential` for exp, `block_product` for its application; the real Schur form of a normal matrix (Golub and
Van Loan, section 7.4) for log.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg import schur
from torch import Tensor

from so8t_core.block_product import BlockProduct, Memo
from so8t_core.exponential import BLOCK, PARAMETERS, evaluate


def skew(theta: Tensor) -> Tensor:
    """theta (..., 28) -> A (..., 8, 8) with A^T = -A.

    Raises:
        ValueError: the last dimension is not 28.
    """
    if theta.shape[-1:] != (PARAMETERS,):
        raise ValueError(f"theta must have shape (..., {PARAMETERS}), got {tuple(theta.shape)}")
    i, j = torch.triu_indices(BLOCK, BLOCK, 1, device=theta.device)
    upper = theta.new_zeros(*theta.shape[:-1], BLOCK, BLOCK)
    upper[..., i, j] = theta
    return upper - upper.mT


def upper_triangle(A: Tensor) -> Tensor:
    """A (..., 8, 8), skew-symmetric -> theta (..., 28); the inverse of `skew`."""
    i, j = torch.triu_indices(BLOCK, BLOCK, 1, device=A.device)
    return A[..., i, j]


def exp_so8(theta: Tensor) -> Tensor:
    """theta (..., 28), radians -> R = exp(A) (..., 8, 8), same dtype; differentiable once.

    float32 and float64 are computed in float64: at any angle, a float32 R is within one unit in the last place of the
    correctly rounded R. Coarser dtypes go through float32.

    Raises:
        ValueError: the last dimension is not 28; a NaN, an Inf, or a block longer than 1e4 rad.
    """
    if theta.shape[-1:] != (PARAMETERS,):
        raise ValueError(f"theta must have shape (..., {PARAMETERS}), got {tuple(theta.shape)}")
    exact = theta if theta.dtype == torch.float64 else theta.float()
    flat = exact.reshape(-1, PARAMETERS)
    (R,) = evaluate([flat], workings=torch.is_grad_enabled() and flat.requires_grad).connected([flat])
    return R.reshape(*theta.shape[:-1], BLOCK, BLOCK).to(theta.dtype)


def log_so8(R: Tensor) -> Tensor:
    """R (..., 8, 8) in SO(8) -> theta (..., 28) with every plane's angle in [0, pi]; exp_so8 inverts it.

    Computed in float64 on the CPU from each matrix's real Schur form, returned in R's dtype and device; not
    differentiable. At an angle of exactly pi the logarithm is not unique; one of them is returned.

    Raises:
        ValueError: wrong shape, not orthogonal within the dtype's accuracy, or determinant -1.
    """
    if R.shape[-2:] != (BLOCK, BLOCK):
        raise ValueError(f"R must have shape (..., {BLOCK}, {BLOCK}), got {tuple(R.shape)}")
    matrices = R.detach().to("cpu", torch.float64)
    error = orthogonality_error(matrices).max().item() if matrices.numel() else 0.0
    bound = 1e3 * torch.finfo(R.dtype).eps  # a chain of products loses a few hundred eps, a wrong matrix far more
    if not error <= bound:
        raise ValueError(f"R is not orthogonal: max |R^T R - I| = {error:.3g}, bound {bound:.3g}")
    if (torch.linalg.det(matrices) < 0).any():
        raise ValueError("R has determinant -1: a reflection has no logarithm in so(8)")
    flat = matrices.reshape(-1, BLOCK, BLOCK).numpy()
    logs = np.stack([_log_one(block) for block in flat]) if len(flat) else flat
    return upper_triangle(torch.from_numpy(logs).reshape(matrices.shape)).to(R)


def _log_one(R: np.ndarray) -> np.ndarray:
    """Logarithm of one rotation: R = Z T Z^T with T made of 2x2 rotations and of +1/-1 entries."""
    T, Z = schur(R, output="real")
    L = np.zeros_like(T)
    flipped = []  # positions of eigenvalue -1: an even number, as det is +1; any two span a plane turned by pi
    k = 0
    while k < BLOCK:
        # A 2x2 block; an entry below 1e-14 may be the mere rounding of an angle 0 or pi.
        if k + 1 < BLOCK and abs(T[k + 1, k]) > 1e-14:
            angle = np.arctan2(T[k + 1, k] - T[k, k + 1], T[k, k] + T[k + 1, k + 1])
            L[k + 1, k], L[k, k + 1] = angle, -angle
            k += 2
        else:
            if T[k, k] < 0:
                flipped.append(k)
            k += 1
    for p, q in zip(flipped[::2], flipped[1::2], strict=True):
        L[q, p], L[p, q] = np.pi, -np.pi
    return np.asarray(Z @ L @ Z.T)


def rotate_blocks(x: Tensor, R: Tensor, *, memo: Memo | None = None) -> Tensor:
    """y_k = R_k x_k for every block k of 8 channels. x (..., D), R (D/8, 8, 8) -> (..., D) in x's dtype.

    A small rotation survives a bfloat16 x, also under autocast; `block_product` says in which dtype it is computed. A
    caller that applies the same R many times can pass an empty dict, which then keeps the tiles made from R.

    Raises:
        ValueError: R is not (n, 8, 8), or D is not 8 n.
    """
    if R.ndim != 3 or R.shape[1:] != (BLOCK, BLOCK):
        raise ValueError(f"R must have shape (n, {BLOCK}, {BLOCK}), got {tuple(R.shape)}")
    n = R.shape[0]
    if x.shape[-1] != n * BLOCK:
        raise ValueError(f"x has {x.shape[-1]} channels, but {n} rotations turn {n * BLOCK}")
    y: Tensor = BlockProduct.apply(x, R, {} if memo is None else memo)  # type: ignore[no-untyped-call]
    return y


def orthogonality_error(R: Tensor) -> Tensor:
    """max |R^T R - I| of each matrix: R (..., 8, 8) -> (...)."""
    eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    return (R.mT @ R - eye).abs().amax(dim=(-2, -1))


def plane_angles(theta: Tensor) -> Tensor:
    """The four plane angles |a| of each block, largest first: theta (..., 28) -> (..., 4), radians, float64."""
    A = skew(theta.detach().double())
    eigenvalues: Tensor = torch.linalg.eigvalsh(1j * A)  # ascending, in pairs -a, +a
    return eigenvalues[..., BLOCK // 2 :].flip(-1).clamp(min=0)
