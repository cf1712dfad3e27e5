"""Estimates the rotation between a tensor and its expected values, by least squares per block of 8.

To first order W' exp(A) = W' + W' A, so A (antisymmetric) minimises |W A - D|, D = found - expected. Setting the
antisymmetric part of W^T (W A - D) to zero gives the Lyapunov equation S A + A S = M - M^T, S = W^T W, M = W^T D, which
in S = U diag(s) U^T reads A'_ij = (M' - M'^T)_ij / (s_i + s_j). Quantisation noise averages out over the rows: with
relative noise r and `out` rows an angle has a standard error near r / sqrt(2 out). Standard errors are
heteroscedasticity-consistent: Var A'_ij = sum_rows (x_i e_j - x_j e_i)^2 / (s_i + s_j)^2, X = W U, E = (D - W A) U.
Shapes: W, D (out, in), in = 8 n; A (n, 8, 8).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BLOCK = 8
Array = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
_UPPER = np.triu_indices(BLOCK, 1)
# standard errors of a single angle; a model of 100 layers has 1e6 angles: P(|z| > 6.5) 1e6 = 8e-5
SINGLE = 6.5
# Quantisation noise depends slightly on the weights: healthy SmolLM2 tensors reached 10 (llama.cpp's quantiser) and
# 13 (a random importance matrix with a log-normal spread of 1.5); 5e-4 rad in every plane give 35 at Q5_0
TOGETHER = 20.0  # excess of the sum of squares, in its standard deviations


@dataclass(frozen=True)
class Residual:
    """The rotation that is left over in one tensor."""

    rms: float  # rad, root mean square of all planes' angles, minus their standard errors
    largest: float  # rad, angle of the plane with the largest |z|
    standard_error: float  # rad, median over the planes; the smallest detectable single angle is about 6.5 times this
    z_single: float  # the largest |angle| / standard error
    z_together: float  # (sum of z^2 - planes) / sqrt(2 planes)
    block: int  # block of the largest: channels 8 block .. 8 block + 7

    @property
    def detected(self) -> bool:
        return self.z_single > SINGLE or self.z_together > TOGETHER


def residual_rotation(expected: Array, difference: Array) -> Residual | None:
    """The rotation in `difference` = found - expected, both (out, in); None if in is no multiple of 8, or out < 8."""
    out, width = expected.shape
    if width % BLOCK or out < BLOCK:
        return None
    W = _blocks(expected)  # (n, out, 8)
    D = _blocks(difference)
    Wt = W.transpose(0, 2, 1)
    S, M = Wt @ W, Wt @ D  # (n, 8, 8)
    s, U = np.linalg.eigh(S)
    sums = s[:, :, None] + s[:, None, :]
    sums = np.where(sums > 0, sums, np.inf)  # a block of zeros gives zero angles
    Ut = U.transpose(0, 2, 1)
    turned = Ut @ (M - M.transpose(0, 2, 1)) @ U / sums
    X, E = W @ U, (D - W @ (U @ turned @ Ut)) @ U
    XE = X * E
    cross = XE.transpose(0, 2, 1) @ XE
    squares = (X * X).transpose(0, 2, 1) @ (E * E)
    variance = np.maximum(squares + squares.transpose(0, 2, 1) - 2 * cross, 0) / sums**2
    angles = turned[:, *_UPPER]  # (n, 28), in the eigenvectors' planes: the rotation's size is the same there
    errors = np.sqrt(variance[:, *_UPPER])
    floor = np.finfo(np.float32).eps / np.sqrt(2 * out)  # float32 inputs cannot show a smaller angle
    z = np.abs(angles) / np.maximum(errors, floor)
    block, plane = np.unravel_index(int(z.argmax()), z.shape)
    square = float(np.mean(angles**2) - np.mean(errors**2))
    return Residual(
        rms=float(np.sqrt(max(square, 0.0))),
        largest=float(abs(angles[block, plane])),
        standard_error=float(np.median(np.maximum(errors, floor))),
        z_single=float(z.max()),
        z_together=float((np.sum(z**2) - z.size) / np.sqrt(2 * z.size)),
        block=int(block),
    )


def _blocks(values: Array) -> Float64:
    """(out, 8 n) -> (n, out, 8) in float64."""
    out, width = values.shape
    blocks: Float64 = np.ascontiguousarray(
        values.astype(np.float64).reshape(out, width // BLOCK, BLOCK).transpose(1, 0, 2)
    )
    return blocks
