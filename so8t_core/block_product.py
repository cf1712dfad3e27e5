"""y_k = R_k x_k for every block k of 8 channels, and its gradient; `rotation.rotate_blocks` is its public face.

Neighbouring blocks go into one block-diagonal tile, because wider products are faster. bfloat16 x on a processor that
multiplies bfloat16: y = x + x (R - I)^T, with an error of at most 2^-8 (|y| + 2 |R - I| |x|). Every other product is
computed in the finer dtype of x and R, a few rows at a time so that they stay in the cache. Only R and x, in x's dtype,
are kept for the backward. docs/core.md, "Turning x", gives the reasons.
Shapes: x, y, g (..., 8 n), R (n, 8, 8); T rows = all leading dimensions; tiles (8 n / W, W, W).
"""

from __future__ import annotations

import math
import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor

from so8t_core.exponential import BLOCK, once
from so8t_core.torch_private import cpu_multiplies_bfloat16

ELEMENTS = 393216  # elements of x turned at a time on a CPU: 1.5 MB of float32; 128 rows at 3072 channels
NARROW_ELEMENTS = 1 << 19  # the same for bfloat16: 1 MB
_FINE, _NARROW = 2, 4  # blocks in a tile: the fastest of 1, 2, 4 and 8 for float32 and for bfloat16
Memo = dict[Any, Tensor]  # tiles made from one R, used again as long as its values are the same


class BlockProduct(torch.autograd.Function):
    """x (..., 8 n), R (n, 8, 8) -> y in x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, R: Tensor, memo: Memo) -> Tensor:
        ctx.save_for_backward(x, R)
        ctx.memo = memo
        return _times(x, R, memo)

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, R = ctx.saved_tensors
        x_bar = _times(grad, R, ctx.memo, back=True) if ctx.needs_input_grad[0] else None
        return x_bar, _outer(grad, x, R) if ctx.needs_input_grad[1] else None, None


def _times(x: Tensor, R: Tensor, memo: Memo, *, back: bool = False) -> Tensor:
    """R_k x_k for every block, with `back` R_k^T x_k: x (..., 8 n), R (n, 8, 8) -> (..., 8 n) in x's dtype."""
    dtype = torch.promote_types(x.dtype, R.dtype)
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(x, memory_format=torch.contiguous_format)  # no view: the caller may change it in place
    y = out.view(rows.shape)
    with torch.autocast(x.device.type, enabled=False):
        if len(rows) == 1:  # decoding: a tile would take longer to build than to use
            M = R if back else R.mT  # row form: x R^T
            y.view(-1, 1, BLOCK).copy_(torch.bmm(rows.view(-1, 1, BLOCK).to(dtype), M.to(dtype)))
        elif x.dtype == torch.bfloat16 != dtype and _multiplies_bfloat16(x.device):
            if x.dtype not in memo:
                memo[x.dtype] = _tiles(R.mT - torch.eye(BLOCK, dtype=R.dtype, device=R.device), _NARROW).to(x.dtype)
            _times_narrow(rows, memo[x.dtype].mT if back else memo[x.dtype], out=y)
        else:
            if dtype not in memo:
                memo[dtype] = _tiles(R.mT.to(dtype), _FINE)
            _times_fine(rows, memo[dtype].mT if back else memo[dtype], out=y)
    return out


def _times_narrow(x_TD: Tensor, deviation: Tensor, *, out: Tensor) -> None:
    parts = max(1, round(x_TD.numel() / NARROW_ELEMENTS)) if x_TD.device.type == "cpu" else 1
    for x, y in zip(x_TD.chunk(parts), out.chunk(parts), strict=True):
        x_NTW = _by_tile(x, deviation.shape[-1])
        torch.baddbmm(x_NTW, x_NTW, deviation, out=_by_tile(y, deviation.shape[-1]))


def _times_fine(x_TD: Tensor, tiles: Tensor, *, out: Tensor) -> None:
    step = _step(x_TD)
    wide, turned = _scratch(step, x_TD, tiles.dtype)
    for x, y in zip(torch.split(x_TD, step), torch.split(out, step), strict=True):
        y_NTW = turned[: x.numel()].view(len(tiles), len(x), tiles.shape[-1])
        torch.bmm(_by_tile(_widened(x, wide), tiles.shape[-1]), tiles, out=y_NTW)
        _by_tile(y, tiles.shape[-1]).copy_(y_NTW)


def _outer(g: Tensor, x: Tensor, R: Tensor) -> Tensor:
    """sum over rows of g_k x_k^T for every block, dL/dR: (n, 8, 8) in R's dtype, summed in the finer dtype."""
    dtype = torch.promote_types(x.dtype, R.dtype)
    n = R.shape[0]
    per_tile = math.gcd(n, _FINE)
    width = per_tile * BLOCK
    out = torch.zeros(n // per_tile, width, width, dtype=dtype, device=x.device)
    g_TD, x_TD = g.reshape(-1, n * BLOCK), x.reshape(-1, n * BLOCK)
    step = _step(x_TD)
    g_wide, x_wide = _scratch(step, x_TD, dtype)
    for g_part, x_part in zip(torch.split(g_TD, step), torch.split(x_TD, step), strict=True):  # in place: no autocast
        out.baddbmm_(_by_tile(_widened(g_part, g_wide), width).mT, _by_tile(_widened(x_part, x_wide), width))
    blocks = out.view(-1, per_tile, BLOCK, per_tile, BLOCK).diagonal(dim1=1, dim2=3)  # (n / per_tile, 8, 8, per_tile)
    return blocks.movedim(-1, 1).reshape(n, BLOCK, BLOCK).to(R.dtype)


def _tiles(M: Tensor, blocks: int) -> Tensor:
    """(n, 8, 8) -> block-diagonal (8 n / W, W, W), W = 8 times the largest divisor that n shares with `blocks`."""
    per_tile = math.gcd(len(M), blocks)
    tiles = M.new_zeros(len(M) // per_tile, per_tile, BLOCK, per_tile, BLOCK)
    tiles.diagonal(dim1=1, dim2=3).copy_(M.view(-1, per_tile, BLOCK, BLOCK).movedim(1, -1))
    return tiles.view(-1, per_tile * BLOCK, per_tile * BLOCK)


def _by_tile(x_TD: Tensor, width: int) -> Tensor:
    """(T, 8 n) -> (8 n / width, T, width), a view."""
    return x_TD.view(x_TD.shape[0], x_TD.shape[1] // width, width).transpose(0, 1)


@cache
def _multiplies_bfloat16(device: torch.device) -> bool:
    return device.type != "cpu" or cpu_multiplies_bfloat16()


def _step(x_TD: Tensor) -> int:
    """The number of rows to turn at a time."""
    return max(16, ELEMENTS // max(1, x_TD.shape[1])) if x_TD.device.type == "cpu" else max(1, len(x_TD))


def _scratch(step: int, x_TD: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Two scratch tensors for `step` rows. Every part uses them again, on a CPU every call: the first touch of fresh
    memory costs more than the arithmetic."""
    elements = min(step, len(x_TD)) * x_TD.shape[1]
    keeps = x_TD.device.type == "cpu" and type(x_TD) is Tensor  # the scratch of a fake tensor is fake too
    known: dict[Any, list[Tensor]] = _KEPT.__dict__ if keeps else {}
    if dtype not in known or known[dtype][0].numel() < elements:
        with torch.inference_mode(False):  # any mode can write to it
            known[dtype] = [torch.empty(elements, dtype=dtype, device=x_TD.device) for _ in range(2)]
    return known[dtype]


_KEPT = threading.local()  # a pair of scratch tensors for each thread and dtype, 3 MB in float32


def _widened(x_TD: Tensor, scratch: Tensor) -> Tensor:
    """The rows in scratch's dtype."""
    return x_TD if x_TD.dtype == scratch.dtype else scratch[: x_TD.numel()].view(x_TD.shape).copy_(x_TD)
