"""SO8TConfig: the settings of one adapter, a rotation and an optional LoRA inside it, in one file.

The method "so8t" becomes a true member of PEFT's `PeftType` when this module is imported (transformers reads
`peft_type.value`, so a plain string is not enough). Field names are those of `adapter_config.json`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

import peft
from peft import LoraConfig, PeftConfig
from peft.utils import PeftType

from so8t_core.errors import InputError
from so8t_core.gate import Scale
from so8t_core.versions import check_version

METHOD = "SO8T"
ALL_LINEAR = "all-linear"
FORMAT_VERSION = 2  # of adapter_config.json; version 1 had `target` and neither scale nor shuffle
# LoRA options that keep its function W + s B A on the original W. Other options would make the bake inexact, or
# (init_lora_weights "pissa", "olora", ...) change W itself when the adapter is attached.
_EXACT_LORA = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "rank_pattern", "alpha_pattern"}
_EXACT_LORA |= {"init_lora_weights", "layers_to_transform", "layers_pattern", "task_type", "inference_mode"}
_EXACT_INITS = (True, False, "gaussian", "orthogonal")


def _add_peft_type() -> None:
    """Add `PeftType.SO8T`; an Enum cannot be subclassed once it has members, so its tables are extended."""
    if METHOD not in PeftType.__members__:
        member = str.__new__(PeftType, METHOD)
        member._name_, member._value_ = METHOD, METHOD
        setattr(PeftType, METHOD, member)
        PeftType._member_map_[METHOD] = member
        PeftType._member_names_.append(METHOD)
        PeftType._value2member_map_[METHOD] = member


check_version("peft", peft.__version__)
_add_peft_type()


@dataclass
class SO8TConfig(PeftConfig):
    """The rotated layers, the rotation's options and an optional LoRA.

    Args:
        layers: decoder layers that get a rotation; None = all; negative indices count from the end.
        init_scale: standard deviation of theta at the start, radians; 0 = exactly the identity.
        targets: names of the linear layers inside a decoder layer whose input is rotated, or "all-linear".
        target: short for `targets=[target]`, as format version 1 wrote it; None once the config is made.
        share: one rotation for the targets of a layer that read the same tensor (q, k and v; gate and up).
        scale: a learned positive factor for every channel or block of the input, before the rotation.
        shuffle: a second rotation, of eight channels from distant blocks each.
        accumulate: keep earlier rotations as a product beside theta, so that a training may start theta anew.
        lora: `LoraConfig` arguments (r, lora_alpha, target_modules, ...) of a LoRA inside the rotation, or None.

    Raises:
        InputError: a negative or non-finite init_scale, layers that are not integers, targets that are not names, an
            unknown scale, a newer format, or LoRA arguments that are wrong or that the bake cannot fold exactly.
    """

    layers: list[int] | None = None
    init_scale: float = 0.0
    targets: list[str] | str = field(default_factory=lambda: ["o_proj"])
    target: str | None = None
    share: bool = True
    scale: Scale = "none"
    shuffle: bool = False
    accumulate: bool = False
    lora: dict[str, Any] | None = None
    shared: dict[str, list[str]] | None = field(
        default=None, metadata={"help": "derived: the module that owns a shared rotation, and those that follow it"}
    )
    format_version: int = FORMAT_VERSION
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "derived: targets and LoRA's own; not read"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[METHOD]
        if not 0 <= self.init_scale < float("inf"):
            raise InputError(f"init_scale must be a finite number >= 0, got {self.init_scale}")
        if self.layers is not None:
            self.layers = list(self.layers)
            if not all(type(layer) is int for layer in self.layers):
                raise InputError(f"layers must be integers, e.g. [0, 3, -1], or null for all; got {self.layers}")
        if self.format_version not in range(1, FORMAT_VERSION + 1):
            raise InputError(
                f"format_version is {self.format_version}, this SO8T reads 1 to {FORMAT_VERSION}; install a newer one"
            )
        self.format_version = FORMAT_VERSION
        self._set_targets()
        if self.scale not in get_args(Scale):
            raise InputError(f"scale must be one of {', '.join(get_args(Scale))}; got {self.scale!r}")
        self._lora_config = None if self.lora is None else _lora_config(self.lora)
        if self._lora_config is not None:
            self.lora = {**(self.lora or {}), "target_modules": sorted(self._lora_config.target_modules)}
        self.name_modules([] if isinstance(self.targets, str) else self.targets)

    def _set_targets(self) -> None:
        """Bring `target` and `targets` into one form."""
        if self.target is not None:
            self.targets, self.target = [self.target], None
        if self.targets != ALL_LINEAR:
            names = [self.targets] if isinstance(self.targets, str) else list(self.targets)
            if not names or not all(isinstance(name, str) and name for name in names):
                raise InputError(
                    f"targets must be names of linear layers, e.g. ['o_proj', 'down_proj'], or {ALL_LINEAR!r}; "
                    f"got {self.targets!r}"
                )
            self.targets = list(dict.fromkeys(names))

    def name_modules(self, targets: list[str]) -> None:
        """Set PEFT's `target_modules`: the rotated modules and the LoRA's."""
        lora = set() if self._lora_config is None else set(self._lora_config.target_modules)
        self.target_modules = sorted(lora | set(targets)) or [ALL_LINEAR]

    @property
    def lora_config(self) -> LoraConfig | None:
        """PEFT's config of the LoRA inside, in inference mode if this config is; no field, so that it is saved once."""
        if self._lora_config is not None:
            self._lora_config.inference_mode = self.inference_mode
        return self._lora_config


def _lora_config(arguments: dict[str, Any]) -> LoraConfig:
    default = LoraConfig()
    for name, value in arguments.items():
        if name not in _EXACT_LORA and value != getattr(default, name, None):
            raise InputError(
                f"lora.{name}={value!r} is not supported: the bake could not fold it exactly; leave it out"
            )
    try:
        config = LoraConfig(**arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"lora: {error}") from None
    if config.init_lora_weights not in _EXACT_INITS:
        raise InputError(
            f"lora.init_lora_weights must be one of {_EXACT_INITS}, got {config.init_lora_weights!r}: "
            "other methods change the base weights, and a bake from the original checkpoint would be wrong"
        )
    if not config.r > 0:
        raise InputError(f"lora.r must be at least 1, got {config.r}")
    if not isinstance(config.target_modules, set) or not config.target_modules:
        raise InputError("lora.target_modules must be a non-empty list of layer names, e.g. ['q_proj', 'o_proj']")
    return config
