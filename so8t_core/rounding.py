"""One rounding from float64 to a storage dtype, to nearest, ties to even.

`double.to(bfloat16)` goes through float32 and so rounds twice, which now and then lands on the wrong neighbour.
Rounding to odd in float32 first keeps a sticky bit, and makes the second rounding the only one that counts: exact
whenever float32 has at least two more bits than the target (24 against 8 and 11).
Source: Boldo and Melquiond, Emulation of FMA and correctly rounded sums using rounding to odd (2008).
"""

from __future__ import annotations

import torch
from torch import Tensor


def round_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 x (any shape) -> the nearest value of `dtype` (float64, float32, bfloat16 or float16).

    Raises:
        ValueError: x is not float64, another target dtype, or a finite value overflows it (the message gives it).
    """
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"round_once rounds to float64, float32, bfloat16 or float16, not to {dtype}")
    if x.dtype != torch.float64:
        raise ValueError(f"round_once starts from float64, got {x.dtype}")
    if dtype in (torch.float64, torch.float32):
        y = x.to(dtype)
    else:
        single = x.to(torch.float32)
        bits = single.view(torch.int32)
        back = single.double()
        away = back.abs() > x.abs()  # rounded away from zero: the truncated value is one step down in magnitude
        truncated = bits - away.to(torch.int32)  # sign-magnitude: -1 is one step towards zero for either sign
        sticky = truncated | (back != x).to(torch.int32)
        y = sticky.view(torch.float32).to(dtype)
    if bool((torch.isinf(y) & torch.isfinite(x)).any()):
        largest = x[torch.isfinite(x)].abs().max().item()
        raise ValueError(
            f"{largest:.6g} does not fit {dtype} (largest {torch.finfo(dtype).max:.6g}); choose a wider dtype"
        )
    return y
