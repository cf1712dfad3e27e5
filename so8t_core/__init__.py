"""SO8T's core: block rotations of SO(8) as an adapter on `o_proj`, and their exact bake into the weights.

Names are loaded when first used, so that a program that only needs `InputError` does not wait for torch and peft.
`SO8TConfig` and `attach` register the PEFT method "so8t"; where peft is loaded already, this import registers it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from so8t_core.adapter import (
        SO8TLinear,
        SO8TModel,
        gates,
        orthogonality_loss,
        resolve_layers,
        restart,
        trainable_counts,
    )
    from so8t_core.baking import bake, bake_checkpoint, unbake
    from so8t_core.config import SO8TConfig
    from so8t_core.errors import InputError
    from so8t_core.folding import rotate_weight
    from so8t_core.gate import RotationGate
    from so8t_core.oft import export_oft, import_oft
    from so8t_core.pet import PETSchedule, pet_penalty, segments_of, valid_triples
    from so8t_core.rotation import exp_so8, log_so8, orthogonality_error, plane_angles, rotate_blocks, skew
    from so8t_core.rounding import round_once
    from so8t_core.store import attach, detach, load_adapter, save_adapter

_HOME = {
    # SO8TConfig comes from the module that registers the method, so that a config is enough for get_peft_model
    "adapter": (
        "SO8TConfig",
        "SO8TLinear",
        "SO8TModel",
        "gates",
        "orthogonality_loss",
        "resolve_layers",
        "restart",
        "trainable_counts",
    ),
    "baking": ("bake", "bake_checkpoint", "unbake"),
    "errors": ("InputError",),
    "folding": ("rotate_weight",),
    "gate": ("RotationGate",),
    "oft": ("export_oft", "import_oft"),
    "pet": ("PETSchedule", "pet_penalty", "segments_of", "valid_triples"),
    "rotation": ("exp_so8", "log_so8", "orthogonality_error", "plane_angles", "rotate_blocks", "skew"),
    "rounding": ("round_once",),
    "store": ("attach", "detach", "load_adapter", "save_adapter"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "InputError",
    "PETSchedule",
    "RotationGate",
    "SO8TConfig",
    "SO8TLinear",
    "SO8TModel",
    "attach",
    "bake",
    "bake_checkpoint",
    "detach",
    "exp_so8",
    "export_oft",
    "gates",
    "import_oft",
    "load_adapter",
    "log_so8",
    "orthogonality_error",
    "orthogonality_loss",
    "pet_penalty",
    "plane_angles",
    "resolve_layers",
    "restart",
    "rotate_blocks",
    "rotate_weight",
    "round_once",
    "save_adapter",
    "segments_of",
    "skew",
    "trainable_counts",
    "unbake",
    "valid_triples",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'so8t_core' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"so8t_core.{_MODULE_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "peft" in sys.modules:
    import_module("so8t_core.adapter")
