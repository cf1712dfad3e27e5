"""RotationGate: the rotation of one layer, y_k = R_k x_k on the input of `o_proj`, and its bake W' = W @ R.

It owns theta (n, 28) in float32, whatever dtype the model is cast to: at bfloat16's 8 bits an angle below 0.004 rad
beside 1 would vanish. R (n, 8, 8) is cached while theta does not change and no gradient is wanted.
Source: DESIGN: o_proj(gate(x)) = (W @ blockdiag(R)) x, hence W'[:, 8k:8k+8] = W[:, 8k:8k+8] @ R_k.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from so8t_core.errors import InputError
from so8t_core.exponential import BLOCK, PARAMETERS
from so8t_core.rotation import exp_so8, rotate_blocks


class RotationGate(nn.Module):
    """n = features / 8 learned rotations. forward: x (..., features) -> (..., features).

    Raises:
        ValueError: features is not a positive multiple of 8 (the message names the layer).
    """

    def __init__(self, features: int, *, init_scale: float = 0.0, layer: str = "this layer") -> None:
        super().__init__()
        if features <= 0 or features % BLOCK:
            raise ValueError(
                f"{layer}: {features} input features are not a positive multiple of {BLOCK}; leave it out of `layers`"
            )
        self.layer = layer
        theta = torch.zeros(features // BLOCK, PARAMETERS, dtype=torch.float32)
        self.theta = nn.Parameter(theta.normal_(std=init_scale) if init_scale else theta)
        self._cache: tuple[Any, Tensor] | None = None  # (what theta was, its R)

    def rotation(self) -> Tensor:
        """R (n, 8, 8), float32; with a graph when theta is being trained.

        Raises:
            InputError: theta holds a NaN, an Inf or an absurd angle (the message names the layer).
        """
        if torch.is_grad_enabled() and self.theta.requires_grad:
            self._cache = None  # training: an optimiser may write theta without raising its version
            return self._exp(self.theta)
        if self._cache is None or not self._is_current(self._cache[0]):
            with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not serve a later backward
                theta = self.theta.detach().clone()
                self._cache = (theta if theta.device.type == "cpu" else self._stamp(), self._exp(theta))
        return self._cache[1]

    def _exp(self, theta: Tensor) -> Tensor:
        try:
            return exp_so8(theta)
        except InputError as error:
            raise InputError(f"{self.layer}: {error}") from None

    def _is_current(self, known: Any) -> bool:
        """On the CPU theta's values decide (even `theta.data` edits count); elsewhere its version, to avoid a sync."""
        if isinstance(known, Tensor):
            return known.device == self.theta.device and torch.equal(known, self.theta)
        return bool(known == self._stamp())

    def _stamp(self) -> tuple[Any, ...]:
        return (self.theta.data_ptr(), self.theta._version, self.theta.device)

    def forward(self, x: Tensor) -> Tensor:
        return rotate_blocks(x, self.rotation())

    def extra_repr(self) -> str:
        return f"blocks={self.theta.shape[0]}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotationGate:
        exact = self.theta.detach()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._cache = None
        if self.theta.dtype.itemsize < torch.float32.itemsize:  # .half() and the like: keep float32, from exact values
            self.theta.data = exact.to(self.theta.device, torch.float32)
        return self


def rotate_weight(W_OI: Tensor, theta: Tensor) -> Tensor:
    """W @ blockdiag(exp(theta)) in float64: W (out, 8 n), theta (n, 28) -> (out, 8 n) float64."""
    return rotate_rows(W_OI, exp_so8(theta.detach().double()))


def rotate_rows(W_OI: Tensor, R: Tensor) -> Tensor:
    """W @ blockdiag(R) in float64, for any number of rows: W (out, 8 n), R (n, 8, 8) float64 -> (out, 8 n) float64."""
    W_NOK = W_OI.detach().double().reshape(W_OI.shape[0], -1, BLOCK).transpose(0, 1)  # (n, out, 8)
    return torch.bmm(W_NOK, R).transpose(0, 1).reshape(W_OI.shape)
