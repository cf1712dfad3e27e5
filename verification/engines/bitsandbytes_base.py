"""Quantised bases for training (QLoRA): loads them, and measures their weights against the original weights.

8 bit: one int8 scale a row (LLM.int8). 4 bit: nf4 in blocks of 64 with quantised scales. Nothing is ever merged into a
quantised base: the bake starts from the original checkpoint. So the shipped model differs from the trained model by the
quantisation of the base; `weight_error` is this difference in the weights.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from so8t_core.errors import InputError
from so8t_core.versions import check_version

Quantization = Literal["8bit", "4bit"]


def load_quantised(directory: str | Path, kind: Quantization, *, device: int | str | None = None) -> Any:
    """The causal LM of a local directory with its linear layers quantised, computing in float32 on a CPU and bfloat16
    on a GPU.

    Raises:
        InputError: bitsandbytes is missing, or its version is known to be wrong.
        OSError, ValueError: transformers cannot load the directory.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    try:
        check_version("bitsandbytes", importlib.metadata.version("bitsandbytes"))
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"a {kind} base needs bitsandbytes; pip install 'so8t[quant]'") from None
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    if kind == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    options: dict[str, Any] = {"device_map": {"": 0 if device is None else device}} if cuda else {}
    return AutoModelForCausalLM.from_pretrained(
        str(directory),
        dtype=dtype,
        trust_remote_code=False,
        use_safetensors=True,
        quantization_config=config,
        **options,
    )


def weight_error(model: nn.Module, original: Callable[[str], Tensor]) -> tuple[float, int]:
    """(||quantised - original|| / ||original|| over all quantised weights together, their number), Frobenius norm.

    Args:
        original: returns the original weight (out, in) of a tensor name, "model.layers.0.self_attn.o_proj.weight".

    Raises:
        InputError: the model has no quantised weight.
    """
    from peft.utils.integrations import dequantize_bnb_weight

    apart = whole = 0.0
    count = 0
    for name, module in model.named_modules():
        # the weight of the layer itself: an adapter around the layer shows the same weight
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if type(weight).__name__ not in ("Params4bit", "Int8Params"):
            continue
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        exact = original(f"{plain}.weight").double()
        found = dequantize_bnb_weight(weight, getattr(module, "state", None)).double().cpu()
        apart += (found - exact).square().sum().item()
        whole += exact.square().sum().item()
        count += 1
    if count == 0:
        raise InputError("the model has no quantised weight; load it with load_quantised")
    return (apart / whole) ** 0.5, count
