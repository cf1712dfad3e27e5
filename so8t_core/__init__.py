"""SO8T's core: block rotations of SO(8) as an adapter on `o_proj`, and their exact bake into the weights."""

from so8t_core.adapter import SO8TLinear, SO8TModel, gates, orthogonality_loss, resolve_layers, trainable_counts
from so8t_core.bake import bake, bake_checkpoint
from so8t_core.config import SO8TConfig
from so8t_core.errors import InputError
from so8t_core.gate import RotationGate, rotate_weight
from so8t_core.pet import PETSchedule, pet_penalty
from so8t_core.rotation import exp_so8, log_so8, orthogonality_error, plane_angles, rotate_blocks, skew
from so8t_core.rounding import round_once
from so8t_core.store import attach, detach, load_adapter, save_adapter

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
    "gates",
    "load_adapter",
    "log_so8",
    "orthogonality_error",
    "orthogonality_loss",
    "pet_penalty",
    "plane_angles",
    "resolve_layers",
    "rotate_blocks",
    "rotate_weight",
    "round_once",
    "save_adapter",
    "skew",
    "trainable_counts",
]
