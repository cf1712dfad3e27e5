"""RotationGate: the rotation of one layer, y_k = R_k x_k on the input of `o_proj`.

It owns theta (n, 28) in float32, whatever dtype the model is cast to: at bfloat16's 8 bits an angle below 0.004 rad
beside 1 would vanish. R (n, 8, 8) is computed when theta has changed, for all gates of a model in one batch
(`share`), and shared by micro-batches, evaluation and decoding.
Source: DESIGN: o_proj(gate(x)) = (W @ blockdiag(R)) x, hence W'[:, 8k:8k+8] = W[:, 8k:8k+8] @ R_k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from so8t_core.block_product import Memo
from so8t_core.exponential import BLOCK, PARAMETERS, TERMS, Evaluated, evaluate
from so8t_core.rotation import rotate_blocks
from so8t_core.torch_private import inside_backward, remove_forward_pre_hook, writes


class _Known(NamedTuple):
    """What is known of a gate's rotation."""

    was: Any  # theta's values, or its stamp, when it was computed
    exponential: Evaluated  # of all gates that were computed with it
    place: int  # this gate's among them
    theta: Tensor  # to which
    memo: Memo  # what its application made of R
    connected: Tensor  # R (n, 8, 8) has a graph, one node for all of them: their backward is one batch


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
        self.blocks = features // BLOCK
        theta = torch.zeros(self.blocks, PARAMETERS, dtype=torch.float32)
        self.theta = nn.Parameter(theta.normal_(std=init_scale) if init_scale else theta)
        self._known: _Known | None = None

    def rotation(self) -> Tensor:
        """R (n, 8, 8), float32; with a graph when theta is being trained.

        Raises:
            InputError: theta holds a NaN, an Inf or an absurd angle (the message names the layer).
        """
        if not self._is_current():
            refresh([self])
        assert self._known is not None
        known, place = self._known.exponential, self._known.place
        if not self._is_trained():
            return known.R[place]
        # A backward in which layers are run again one by one (checkpointing) reaches each theta by a node of its own.
        if self._known.theta is not self.theta or inside_backward():
            return known.connected([self.theta if k == place else None for k in range(len(known.R))])[place]
        return self._known.connected

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        R = self.rotation()
        assert self._known is not None
        return rotate_blocks(x, R, memo=self._known.memo)

    def is_whole(self) -> bool:
        """theta is an ordinary tensor of its full shape: not sharded over processes, not on the meta device."""
        theta = self.theta
        return type(theta.data) is Tensor and theta.shape == (self.blocks, PARAMETERS) and not theta.is_meta

    def _is_trained(self) -> bool:
        return torch.is_grad_enabled() and self.theta.requires_grad

    def _is_current(self) -> bool:
        """On the CPU theta's values decide (even `theta.data` edits count); elsewhere its stamp, to avoid a wait."""
        if self._known is None or (self._is_trained() and not self._known.exponential.batches):
            return False
        was = self._known.was
        if isinstance(was, Tensor):
            same_kind = (was.device, was.dtype) == (self.theta.device, self.theta.dtype)
            return same_kind and torch.equal(was, self.theta)
        return bool(was == self._stamp())

    def _stamp(self) -> tuple[Any, ...]:
        """Changes with every write that raises theta's version (not: to `theta.data`), and after every step of any
        optimiser, whose kernels may tell no one."""
        theta = self.theta
        return (theta.data_ptr(), writes(theta), theta.device, theta.dtype, _OPTIMISER_STEPS[0])

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files carry theta alone: what is known of it takes 30 times the bytes, and a stamp means nothing
        in another process."""
        return {**self.__dict__, "_known": None}

    def extra_repr(self) -> str:
        return f"blocks={self.blocks}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotationGate:
        exact = self.theta.detach()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._known = None
        if self.theta.dtype.itemsize < torch.float32.itemsize:  # .half() and the like: keep float32, from exact values
            self.theta.data = exact.to(self.theta.device, torch.float32)
        return self


_OPTIMISER_STEPS = [0]


def _count_step(*_: Any) -> None:
    _OPTIMISER_STEPS[0] += 1


register_optimizer_step_post_hook(_count_step)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def refresh(gates: Iterable[RotationGate]) -> None:
    """Compute the rotations of all gates whose theta has changed, in one go: once an optimiser step, whoever asks.

    Raises:
        InputError: a theta holds a NaN, an Inf or an absurd angle (the message names the layer).
    """
    stale = [gate for gate in gates if not gate._is_current()]
    if not stale:
        return
    with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not serve a later backward
        thetas = [gate.theta.detach().clone() for gate in stale]
        trained = any(gate.theta.requires_grad for gate in stale)
        exact = [theta if theta.dtype in TERMS else theta.float() for theta in thetas]  # a coarser one was loaded
        known = evaluate(exact, workings=trained, names=[gate.layer for gate in stale])
        with torch.enable_grad():
            connected = known.connected([gate.theta for gate in stale])
    for place, (gate, theta) in enumerate(zip(stale, thetas, strict=True)):
        was = theta if theta.device.type == "cpu" else gate._stamp()
        gate._known = _Known(was, known, place, gate.theta, {}, connected[place])


class Rotated(Protocol):
    """A layer with gates: `gates_in_use` are those of its next forward."""

    def gates_in_use(self) -> list[RotationGate]:
        """The gates of the active adapter."""


def share(model: nn.Module) -> None:
    """Before every forward of `model`, refresh the gates in use of all layers that it has now, in one batch."""
    unshare(model)
    model.__dict__["_so8t_layers"] = [module for module in model.modules() if hasattr(module, "gates_in_use")]
    model.register_forward_pre_hook(_refresh_shared)


def unshare(model: nn.Module) -> None:
    """Undo `share`."""
    model.__dict__.pop("_so8t_layers", None)
    remove_forward_pre_hook(model, _refresh_shared)


def _refresh_shared(model: nn.Module, _: Any) -> None:
    layers: list[Rotated] = model.__dict__["_so8t_layers"]
    refresh(gate for layer in layers for gate in layer.gates_in_use() if gate.is_whole())
