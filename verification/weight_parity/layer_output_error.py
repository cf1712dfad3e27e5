"""The error of a layer's output: mean |E x|^2 over the reference's own inputs, against the own quantiser's.

A quantiser with error feedback (GPTQ, AutoRound) enlarges the weights' error to make this one smaller, so it decides
where the weights alone cannot. The own quantiser is asked without a matrix, with one of the inputs' first half and with
a log-normal one; the error is measured on the second half, and may be 1.1 times the largest of the own.

A quantiser leaves the nearest code on its own scales only in order to lower this error, while other weights (another
checkpoint, a fine-tune) leave it at random and raise it. So where codes are not the nearest, the squared error is
compared with that of the nearest codes, row by row: D = sum (a - b) / sum b, with the rows' spread as standard error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from verification.engines.quantise import quantised_bytes
from verification.gguf.reader import GGUFTensor
from verification.weight_parity.structure.rounding import nearest_values

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class OpenTensor:
    """A tensor that its layer's output decides."""

    tensor: GGUFTensor
    wanted: Array  # (out, in)
    module: str  # of the Hugging Face model: "model.layers.0.mlp.down_proj"
    by_codes: bool = False  # whether the reason are codes that are not the nearest


@dataclass(frozen=True)
class OutputError:
    """The output error of one tensor."""

    ratio: float  # root mean square, in the largest of the own quantiser's
    codes: float | None  # squared, in that of the nearest codes; None for a type whose codes have no cells
    standard_error: float  # of `codes`


def output_errors(
    model: Any, tokens: npt.NDArray[np.int64], tensors: Mapping[str, OpenTensor]
) -> dict[str, OutputError]:
    """The output error of each tensor, by the tensors' names.

    A tensor whose module the model has not, or that the model did not use on these tokens, is left out.

    Args:
        model: the reference, in float32.
        tokens: one passage (positions,); some hundred give a steady mean.
    """
    import torch

    found: dict[str, OutputError] = {}
    hooks = []
    modules = dict(model.named_modules())

    def asks(name: str, one: OpenTensor) -> Any:
        def measure(module: Any, inputs: Any) -> None:
            x = inputs[0].detach().float().reshape(-1, inputs[0].shape[-1]).numpy()  # (positions, in)
            if len(x) > 1 and x.shape[1] == one.wanted.shape[1]:
                found[name] = OutputError(output_ratio(one, x), *_codes(one, x))

        return measure

    for name, one in tensors.items():
        if one.module in modules:
            hooks.append(modules[one.module].register_forward_pre_hook(asks(name, one)))
    try:
        with torch.no_grad():
            model(torch.from_numpy(np.asarray(tokens, dtype=np.int64))[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def output_ratio(one: OpenTensor, inputs: Array) -> float:
    """Root mean square of the output error on `inputs` (positions, in), in the largest of the own quantiser's."""
    first, second = np.array_split(inputs, 2)
    wanted, kind = one.wanted, one.tensor.type
    noise = np.random.default_rng(0).standard_normal(wanted.shape[1])
    matrices = (None, (first**2).mean(axis=0), np.exp(noise).astype(np.float32))
    own = []
    for matrix in matrices:
        raw = quantised_bytes(wanted, kind, matrix)
        if raw is not None:
            own.append(_error(GGUFTensor("", wanted.shape, kind, raw).values() - wanted, second))
    mine = _error(one.tensor.values() - wanted, second)
    return float(np.sqrt(mine / max(own))) if own and max(own) > 0 else float("inf")


def _codes(one: OpenTensor, inputs: Array) -> tuple[float | None, float]:
    """1 + D and its standard error."""
    values = one.tensor.values()
    nearest = nearest_values(one.tensor, values, one.wanted)
    if nearest is None:
        return None, 0.0
    x = inputs.astype(np.float64)
    mine, theirs = (
        ((x @ (F - one.wanted).T.astype(np.float64)) ** 2).mean(axis=0) for F in (values, nearest)
    )  # (out,)
    whole = float(theirs.sum())
    if not whole:
        return (1.0 if not mine.any() else float("inf")), 0.0
    change = (mine - theirs) / whole
    return 1 + float(change.sum()), float(np.sqrt(len(change)) * change.std())


def _error(error: Array, inputs: Array) -> float:
    """mean |E x|^2; E (out, in), x (positions, in)."""
    return float(np.mean((inputs.astype(np.float64) @ error.astype(np.float64).T) ** 2))
