"""SO8TConfig: one adapter, one config, one file for the rotation and an optional LoRA inside it.

The method "so8t" becomes a true member of PEFT's `PeftType` when this module is imported (transformers reads
`peft_type.value`, so a plain string is not enough). Field names are those of `adapter_config.json`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils import PeftType

from so8t_core.errors import InputError

METHOD = "SO8T"


def _add_peft_type() -> PeftType:
    """Add `PeftType.SO8T`; an Enum cannot be subclassed once it has members, so its tables are extended."""
    if METHOD not in PeftType.__members__:
        member = str.__new__(PeftType, METHOD)
        member._name_, member._value_ = METHOD, METHOD
        setattr(PeftType, METHOD, member)
        PeftType._member_map_[METHOD] = member
        PeftType._member_names_.append(METHOD)
        PeftType._value2member_map_[METHOD] = member
    return PeftType[METHOD]


_add_peft_type()


@dataclass
class SO8TConfig(PeftConfig):
    """What is rotated, and where.

    Args:
        layers: decoder layers that get a rotation; None = all; negative indices count from the end.
        init_scale: standard deviation of theta at the start, radians; 0 = exactly the identity.
        target: name of the rotated linear layer inside a decoder layer.
        lora: `LoraConfig` arguments (r, lora_alpha, target_modules, ...) of a LoRA inside the rotation, or None.

    Raises:
        InputError: a negative or non-finite init_scale, or LoRA arguments that the bake cannot fold exactly.
    """

    layers: list[int] | None = None
    init_scale: float = 0.0
    target: str = "o_proj"
    lora: dict[str, Any] | None = None
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "derived: target and LoRA's own; not read"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[METHOD]
        if not 0 <= self.init_scale < float("inf"):
            raise InputError(f"init_scale must be a finite number >= 0, got {self.init_scale}")
        if self.layers is not None:
            self.layers = [int(layer) for layer in self.layers]
        self.lora_config: LoraConfig | None = None  # not a field: built from `lora`, never saved twice
        lora_modules: set[str] = set()
        if self.lora is not None:
            self.lora_config = LoraConfig(**self.lora)
            self.lora_config.inference_mode = self.inference_mode
            for option in (
                "use_dora",
                "fan_in_fan_out",
                "target_parameters",
                "modules_to_save",
                "exclude_modules",
                "layer_replication",
            ):
                if getattr(self.lora_config, option, None):
                    raise InputError(
                        f"lora.{option} is not supported: the bake could not fold it exactly; leave it out"
                    )
            if self.lora_config.bias != "none":
                raise InputError(f"lora.bias must be 'none', got {self.lora_config.bias!r}")
            if not isinstance(self.lora_config.target_modules, set) or not self.lora_config.target_modules:
                raise InputError(
                    "lora.target_modules must be a non-empty list of layer names, e.g. ['q_proj', 'o_proj']"
                )
            lora_modules = self.lora_config.target_modules
            self.lora = {**self.lora, "target_modules": sorted(lora_modules)}
        self.target_modules = sorted(lora_modules | {self.target})
