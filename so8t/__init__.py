"""SO8T in one import: `from so8t import attach, bake, verify`.

Every public name of `so8t_core` (the adapter and its bake) and of `verification` (parity between a checkpoint and its
GGUF files). A name is loaded when it is first used: `import so8t` waits neither for torch nor for llama.cpp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import so8t_core
import verification

if TYPE_CHECKING:
    from so8t_core import (
        InputError,
        PETSchedule,
        RotationGate,
        SO8TConfig,
        SO8TLinear,
        SO8TModel,
        attach,
        bake,
        bake_checkpoint,
        detach,
        exp_so8,
        export_oft,
        gates,
        import_oft,
        load_adapter,
        log_so8,
        orthogonality_error,
        orthogonality_loss,
        pet_penalty,
        plane_angles,
        resolve_layers,
        restart,
        rotate_blocks,
        rotate_weight,
        round_once,
        save_adapter,
        segments_of,
        skew,
        trainable_counts,
        unbake,
        valid_triples,
    )
    from verification import Policy, Report, VerifyRequest, decide, divergence, load_policy, verify, verify_request

__all__ = [
    "InputError",
    "PETSchedule",
    "Policy",
    "Report",
    "RotationGate",
    "SO8TConfig",
    "SO8TLinear",
    "SO8TModel",
    "VerifyRequest",
    "attach",
    "bake",
    "bake_checkpoint",
    "decide",
    "detach",
    "divergence",
    "exp_so8",
    "export_oft",
    "gates",
    "import_oft",
    "load_adapter",
    "load_policy",
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
    "verify",
    "verify_request",
]


def __getattr__(name: str) -> Any:
    for package in (so8t_core, verification):
        if name in package.__all__:
            value = globals()[name] = getattr(package, name)
            return value
    raise AttributeError(f"module 'so8t' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
