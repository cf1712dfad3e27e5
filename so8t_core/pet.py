"""PET: a penalty on the second difference of the hidden states over time, and its three-phase schedule.

d2[t] = h[t+2] - 2 h[t+1] + h[t]; penalty = mean of d2^2 (or of Huber(d2)) over the triples whose three tokens are all
real: not padding, and of the same sequence where several are packed into a row. Loss = task + lambda(step) * penalty.
Shapes: h (B, T, C), mask (B, T), penalty a float32 scalar. Source: docs/core.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def segments_of(position_ids: Tensor) -> Tensor:
    """Number the sequences of packed rows: position_ids (B, T) -> (B, T) integers, a new number wherever position_ids
    do not rise by one.
    """
    begins = torch.zeros_like(position_ids)
    begins[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return begins.cumsum(dim=1)


def valid_triples(
    shape: tuple[int, int], *, mask_BT: Tensor | None = None, segments_BT: Tensor | None = None
) -> Tensor:
    """Where three tokens in a row are real and of one sequence: (B, T) -> (B, max(T - 2, 0)) bool.

    Args:
        mask_BT: (B, T), non-zero for real tokens; None = all real.
        segments_BT: (B, T) integers, the sequence that a token belongs to; None = one sequence in each row.

    Raises:
        ValueError: a mask or segment shape other than (B, T).
    """
    for name, other in (("mask", mask_BT), ("segments", segments_BT)):
        if other is not None and tuple(other.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(other.shape)}, the hidden states need {shape}")
    given = [other for other in (mask_BT, segments_BT) if other is not None]
    valid = torch.ones(shape[0], max(shape[1] - 2, 0), dtype=torch.bool, device=given[0].device if given else None)
    if mask_BT is not None:
        real = mask_BT.bool()
        valid &= real[:, 2:] & real[:, 1:-1] & real[:, :-2]
    if segments_BT is not None:
        valid &= (segments_BT[:, 2:] == segments_BT[:, 1:-1]) & (segments_BT[:, 1:-1] == segments_BT[:, :-2])
    return valid


def pet_penalty(
    h_BTC: Tensor, mask_BT: Tensor | None = None, *, segments_BT: Tensor | None = None, huber_delta: float | None = None
) -> Tensor:
    """Mean of d2^2 (or Huber with `huber_delta`) over valid triples and channels; 0 when there is no valid triple.

    Args:
        h_BTC: hidden states (B, T, C), any float dtype; the arithmetic is float32.
        mask_BT, segments_BT: see `valid_triples`.

    Raises:
        ValueError: a mask or segment shape other than (B, T), or a Huber delta that is not positive.
    """
    B, T, C = h_BTC.shape
    valid = valid_triples((B, T), mask_BT=mask_BT, segments_BT=segments_BT).to(h_BTC.device)
    if huber_delta is not None and not huber_delta > 0:
        raise ValueError(f"huber_delta must be positive, got {huber_delta}")
    if T < 3:
        return h_BTC[:, :0].float().sum()  # 0 with a graph, whatever the padding holds
    h = h_BTC.float()
    d2 = h[:, 2:] - 2 * h[:, 1:-1] + h[:, :-2]  # (B, T-2, C)
    # Zero first, so that a non-finite value at a padded position cannot reach the sum as 0 * inf.
    d2 = d2.masked_fill(~valid.unsqueeze(-1), 0.0)
    cost = (
        d2.square()
        if huber_delta is None
        else F.huber_loss(d2, torch.zeros_like(d2), reduction="none", delta=huber_delta)
    )
    return cost.sum() / (valid.sum().clamp(min=1) * C)


@dataclass(frozen=True)
class PETSchedule:
    """lambda(step): constant in each of three phases that take 20 %, 40 % and 40 % of the run."""

    warmup: float = 0.01
    main: float = 0.05
    anneal: float = 0.1
    shares: tuple[float, float] = (0.2, 0.6)  # where main and anneal begin

    def __post_init__(self) -> None:
        if not all(0 <= weight < math.inf for weight in (self.warmup, self.main, self.anneal)):
            raise ValueError(f"PET weights must be finite and >= 0: {self.warmup}, {self.main}, {self.anneal}")
        if not 0 <= self.shares[0] <= self.shares[1] <= 1:
            raise ValueError(f"PET phases must begin in order within the run: {self.shares}")

    def __call__(self, step: int, total_steps: int) -> float:
        """lambda for optimiser step `step` (0-based) of `total_steps`."""
        share = step / max(total_steps, 1)
        if share < self.shares[0]:
            return self.warmup
        return self.main if share < self.shares[1] else self.anneal
