"""RotationGate: the rotation of the input of one linear layer, or of several that read the same tensor, y_k = R_k x_k.

It owns theta (n, 28), which stays at least float32 when the model is cast. R (n, 8, 8) is computed when theta has
changed, for all gates of a model in one batch (`refresh_together`), and used by micro-batches, evaluation and decoding.
Options: a scale exp(c) before R, a second rotation R2 after a fixed permutation P, a product R_acc of earlier
rotations. y = P^T R2 P R_acc exp(A) diag(exp(c)) x; `folding` folds this into a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from so8t_core.block_product import Memo
from so8t_core.exponential import BLOCK, PARAMETERS, TERMS, Evaluated, evaluate
from so8t_core.folding import Fold, Turn
from so8t_core.rotation import exp_so8, log_so8, plane_angles, rotate_blocks, skew, upper_triangle
from so8t_core.torch_private import inside_backward, remove_forward_pre_hook, writes


class _Known(NamedTuple):
    """The last rotation that was computed for a gate."""

    was: Any  # theta's values, or its stamp, at that time
    exponential: Evaluated  # of all gates of the same batch
    place: int  # of this gate in the batch
    theta: Tensor  # the parameter that `connected` has a graph to
    memo: Memo  # tiles that were made from R
    connected: Tensor  # R (n, 8, 8) with a graph, one node for all gates: their backward is one batch


class _Applied(NamedTuple):
    """An input, its image, and the readers that have received the image."""

    x: Tensor
    y: Tensor
    stamp: tuple[Any, ...]
    served: set[int]


Scale = Literal["none", "block", "channel"]


class RotationGate(nn.Module):
    """n = features / 8 learned rotations. forward: x (..., features) -> (..., features).

    Args:
        scale: "channel" or "block" adds c, (features,) or (n,), zero at the start; exp(c) multiplies x first.
        shuffle: adds P (features,) and R2, identity at the start; P puts eight channels of distant blocks into one.
        accumulate: adds R_acc (n, 8, 8), float64, identity at the start; `restart` moves exp(A) into it.

    Raises:
        ValueError: features is not a positive multiple of 8 (the message names the layer).
    """

    permutation: Tensor | None
    accumulated: Tensor | None

    def __init__(
        self,
        features: int,
        *,
        init_scale: float = 0.0,
        scale: Scale = "none",
        shuffle: bool = False,
        accumulate: bool = False,
        layer: str = "this layer",
    ) -> None:
        super().__init__()
        if features <= 0 or features % BLOCK:
            raise ValueError(
                f"{layer}: {features} input features are not a positive multiple of {BLOCK}; leave it out of `layers`"
            )
        self.layer = layer
        self.blocks = features // BLOCK
        theta = torch.zeros(self.blocks, PARAMETERS, dtype=torch.float32)
        self.theta = nn.Parameter(theta.normal_(std=init_scale) if init_scale else theta)
        self.log_scale = None
        if scale != "none":
            self.log_scale = nn.Parameter(torch.zeros(features if scale == "channel" else self.blocks))
        self.shuffled: RotationGate | None = None
        if shuffle:
            self.shuffled = RotationGate(features, init_scale=init_scale, accumulate=accumulate, layer=layer)
            self.register_state_dict_post_hook(_flat_names)  # type: ignore[no-untyped-call]
            self.register_load_state_dict_pre_hook(_nested_names)  # type: ignore[no-untyped-call]
        self.register_buffer("permutation", distant_channels(self.blocks) if shuffle else None)
        eye = torch.eye(BLOCK, dtype=torch.float64)
        self.register_buffer("accumulated", eye.repeat(self.blocks, 1, 1) if accumulate else None)
        self.readers = 1  # number of linear layers that share this gate
        self._known: _Known | None = None
        self._applied: _Applied | None = None

    def parts(self) -> list[RotationGate]:
        """This gate and the rotation after its permutation, where it has one."""
        return [self] if self.shuffled is None else [self, self.shuffled]

    def rotation(self) -> Tensor:
        """R (n, 8, 8), float32 or, like theta, float64; with a graph when theta is being trained.

        Raises:
            InputError: theta holds a NaN, an Inf or an absurd angle (the message names the layer).
        """
        if not self._is_current():
            refresh([self])
        R = self._exponential(self._known)
        return R if self.accumulated is None else (self.accumulated @ R.double()).to(R.dtype)

    def _exponential(self, own: _Known | None) -> Tensor:
        """exp(A) (n, 8, 8), with a graph when theta is being trained."""
        assert own is not None
        known, place = own.exponential, own.place
        if not self._is_trained():
            return known.R[place]
        # Where checkpointing runs layers again one by one inside the backward, each theta needs its own node.
        if own.theta is not self.theta or inside_backward():
            return known.connected([self.theta if k == place else None for k in range(len(known.R))])[place]
        return own.connected

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor, reader: object = None) -> Tensor:
        """Turn x, or return its image where another reader has asked for the same tensor.

        Args:
            reader: the linear layer that asks. For the first reader of a group x is turned. Every other reader gets
                that image once, if x is the same object with the same values, and parameters and grad mode are the
                same. The gate holds x meanwhile, so that no later tensor is taken for it; a layer that checkpointing
                runs again reads a new tensor.
        """
        if self.readers == 1 or reader is None:
            return self._turn(x)
        stamp = self._applied_stamp(x)
        known = self._applied
        if known is None or known.x is not x or known.stamp != stamp or id(reader) in known.served:
            known = _Applied(x, self._turn(x), self._applied_stamp(x), set())
        known.served.add(id(reader))
        self._applied = known if len(known.served) < self.readers else None  # after the last reader it is forgotten
        return known.y

    def _applied_stamp(self, x: Tensor) -> tuple[Any, ...]:
        parts = self.parts()
        scale = None if self.log_scale is None else (writes(self.log_scale), _OPTIMISER_STEPS[0])
        written = 0 if x.is_inference() else writes(x)
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        return (written, trained, scale, *(id(part._known) if part._is_current() else None for part in parts))

    def _turn(self, x: Tensor) -> Tensor:
        """x (..., features) -> P^T R2 P R diag(exp(c)) x, in x's dtype."""
        M, memo = self.rotation(), None
        if self.log_scale is not None:  # scale R's columns: no pass over x and no extra rounding
            M = M * self.log_scale.exp().to(M.dtype).view(self.blocks, 1, -1)  # (n, 8, 8) by (n, 1, 8 or 1)
        elif self.accumulated is None and self._known is not None:
            memo = self._known.memo  # holds tiles of exp(A) alone
        y = rotate_blocks(x, M, memo=memo)
        if self.shuffled is None or self.permutation is None:
            return y
        return self.shuffled._turn(y.index_select(-1, self.permutation)).index_select(-1, self.permutation.argsort())

    def angles(self) -> Tensor:
        """The four plane angles of each block's rotation, R_acc exp(A), largest first: (n, 4), radians, float64.

        Without an R_acc they are the angles of theta itself, which may exceed pi.
        """
        if self.accumulated is None:
            return plane_angles(self.theta)
        R = Turn(self.theta, self.accumulated).matrix(self.theta.device)
        return plane_angles(log_so8(R))

    @torch.no_grad()
    def restart(self) -> None:
        """Move exp(A) into R_acc and set theta to zero: the function stays the same.

        Raises:
            InputError: theta holds a NaN, an Inf or an absurd angle.
        """
        for part in self.parts():
            assert part.accumulated is not None
            part.accumulated.copy_(part.accumulated @ exp_so8(part.theta.double()))
            part.theta.zero_()
            part._known = None

    @torch.no_grad()
    def transpose(self) -> None:
        """Replace R by R^T, for negative controls: (R_acc exp(A))^T = exp(-A) R_acc^T = R_acc^T exp(-R_acc A R_acc^T).

        Raises:
            InputError: theta holds a NaN, an Inf or an absurd angle.
        """
        if self.accumulated is None:
            self.theta.neg_()
        else:
            RA = self.accumulated
            self.theta.copy_(-upper_triangle(RA @ skew(self.theta.double()) @ RA.mT))
            RA.copy_(RA.mT.clone())
        self._known = None

    def fold(self) -> Fold:
        """The fold of this gate into a weight that reads its output."""
        second = self.shuffled
        return Fold(
            theta=self.theta.detach(),
            accumulated=self.accumulated,
            log_scale=None if self.log_scale is None else self.log_scale.detach(),
            shuffled=None if second is None else Turn(second.theta.detach(), second.accumulated),
            order=self.permutation,
        )

    def is_whole(self) -> bool:
        """Whether theta is an ordinary tensor of its full shape: not sharded over processes, not on the meta device."""
        theta = self.theta
        return type(theta.data) is Tensor and theta.shape == (self.blocks, PARAMETERS) and not theta.is_meta

    def _is_trained(self) -> bool:
        return torch.is_grad_enabled() and self.theta.requires_grad

    def _is_current(self) -> bool:
        """Whether theta is unchanged: by its values on the CPU (`theta.data` edits count), elsewhere by its stamp."""
        if self._known is None or (self._is_trained() and not self._known.exponential.batches):
            return False
        was = self._known.was
        if isinstance(was, Tensor):
            same_kind = (was.device, was.dtype) == (self.theta.device, self.theta.dtype)
            return same_kind and torch.equal(was, self.theta)
        return bool(was == self._stamp())

    def _stamp(self) -> tuple[Any, ...]:
        """A value that changes with every write that raises theta's version (`theta.data` writes do not), and with
        every step of any optimiser, because an optimiser's kernels may raise no version."""
        theta = self.theta
        return (theta.data_ptr(), writes(theta), theta.device, theta.dtype, _OPTIMISER_STEPS[0])

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files carry theta without its computed rotation: that takes 30 times the bytes, and a stamp means
        nothing in another process."""
        return {**self.__dict__, "_known": None, "_applied": None}

    def extra_repr(self) -> str:
        return f"blocks={self.blocks}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotationGate:
        least = {"theta": torch.float32, "log_scale": torch.float32, "accumulated": torch.float64}
        exact = {name: value.detach() for name in least if (value := getattr(self, name)) is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._known = self._applied = None
        for name, value in exact.items():
            own = getattr(self, name)
            if own.dtype.itemsize < least[name].itemsize:  # .half() and the like: keep the exact values
                own.data = value.to(own.device, least[name])
        return self


def distant_channels(blocks: int) -> Tensor:
    """P as an order of channels (8 n,), int64: z = x[P]. Block k of z holds lane j of block (k + j n/8) mod n of x.

    So each new block takes one lane from each of eight blocks spread over the whole width, that is, from several heads.
    """
    k, j = torch.arange(blocks)[:, None], torch.arange(BLOCK)[None, :]
    return (BLOCK * ((k + j * max(1, blocks // BLOCK)) % blocks) + j).reshape(-1)


def _flat_names(gate: RotationGate, state: dict[str, Any], prefix: str, _: Any) -> None:
    """shuffled.theta -> shuffled_theta: PEFT removes an adapter's name only from keys with one part after it."""
    for key in [key for key in state if key.startswith(f"{prefix}shuffled.")]:
        state[f"{prefix}shuffled_{key.removeprefix(f'{prefix}shuffled.')}"] = state.pop(key)


def _nested_names(gate: RotationGate, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The inverse of `_flat_names`."""
    for key in [key for key in state if key.startswith(f"{prefix}shuffled_")]:
        state[f"{prefix}shuffled.{key.removeprefix(f'{prefix}shuffled_')}"] = state.pop(key)


_OPTIMISER_STEPS = [0]


def _count_step(*_: Any) -> None:
    _OPTIMISER_STEPS[0] += 1


register_optimizer_step_post_hook(_count_step)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def refresh(gates: Iterable[RotationGate]) -> None:
    """Compute, in one batch, the rotations of all gates whose theta has changed: once for each optimiser step.

    Raises:
        InputError: a theta holds a NaN, an Inf or an absurd angle (the message names the layer).
    """
    stale = [gate for gate in gates if not gate._is_current()]
    if not stale:
        return
    with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not serve a later backward
        thetas = [gate.theta.detach().clone() for gate in stale]
        trained = any(gate.theta.requires_grad for gate in stale)
        exact = [theta if theta.dtype in TERMS else theta.float() for theta in thetas]  # a file had a coarser dtype
        known = evaluate(exact, workings=trained, names=[gate.layer for gate in stale])
        with torch.enable_grad():
            connected = known.connected([gate.theta for gate in stale])
    for place, (gate, theta) in enumerate(zip(stale, thetas, strict=True)):
        was = theta if theta.device.type == "cpu" else gate._stamp()
        gate._known = _Known(was, known, place, gate.theta, {}, connected[place])


def refresh_together(model: nn.Module) -> None:
    """Before every forward of `model`, refresh the `gates_in_use` of all its layers in one batch."""
    refresh_apart(model)
    model.__dict__["_so8t_layers"] = [module for module in model.modules() if hasattr(module, "gates_in_use")]
    model.register_forward_pre_hook(_refresh_shared)


def refresh_apart(model: nn.Module) -> None:
    """Undo `refresh_together`."""
    model.__dict__.pop("_so8t_layers", None)
    remove_forward_pre_hook(model, _refresh_shared)


def _refresh_shared(model: nn.Module, _: Any) -> None:
    layers = model.__dict__["_so8t_layers"]
    found = dict.fromkeys(part for layer in layers for gate in layer.gates_in_use() for part in gate.parts())
    refresh(gate for gate in found if gate.is_whole())
