"""Attach, save and load an adapter, with PEFT's file naming: adapter_config.json and adapter_model.safetensors.

Keys of the tensor file are the module names under "base_model.model.", without the adapter's name, so that
`PeftModel.from_pretrained` reads what `save_adapter` wrote and the other way round.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from so8t_core.adapter import SO8TLinear
from so8t_core.adapter_fields import check_fields
from so8t_core.config import METHOD, SO8TConfig
from so8t_core.errors import InputError
from so8t_core.files import atomic_dir, read_json, write_text
from so8t_core.gate import refresh_apart
from so8t_core.safetensors_header import FLOATS, read_entries

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
PERMUTATION = ".lora_so8t.permutation"
ADAPTER = "default"

Model = TypeVar("Model", bound=nn.Module)


def attach(model: Model, config: SO8TConfig) -> Model:
    """Put rotations (and the config's LoRA) into `model` in place and freeze everything else; returns `model`.

    Raises:
        InputError: (a ValueError) no such target, a layer out of range, a width that is no multiple of 8, a LoRA target
            that matches nothing, or a model that already carries an adapter.
    """
    if isinstance(model, PeftModel):
        raise InputError(
            "the model is a PeftModel already; use its add_adapter(name, SO8TConfig(...)) or attach to the plain model"
        )
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise InputError(
            "the model already carries an adapter; detach it first, or give the LoRA to SO8TConfig(lora={...})"
        )
    config = copy.deepcopy(config)  # `attach` adds which layers share an input, which differs between models
    try:
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    except BaseException:
        detach(model)
        raise
    cast_adapter_dtype(model, ADAPTER, autocast_adapter_dtype=True)
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.train(model.training)  # new layers start in training mode: a LoRA's dropout would act in evaluation
    return model


def detach(model: nn.Module) -> nn.Module:
    """Remove every gate and LoRA of SO8T without folding anything; returns the plain model with its original layers.

    The base's parameters stay frozen, as `attach` left them.

    Raises:
        InputError: the adapter is merged into the weights, so that the original weights are gone.
    """
    return replace_layers(model, lambda name, layer: layer.get_base_layer())


def replace_layers(model: nn.Module, make: Callable[[str, Any], nn.Module]) -> nn.Module:
    """Replace each outermost adapter layer by `make(name, layer)` and forget the adapter; returns the plain model.

    Raises:
        InputError: an adapter that is merged into the weights, before anything is replaced.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    outer = {
        f"{prefix}.{name}".lstrip("."): (parent, name, child)
        for prefix, parent in model.named_modules()
        for name, child in parent.named_children()
        if isinstance(child, BaseTunerLayer) and not isinstance(parent, BaseTunerLayer)
    }
    for full, (_, _, layer) in outer.items():
        if any(getattr(part, "merged", False) for part in layer.modules() if isinstance(part, BaseTunerLayer)):
            raise InputError(f"{full}: the adapter is merged into the weights already; call unmerge_adapter() first")
    for full, (parent, name, layer) in outer.items():
        setattr(parent, name, make(full, layer))
        for part in layer.modules():
            if isinstance(part, SO8TLinear) and part.guard is not None:
                part.guard.remove()
    refresh_apart(model)
    model.__dict__.pop("peft_config", None)
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = False
    return model


def active_adapter(model: nn.Module) -> str:
    """Name of the one active SO8T adapter.

    Raises:
        InputError: no adapter or several adapters are active.
    """
    layer = next((module for module in model.modules() if isinstance(module, SO8TLinear)), None)
    if layer is None:
        raise InputError("the model carries no SO8T adapter; attach or load one first")
    names = layer.active_adapters
    if len(names) != 1:
        raise InputError(f"{len(names)} adapters are active ({', '.join(names)}); choose one with set_adapter(name)")
    return names[0]


def config_of(model: nn.Module) -> SO8TConfig:
    """The config of the active SO8T adapter.

    Raises:
        InputError: no adapter or several adapters are active.
    """
    name = active_adapter(model)
    configs: Any = getattr(model, "peft_config", None) or {}
    config = configs.get(name)
    if not isinstance(config, SO8TConfig):
        raise InputError(f"the active adapter {name} is no SO8T adapter; choose one with set_adapter(name)")
    return config


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The active adapter's tensors under their file names, contiguous and on the CPU: theta (D/8, 28), PEFT's LoRA."""
    # An adapter file holds the adapter alone: PEFT would add the embedding whenever lm_head is a LoRA target.
    state = get_peft_model_state_dict(model, adapter_name=active_adapter(model), save_embedding_layers=False)
    prefix = "" if isinstance(model, PeftModel) else KEY_PREFIX
    return {prefix + key: value.detach().cpu().contiguous() for key, value in sorted(state.items())}


def save_adapter(model: nn.Module, directory: str | Path) -> Path:
    """Write the adapter (config and tensors) whole or not at all; returns the directory.

    Raises:
        InputError: the model carries no SO8T adapter, or the place cannot be written.
    """
    config = config_of(model)
    fields = config.to_dict() | {"inference_mode": True}
    fields["base_model_name_or_path"] = fields.get("base_model_name_or_path") or getattr(model, "name_or_path", None)
    return write_files(directory, fields, adapter_state(model))


def write_files(directory: str | Path, fields: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """Write an adapter of any method, whole or not at all: adapter_config.json from `fields`, and the tensors by their
    file names, each (n, 28) or a LoRA's (r, in), (out, r).

    Raises:
        InputError: the place cannot be written.
    """
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}
    with atomic_dir(directory) as temporary:
        (temporary / WEIGHTS_NAME).write_bytes(save(tensors, metadata={"format": "pt"}))
        write_text(temporary / CONFIG_NAME, json.dumps(plain, indent=2, sort_keys=True) + "\n")
    return Path(directory)


def read_files(directory: str | Path, method: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields of adapter_config.json and tensors, (n, 28) or a LoRA's, of a saved adapter of the method "SO8T" or "OFT".

    Raises:
        InputError: missing or damaged files, or an adapter of another method.
    """
    directory = Path(directory)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (directory / name).is_file():
            raise InputError(f"{directory} is not an adapter directory: {name} is missing")
    fields = read_json(directory / CONFIG_NAME)
    if fields.get("peft_type") != method:
        raise InputError(f"{directory} holds a {fields.get('peft_type')} adapter, expected {method}")
    for entry in read_entries(directory / WEIGHTS_NAME):
        if entry.dtype not in FLOATS and not (entry.dtype == "I64" and entry.name.endswith(PERMUTATION)):
            raise InputError(f"{directory / WEIGHTS_NAME}: {entry.name} is stored as {entry.dtype}, wanted floats")
    try:
        return fields, load_file(directory / WEIGHTS_NAME)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{directory / WEIGHTS_NAME} is damaged: {error}") from None


def read_adapter(directory: str | Path) -> tuple[SO8TConfig, dict[str, Tensor]]:
    """Config and tensors (theta (D/8, 28), LoRA as PEFT shapes it) of a saved adapter.

    Raises:
        InputError: missing or damaged files, a NaN or Inf, or not an SO8T adapter.
    """
    directory = Path(directory)
    fields, tensors = read_files(directory, METHOD)
    known = SO8TConfig.__dataclass_fields__
    fields.pop("peft_type")
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise InputError(
            f"{directory / CONFIG_NAME} has unknown keys {', '.join(unknown)}: written by a newer version?"
        )
    check_fields(directory / CONFIG_NAME, fields)
    broken = sorted(key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all()))
    if broken:
        raise InputError(
            f"the adapter in {directory} has a NaN or Inf in {broken[0]}; train it again or take an earlier checkpoint"
        )
    for key, tensor in tensors.items():
        if key.endswith(PERMUTATION) and not torch.equal(tensor.sort().values, torch.arange(tensor.numel())):
            raise InputError(f"the adapter in {directory}: {key} is no permutation; the file is damaged")
    try:
        return SO8TConfig(**fields), tensors
    except (TypeError, ValueError) as error:
        raise InputError(f"{directory / CONFIG_NAME}: {error}") from None


def load_adapter(model: Model, directory: str | Path, *, trainable: bool = False) -> Model:
    """Attach the saved adapter to `model` in place; returns `model`.

    Raises:
        InputError: damaged files, or an adapter for another model (the message gives the first missing or misfitting
            name); `model` then stays as it was.
    """
    config, tensors = read_adapter(directory)
    config.inference_mode = not trainable
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    attach(model, config)
    expected = adapter_state(model)
    missing, unexpected = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    misfit = [k for k in sorted(set(expected) & set(tensors)) if expected[k].shape != tensors[k].shape]
    if missing or unexpected or misfit:
        detach(model)
        for parameter, flag in trained:
            parameter.requires_grad_(flag)
        if misfit:
            key = misfit[0]
            what = f"{key} is {tuple(tensors[key].shape)}, this model needs {tuple(expected[key].shape)}"
        else:
            first = (missing + unexpected)[0]
            what = f"{len(missing)} tensors are missing, {len(unexpected)} have no place, first {first}"
        raise InputError(f"the adapter in {directory} was made for another model: {what}")
    state = {key.removeprefix(KEY_PREFIX): value for key, value in tensors.items()}
    set_peft_model_state_dict(model, state, adapter_name=ADAPTER)
    for parameter in model.parameters() if not trainable else ():
        parameter.requires_grad_(False)
    return model
