"""Every undocumented call of torch, one function each; its docstring names the public call that is missing.

A torch that renames such a call breaks this module and no other. Overrides of `nn.Module._apply` stand with their
classes, because torch calls them and this package does not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def cpu_multiplies_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this CPU; otherwise torch emulates the product, and float32 is faster.

    Missing: oneDNN's own decision. `torch.cpu.get_capabilities` of newer versions lists the processor's instructions.
    """
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def inside_backward() -> bool:
    """Whether the caller runs inside a backward pass, as when checkpointing runs a layer again.

    Missing: a public function for this question; -1 is torch's number for "no backward".
    """
    return torch._C._current_graph_task_id() != -1


def writes(tensor: Tensor) -> int:
    """How often `tensor`, of any shape (..), was written in place, as far as torch counts (not through `.data`).

    Missing: a public counter; autograd uses this counter to find a saved tensor that was overwritten.
    """
    return tensor._version


def remove_forward_pre_hook(module: nn.Module, hook: Any) -> None:
    """Remove every registration of `hook` from `module`.

    Missing: removal by the function. The public handle stays with the module that it was made for, and a deep copy of
    the module has the hook without a handle.
    """
    for key in [key for key, registered in module._forward_pre_hooks.items() if registered is hook]:
        del module._forward_pre_hooks[key]
