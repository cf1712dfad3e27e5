"""Find the linear layers that read the same tensor: q, k and v of an attention, gate and up of an MLP.

One forward over two tokens finds them: two layers share their input where every call of both receives the very same
tensor object. The rotation acts inside the layers of the group, so every other reader of that tensor (a router, a gate
of an expert) gets it unrotated. A layer that the two tokens do not reach is in no group.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from so8t_core.errors import InputError, one_line


def shared_inputs(model: nn.Module, names: list[str]) -> dict[str, list[str]]:
    """The groups among the modules `names`: first module of a group, in the order of `names` -> its other modules.

    The model runs once in evaluation mode without gradients, over the tokens 0 and 1; on the meta device nothing is
    computed.

    Raises:
        InputError: the model is no transformers model, or its forward fails over two tokens.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"{type(model).__name__} is no transformers model: which layers read the same tensor is found by running "
            "it over two tokens. Set share=False to give every layer a rotation of its own"
        )
    read: dict[str, list[Tensor]] = {name: [] for name in names}  # the tensors are held, so no address comes twice
    modules = dict(model.named_modules())

    def watch(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read[name] += [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)][:1]

    hooks = [modules[name].register_forward_pre_hook(partial(watch, name), with_kwargs=True) for name in names]
    training = {module: module.training for module in modules.values()}
    device = model.get_input_embeddings().weight.device
    cached = device.type == "meta"  # without a cache transformers reads values, and meta tensors have none
    try:
        model.eval()
        with torch.no_grad():
            model(input_ids=torch.tensor([[0, 1]], device=device), use_cache=cached)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise InputError(
            f"{type(model).__name__} cannot be run over two tokens to find which layers read the same tensor: "
            f"{one_line(error)}. Set share=False"
        ) from None
    finally:
        for hook in hooks:
            hook.remove()
        for module, flag in training.items():
            module.training = flag
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in names:
        if read[name]:
            groups.setdefault(tuple(id(x) for x in read[name]), []).append(name)
    return {group[0]: group[1:] for group in groups.values() if len(group) > 1}
