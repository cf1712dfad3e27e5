"""PET's term of the loss: the choice of hidden states and tokens, and the memory for the backward.

Forward hooks catch the outputs of chosen decoder layers, so that no other hidden state is kept. The default is the last
layer: the head reads its output, every rotation lies before it and gets its gradient, and each further layer costs the
same again. Each token's state is first scaled to unit RMS, as the final norm does, because raw states differ by orders
of magnitude between models and layers (SmolLM2's last layer gives a penalty of 3.5e3, far above the task loss), and
lambda needs one meaning. Padding (attention_mask) and triples across two sequences of a packed row are left out: a new
sequence begins where position_ids do not rise by one, as in `DataCollatorWithFlattening`. Only the states are kept for
the backward; their two float32 copies, 8 bytes a token and channel, are computed again.
Shapes: hidden states (B, T, C); attention_mask and position_ids (B, T), the latter also (1, T).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from so8t_core import pet_penalty, resolve_layers, segments_of, valid_triples
from so8t_core.errors import InputError


class HiddenStates:
    """Outputs of chosen decoder layers during one forward pass; `take` returns them and forgets them.

    Raises:
        InputError: no decoder layers, or an index out of range.
    """

    def __init__(self, model: nn.Module, layers: list[int]) -> None:
        stack = decoder_layers(model)
        self._kept: dict[int, Tensor] = {}
        for index in sorted(resolve_layers(layers, len(stack))):
            stack[index].register_forward_hook(self._hook(index))

    def _hook(self, index: int) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                self._kept[index] = output[0] if isinstance(output, tuple) else output

        return keep

    def take(self) -> list[Tensor]:
        """The states (B, T, C) caught since the last call, by layer."""
        kept = [self._kept[index] for index in sorted(self._kept)]
        self._kept.clear()
        return kept


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The longest ModuleList named `layers`: the decoder's blocks.

    Raises:
        InputError: the model has no ModuleList named `layers`.
    """
    found = [m for n, m in model.named_modules() if n.rpartition(".")[2] == "layers" and isinstance(m, nn.ModuleList)]
    if not found:
        raise InputError(f"{type(model).__name__} has no decoder layers that SO8T knows")
    return max(found, key=len)


def unit_rms(h_BTC: Tensor) -> Tensor:
    """Each token's state divided by its root mean square over channels: (B, T, C) -> (B, T, C) float32."""
    h = h_BTC.float()
    return h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + 1e-6)


def triples(inputs: dict[str, Any]) -> Tensor:
    """The number of valid triples of tokens in a batch of the model's inputs: a scalar."""
    return valid_triples(tuple(inputs["input_ids"].shape), **_where(inputs)).sum()


def penalty(states: list[Tensor], inputs: dict[str, Any], *, huber_delta: float | None = None) -> Tensor:
    """Mean over layers, triples and channels of the squared second difference (or its Huber function) at unit RMS.

    Args:
        states: (B, T, C) of each layer, in any float dtype.
        inputs: the model's inputs; only attention_mask and position_ids are used.
    """

    def of_layer(h: Tensor) -> Tensor:
        where = {name: value if value is None else value.to(h.device) for name, value in _where(inputs).items()}
        return pet_penalty(unit_rms(h), **where, huber_delta=huber_delta)

    terms: list[Tensor] = [checkpoint(of_layer, h, use_reentrant=False, preserve_rng_state=False) for h in states]
    return torch.stack([term.to(terms[0].device) for term in terms]).mean()


def _where(inputs: dict[str, Any]) -> dict[str, Tensor | None]:
    """The keyword arguments of `valid_triples`."""
    positions = inputs.get("position_ids")
    segments = None if positions is None else segments_of(positions).expand(inputs["input_ids"].shape)
    return {"mask_BT": inputs.get("attention_mask"), "segments_BT": segments}
