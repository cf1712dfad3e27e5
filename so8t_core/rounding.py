"""One rounding from float64 to a storage dtype, to nearest, ties to even.

`double.to(bfloat16)` goes through float32 and so rounds twice. The result is wrong only where the first rounding lands
on a tie of the target, a float32 whose last 12 bits are zero: such a float32 is moved one step back towards x.
Source: Boldo and Melquiond (2008) on rounding to odd; the proof is in docs/core.md, "One rounding".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_TIE_BITS = 0xFFF  # float32 has 24 bits, float16 11 and bfloat16 8: a tie's last one is bit 12 or higher


def round_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (any shape) -> the nearest values of `dtype`; both are float64, float32, bfloat16 or float16.

    Raises:
        ValueError: another dtype, or a finite value that overflows `dtype` (the message gives it).
    """
    for given in (x.dtype, dtype):
        if given not in FLOATS:
            raise ValueError(f"round_once rounds float64, float32, bfloat16 and float16 to each other, not {given}")
    if x.dtype == torch.float64 and dtype.itemsize == 2:
        single = x.to(torch.float32)
        _leave_false_ties(single, x)
        y = single.to(dtype)
    else:
        y = x.to(dtype)  # rounds once
    if not all_finite(y) and bool((torch.isinf(y) & torch.isfinite(x)).any()):
        largest = x[torch.isfinite(x)].abs().max().item()
        raise ValueError(
            f"{largest:.6g} does not fit {dtype} (largest {torch.finfo(dtype).max:.6g}); choose a wider dtype"
        )
    return y


def _leave_false_ties(single: Tensor, x: Tensor) -> None:
    """Move a float32 that may be a tie one step towards the float64 it came from, in place."""
    bits = single.view(torch.int32)
    where = ((bits & _TIE_BITS) == 0).nonzero(as_tuple=True) if x.ndim else ...
    magnitude, exact = single[where].double().abs(), x[where].abs()
    # The bits are sign and magnitude: +1 is one step away from zero for either sign, -1 one step towards it.
    bits[where] += (exact > magnitude).to(torch.int32) - (exact < magnitude).to(torch.int32)


def all_finite(x: Tensor) -> bool:
    """Whether x, of any shape, has neither NaN nor Inf; one pass over x."""
    return x.numel() == 0 or all(math.isfinite(end.item()) for end in torch.aminmax(x))
