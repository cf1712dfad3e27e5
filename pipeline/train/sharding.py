"""Split the frozen base over the processes of a training, layer by layer (FSDP2); the adapter stays whole in each.

`accelerate launch --use_fsdp` asks for it. The base takes nearly all memory, the adapter less than a percent. So the
adapter, its optimiser and its checkpoints stay as in one process: theta keeps its shape (n, 28), its gradients are
averaged as in plain data-parallel training, and any number of processes can resume a checkpoint. A layer's weights are
gathered for its forward and its backward and then dropped.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pipeline.train.pet import decoder_layers
from so8t_core.errors import InputError
from verification.engines import distributed


def take_request() -> bool:
    """Whether the launcher asked for FSDP. The request is removed from the environment, because the Trainer would
    split the adapter too.
    """
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    return asked and distributed.count() > 1


def shard_base(peft: nn.Module, quantization: str) -> None:
    """Split every parameter that is not trained over all processes, in place.

    Raises:
        InputError: a quantised base; its packed weights cannot be split.
    """
    if quantization != "none":
        raise InputError(
            f"train.quantization = {quantization} cannot be split over processes; leave out --use_fsdp (each process "
            "then holds the quantised base) or set train.quantization to none"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device, (distributed.count(),)),
        "ignored_params": {p for p in peft.parameters() if p.requires_grad},
    }
    base = peft.get_base_model()  # type: ignore[operator]
    for layer in decoder_layers(base):
        fully_shard(layer, **options)
    # The rest: embeddings, last norm, head. They are dropped after the forward like the layers. Otherwise saving would
    # drop them in the first process alone, and from then on the processes would gather different weights.
    fully_shard(base, reshard_after_forward=True, **options)
    for parameter in options["ignored_params"]:
        parameter.data = parameter.data.to(torch.device(device))
