"""Check the types of the fields of adapter_config.json before PEFT reads them; PEFT checks few of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from so8t_core.errors import InputError

Check = Callable[[Any], bool]
_WORDS: dict[str, Check] = {
    "a text": lambda value: isinstance(value, str),
    "true or false": lambda value: isinstance(value, bool),
    "a whole number from 1 to 65536": lambda value: type(value) is int and 1 <= value <= 1 << 16,
    "a finite number": lambda value: _finite(value),
    "a list of whole numbers": lambda value: isinstance(value, list) and all(_index(item) for item in value),
    "a list of texts": lambda value: _texts(value),
    "a list of texts or a pattern": lambda value: _pattern(value) or _WORDS["a list of texts"](value),
    "a whole number or a list of them": lambda value: _index(value) or _WORDS["a list of whole numbers"](value),
    "true, false or a text": lambda value: isinstance(value, bool | str),
    "a mapping": lambda value: isinstance(value, dict),
    "a mapping of texts to lists of texts": lambda value: (
        isinstance(value, dict) and all(isinstance(key, str) and _texts(item) for key, item in value.items())
    ),
    "a mapping of patterns to ranks": lambda value: _patterns(value, "a whole number from 1 to 65536"),
    "a mapping of patterns to numbers": lambda value: _patterns(value, "a finite number"),
}
_ADAPTER = {
    "layers": "a list of whole numbers",
    "init_scale": "a finite number",
    "target": "a text",
    "targets": "a list of texts or a pattern",
    "share": "true or false",
    "scale": "a text",
    "shuffle": "true or false",
    "accumulate": "true or false",
    "shared": "a mapping of texts to lists of texts",
    "format_version": "a whole number from 1 to 65536",
    "lora": "a mapping",
    "target_modules": "a list of texts or a pattern",
    "inference_mode": "true or false",
    "auto_mapping": "a mapping",
}
_LORA = {
    "r": "a whole number from 1 to 65536",
    "lora_alpha": "a finite number",
    "lora_dropout": "a finite number",
    "target_modules": "a list of texts or a pattern",
    "use_rslora": "true or false",
    "rank_pattern": "a mapping of patterns to ranks",
    "alpha_pattern": "a mapping of patterns to numbers",
    "init_lora_weights": "true, false or a text",
    "layers_to_transform": "a whole number or a list of them",
    "layers_pattern": "a list of texts or a pattern",
    "inference_mode": "true or false",
}
_NOT_NULL = frozenset({"init_scale", "targets", "share", "scale", "shuffle", "accumulate", "format_version"})
_NOT_NULL |= {"r", "lora_alpha", "lora_dropout"}


def check_fields(path: Path, fields: dict[str, Any]) -> None:
    """Refuse a field of adapter_config.json with a wrong type; SO8TConfig decides which keys are allowed.

    Raises:
        InputError: a wrong type; the message names key, value and the expected type.
    """
    _check(path, fields, _ADAPTER, "")
    if isinstance(fields.get("lora"), dict):
        _check(path, fields["lora"], _LORA, "lora.")


def _check(path: Path, fields: dict[str, Any], table: dict[str, str], prefix: str) -> None:
    for key, value in fields.items():
        wanted = table.get(key, "a text")
        if value is None and key not in _NOT_NULL:
            continue
        if not _WORDS[wanted](value):
            raise InputError(f"{path}: {prefix}{key[:60]} is {str(value)[:60]!r}, wanted {wanted}")


def _index(value: Any) -> bool:
    return type(value) is int and abs(value) < 1 << 31


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _finite(value: Any) -> bool:
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < 1 << 53)


def _pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and len(value) < 10_000 and re.compile(value) is not None
    except (re.error, RecursionError, OverflowError):
        return False


def _patterns(value: Any, inner: str) -> bool:
    return isinstance(value, dict) and all(_pattern(key) and _WORDS[inner](item) for key, item in value.items())
