"""The error of a layer's output: mean |E x|^2 over the reference's inputs, compared with llama.cpp's quantiser.

A quantiser with error feedback (GPTQ, AutoRound) accepts a larger error of the weights to lower the error of the
output. So the output's error decides if the weights alone cannot. llama.cpp's quantiser runs without a matrix, with the
matrix of the inputs' first half, and with a log-normal matrix. The error is measured on the second half; it may be 1.1
times the largest error of these three.

A quantiser chooses a code that is not the nearest only to lower the output's error. Other weights (another checkpoint,
a fine-tune) have such codes at random, which raises the error. So the squared error is compared with that of the
nearest codes, row by row: D = sum (a - b) / sum b, with the rows' spread as standard error.
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
    """A tensor that only the layer's output can decide."""

    tensor: GGUFTensor
    wanted: Array  # (out, in)
    module: str  # name in the Hugging Face model: "model.layers.0.mlp.down_proj"
    by_codes: bool = False  # whether the tensor is open because of codes that are not the nearest


@dataclass(frozen=True)
class OutputError:
    """The output error of one tensor."""

    ratio: float  # root mean square, divided by the largest of llama.cpp's quantiser
    codes: float | None  # squared error, divided by that of the nearest codes; None for a type without cells
    standard_error: float  # standard error of `codes`


def output_errors(
    model: Any, tokens: npt.NDArray[np.int64], tensors: Mapping[str, OpenTensor]
) -> dict[str, OutputError]:
    """The output error of each tensor, by the tensor's name.

    A tensor is left out if the model has no such module, or did not use the module on these tokens.

    Args:
        model: the reference, in float32.
        tokens: one passage (positions,); some hundred positions give a steady mean.
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
    """RMS of the output error on `inputs` (positions, in), divided by the largest RMS of llama.cpp's quantiser."""
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
