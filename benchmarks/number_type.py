"""The number type of the models that a benchmark trains: bfloat16 where the processor multiplies it, else float32.

Without such instructions oneDNN loops over the numbers one by one. On an AVX2 machine the product of 256 x 4096 and
4096 x 768 took 75 times as long as in float32, and a quick run took 18 minutes instead of three. The noise hid the cost
of an adapter: a step with PET was faster than without. The package itself trains in float32 on every CPU.
"""

from __future__ import annotations

import torch


def has_bfloat16() -> bool:
    """Whether this processor has AVX512-BF16 or AMX."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


DTYPE = torch.bfloat16 if has_bfloat16() else torch.float32
NAME = str(DTYPE).removeprefix("torch.")
