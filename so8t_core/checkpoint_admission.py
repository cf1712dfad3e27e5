"""Check a checkpoint directory before any work starts: it has plain weights and needs no foreign code.

An error of one line refuses code (a family that only the checkpoint's own Python knows, kernels from the hub),
quantised weights, an adapter beside the weights (transformers would add it), and missing weight files. A note names
files that do not belong to the model, and layers for several-token prediction that config.json promises without
tensors, or the reverse.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from so8t_core.errors import InputError
from so8t_core.files import read_json
from so8t_core.safetensors_header import FLOATS
from so8t_core.weight_files import WeightFiles, weight_files

_QUANTISED_KEYS = ("quantization_config", "compression_config")
_QUANTISED_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quant_log.csv")
_KERNEL_KEYS = ("attn_implementation", "experts_implementation")
_NEXTN_KEYS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
_SETTINGS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_WAY_OUT = "take the original checkpoint, or dequantise this one first"
_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,6})\.")
_MTP = re.compile(r"(?:^|\.)mtp(?:_\w+)?\.")


def admit_checkpoint(directory: str | Path) -> tuple[WeightFiles, list[str]]:
    """(the weight files of a checkpoint, notes of one sentence each).

    Raises:
        InputError: a fault that the module's text names, or a missing or damaged config.json.
    """
    directory = Path(directory)
    config = admit_config(directory)
    refuse_quantised(directory, config)
    found = weight_files(directory)
    for entry in found.entries.values():
        matrix = len(entry.shape) > 1 and entry.dtype.startswith(("F4", "F6", "F8"))
        if entry.dtype not in FLOATS and (matrix or entry.name.endswith(".weight")):
            where = f"{found.file_of[entry.name]}: {entry.name}"
            raise InputError(f"{where} is stored as {entry.dtype}, not as a plain weight; {_WAY_OUT}")
    return found, [*found.notes, *_nextn_notes(config, found)]


def admit_config(directory: Path) -> dict[str, Any]:
    """Read config.json of a directory whose model and tokenizer need no code beside transformers.

    Raises:
        InputError: no config.json, a damaged one, or one that needs foreign code or an adapter; a damaged file of other
            settings, which transformers would read only long after the work has begun.
    """
    if not directory.is_dir():
        raise InputError(f"checkpoint {directory} is not a directory")
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory} is not a Hugging Face model directory: it has no config.json")
    config = read_json(directory / "config.json")
    for name in _SETTINGS:
        if (directory / name).exists():
            read_json(directory / name)
    refuse_code(directory, config)
    if (directory / "adapter_config.json").exists():
        raise InputError(
            f"{directory} holds adapter_config.json beside the model, and transformers would add that adapter to the "
            "weights; move the adapter to a directory of its own"
        )
    return config


def refuse_code(directory: Path, config: dict[str, Any]) -> None:
    """Refuse a checkpoint that needs code from outside transformers.

    Raises:
        InputError: it needs such code; the message names the file and the class.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    kind = config.get("model_type")
    known = isinstance(kind, str) and kind in CONFIG_MAPPING_NAMES
    never = "a checkpoint's code is never run; take a family that transformers has, or a newer transformers"
    code = config.get("auto_map")
    if code and not known:
        raise InputError(
            f"{directory / 'config.json'} needs Python code of its own (auto_map: {_first(code)}; transformers has no "
            f"family {str(kind)[:60]!r}): {never}"
        )
    path = directory / "tokenizer_config.json"
    tokenizer = read_json(path) if path.is_file() else {}
    code, name = tokenizer.get("auto_map"), tokenizer.get("tokenizer_class")
    built_in = isinstance(name, str) and any(tokenizer_class_from_name(n) for n in (name, f"{name}Fast"))
    if code and not built_in and not known:
        raise InputError(f"{path} needs Python code of its own (auto_map: {_first(code)}): {never}")
    for key, value in _settings(config):
        plain = key.lstrip("_").removesuffix("_internal")
        if plain in _KERNEL_KEYS and any("/" in part for part in _texts(value)):
            where = f"{directory / 'config.json'}: {key} = {str(value)[:60]!r}"
            raise InputError(f"{where} names a kernel to be fetched and run; remove the key")


def refuse_quantised(directory: Path, config: dict[str, Any]) -> None:
    """Refuse a checkpoint whose weights are stored quantised: their values depend on another library.

    Raises:
        InputError: the weights are quantised; the message names key, method and a way out.
    """
    for key, value in _settings(config):
        if key in _QUANTISED_KEYS and value:
            method = _method(value)
            raise InputError(
                f"{directory} is a quantised checkpoint ({key} in config.json, method {method}): {_WAY_OUT}"
            )
    for name in _QUANTISED_FILES:
        if (directory / name).is_file():
            raise InputError(f"{directory} is a quantised checkpoint ({name} beside the weights): {_WAY_OUT}")


def _method(value: Any) -> str:
    if not isinstance(value, dict):
        return repr(str(value)[:40])
    named = value.get("quant_method") or value.get("format") or value.get("quant_algo")
    if not named and any(key.startswith(("load_in_", "bnb_")) for key in value):
        named = "bitsandbytes"
    return str(named or "not named")[:40]


def _settings(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(key, value) of config.json and of the sections inside it (text_config and the like)."""
    waiting = [config]
    while waiting:
        section = waiting.pop()
        yield from section.items()
        waiting += [value for value in section.values() if isinstance(value, dict)]


def _texts(value: Any) -> list[str]:
    values = value.values() if isinstance(value, dict) else [value]
    return [text for text in values if isinstance(text, str)]


def _first(code: Any) -> str:
    """The first class of an auto_map, for a message."""
    value = next(iter(code.values()), "") if isinstance(code, dict) else code
    value = next((part for part in value if part), "") if isinstance(value, list) else value
    return repr(str(value)[:60])


def _nextn_notes(config: dict[str, Any], found: WeightFiles) -> Iterator[str]:
    """A note where config.json and the tensors disagree about layers for several-token prediction."""
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else {}
    key, promised = next(
        ((k, v) for k in _NEXTN_KEYS if (v := {**config, **text}.get(k)) and isinstance(v, int)), ("", 0)
    )
    layers = {**config, **text}.get("num_hidden_layers")
    beyond = [
        name
        for name in found.entries
        if _MTP.search(name)
        or (isinstance(layers, int) and (m := _LAYER.search(name)) is not None and int(m[1]) >= layers)
    ]
    if promised > 0 and not beyond:
        yield (
            f"config.json promises {promised} layers for several-token prediction ({key}), but no file holds their "
            "tensors: set it to 0 before converting"
        )
    if beyond and not promised:
        yield (
            f"{len(beyond)} tensors lie beyond config.json's {layers} layers (first {beyond[0]}), and no key promises "
            "them: they are no part of what transformers computes"
        )
