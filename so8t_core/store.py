"""Attach, save and load an adapter, with PEFT's file naming: adapter_config.json and adapter_model.safetensors.

Keys of the tensor file are the module names under "base_model.model.", without the adapter's name, so that
`PeftModel.from_pretrained` reads what `save_adapter` wrote and the other way round.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from so8t_core.adapter import SO8TLinear, SO8TModel, gates
from so8t_core.config import METHOD, SO8TConfig
from so8t_core.errors import InputError
from so8t_core.files import atomic_dir, write_text

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
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
            "the model is a PeftModel already; use model.add_adapter(name, SO8TConfig(...)) or attach to the plain model"
        )
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise InputError(
            "the model already carries an adapter; detach it first, or give the LoRA to SO8TConfig(lora={...})"
        )
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    cast_adapter_dtype(model, ADAPTER, autocast_adapter_dtype=True)
    handle = model.register_forward_pre_hook(_refuse_outer_adapter)
    model._so8t_guard = handle
    return model


def _refuse_outer_adapter(model: nn.Module, args: Any) -> None:
    """An adapter wrapped around o_proj afterwards would see x unrotated: a silently different function."""
    for name, module in model.named_modules():
        if (
            isinstance(module, BaseTunerLayer)
            and not isinstance(module, SO8TLinear)
            and isinstance(getattr(module, "base_layer", None), SO8TLinear)
        ):
            raise InputError(
                f"{name}: another adapter was wrapped around the rotation and would bypass it. "
                "Give the LoRA to SO8TConfig(lora={...}) and attach once"
            )


def detach(model: Model) -> Model:
    """Remove every gate and LoRA of SO8T without folding anything; returns `model` with its original layers."""
    replace_layers(model, lambda module: module.get_base_layer())
    return model


def replace_layers(model: nn.Module, make: Any) -> None:
    """Replace each outermost adapter layer by `make(layer)` and forget the adapter."""
    outer: list[tuple[nn.Module, str, BaseTunerLayer]] = []
    seen_inside: set[int] = set()
    for parent in model.modules():
        for name, child in parent.named_children():
            if (
                isinstance(child, BaseTunerLayer)
                and id(child) not in seen_inside
                and not isinstance(parent, BaseTunerLayer)
            ):
                outer.append((parent, name, child))
    for parent, name, child in outer:
        setattr(parent, name, make(child))
    handle = model.__dict__.pop("_so8t_guard", None)
    if handle is not None:
        handle.remove()
    model.__dict__.pop("peft_config", None)
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = False


def config_of(model: nn.Module) -> SO8TConfig:
    """The SO8T config of a model that carries an adapter.

    Raises:
        InputError: it carries none.
    """
    configs = getattr(model, "peft_config", None) or {}
    for config in configs.values():
        if isinstance(config, SO8TConfig):
            return config
    raise InputError("the model carries no SO8T adapter; attach or load one first")


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under their file names, contiguous and on the CPU."""
    if isinstance(model, PeftModel):
        state = get_peft_model_state_dict(model)
    else:
        state = get_peft_model_state_dict(model, adapter_name=ADAPTER)
        state = {KEY_PREFIX + key: value for key, value in state.items()}
    return {key: value.detach().cpu().contiguous() for key, value in sorted(state.items())}


def save_adapter(model: nn.Module, directory: str | Path) -> Path:
    """Write the adapter (config and tensors) whole or not at all; returns the directory.

    Raises:
        InputError: the model carries no SO8T adapter, or the place cannot be written.
    """
    config = config_of(model)
    directory = Path(directory)
    with atomic_dir(directory) as temporary:
        save_file(adapter_state(model), temporary / WEIGHTS_NAME, metadata={"format": "pt"})
        write_text(temporary / CONFIG_NAME, json.dumps(_config_dict(config, model), indent=2, sort_keys=True) + "\n")
    return directory


def _config_dict(config: SO8TConfig, model: nn.Module) -> dict[str, Any]:
    fields = config.to_dict()
    fields["inference_mode"] = True
    fields["base_model_name_or_path"] = fields.get("base_model_name_or_path") or getattr(model, "name_or_path", None)
    return {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}


def read_adapter(directory: str | Path) -> tuple[SO8TConfig, dict[str, Tensor]]:
    """Config and tensors of a saved adapter.

    Raises:
        InputError: missing or damaged files, or not an SO8T adapter.
    """
    directory = Path(directory)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (directory / name).is_file():
            raise InputError(f"{directory} is not an adapter directory: {name} is missing")
    try:
        fields = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{directory / CONFIG_NAME} is damaged: {error}") from None
    if fields.get("peft_type") != METHOD:
        raise InputError(f"{directory} holds a {fields.get('peft_type')} adapter, expected {METHOD}")
    known = SO8TConfig.__dataclass_fields__
    fields.pop("peft_type")
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise InputError(
            f"{directory / CONFIG_NAME} has unknown keys {', '.join(unknown)}: written by a newer version?"
        )
    try:
        tensors = load_file(directory / WEIGHTS_NAME)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{directory / WEIGHTS_NAME} is damaged: {error}") from None
    return SO8TConfig(**fields), tensors


def load_adapter(model: Model, directory: str | Path, *, trainable: bool = False) -> Model:
    """Attach the saved adapter to `model` in place; returns `model`.

    Raises:
        InputError: damaged files, or an adapter for another model (the first missing or misfitting name is given).
    """
    config, tensors = read_adapter(directory)
    config.inference_mode = not trainable
    attach(model, config)
    expected = adapter_state(model)
    missing, unexpected = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    misfit = [k for k in sorted(set(expected) & set(tensors)) if expected[k].shape != tensors[k].shape]
    if missing or unexpected or misfit:
        detach(model)
        if misfit:
            key = misfit[0]
            what = f"{key} is {tuple(tensors[key].shape)}, this model needs {tuple(expected[key].shape)}"
        else:
            what = f"{len(missing)} tensors are missing, {len(unexpected)} have no place, first {(missing + unexpected)[0]}"
        raise InputError(f"the adapter in {directory} was made for another model: {what}")
    state = {key.removeprefix(KEY_PREFIX): value for key, value in tensors.items()}
    set_peft_model_state_dict(model, state, adapter_name=ADAPTER)
    for parameter in model.parameters() if not trainable else ():
        parameter.requires_grad_(False)
    for name, gate in gates(model).items():
        if not bool(torch.isfinite(gate.theta).all()):
            raise InputError(
                f"the adapter in {directory} has a NaN or Inf in {name}; train it again or take an earlier checkpoint"
            )
    return model


__all__ = [
    "SO8TModel",
    "adapter_state",
    "attach",
    "config_of",
    "detach",
    "load_adapter",
    "read_adapter",
    "save_adapter",
]
