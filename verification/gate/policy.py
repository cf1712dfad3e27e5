"""What must hold before a file may be released: bounds, requirements and waivers, from a YAML file.

`default_policy.yaml` comments every key; a user's file is laid over it. What follows from it: `decision`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from so8t_core.errors import InputError
from verification.gate.report import Check, LegName

DEFAULT_POLICY = Path(__file__).with_name("default_policy.yaml")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BakeBounds(_Section):
    """Logit units, positions."""

    max_abs_logit: float = Field(gt=0)
    top1_disagreements: int = Field(ge=0)


class DtypeBounds(_Section):
    """Mean KLD in nats by saved type; the worst weight in roundings."""

    float32: float = Field(gt=0)
    float16: float = Field(gt=0)
    bfloat16: float = Field(gt=0)
    rounding: float = Field(gt=0)


class LogitBounds(_Section):
    """Mean KLD in nats; share of positions with the same most likely token."""

    mean_kld: float = Field(gt=0)
    top1: float = Field(ge=0, le=1)


class ConvertBounds(LogitBounds):
    """Of float files: logits and the worst weight in roundings."""

    rounding: float = Field(gt=0)
    BF16: LogitBounds  # of bfloat16 files, whose kernels round the activations too


class QuantiseBounds(_Section):
    """Numbers of tensors."""

    tensors_differ: int | None = Field(default=None, ge=0)  # None: any number that is judged healthy
    unexplained: int = Field(ge=0)
    output_error: float = Field(gt=0)  # in llama.cpp's own quantiser's


class ContractBounds(_Section):
    """What is equal or wrong has no bound; this is the one exception that can be allowed."""

    allow_fallback_types: bool


class ControlBounds(_Section):
    """Logit units that a control must exceed."""

    differs_from_base: float = Field(gt=0)
    transposed: float = Field(gt=0)


class EvidenceBounds(_Section):
    """Positions, chunks, nats, a share of ln V and a factor."""

    positions: int = Field(ge=1)
    chunks: int = Field(ge=2)
    entropy: float = Field(ge=0)
    entropy_share: float = Field(gt=0, le=1)
    alignment: float = Field(ge=1)


class Waiver(_Section):
    """A failure that is accepted, and why."""

    check: str = Field(min_length=1)
    subject: str | None = None  # a candidate's label; None = every candidate
    reason: str = Field(min_length=1, pattern=r"\S")  # spaces alone are no reason


class Policy(_Section):
    """All bounds; see `default_policy.yaml`."""

    required: list[LegName]
    bake: BakeBounds
    dtype: DtypeBounds
    convert: ConvertBounds
    quantise: QuantiseBounds
    quality: dict[str, LogitBounds]
    contract: ContractBounds
    controls: ControlBounds
    evidence: EvidenceBounds
    cells: dict[str, LogitBounds]
    waivers: list[Waiver] = Field(default_factory=list)

    def bound(self, check: Check) -> tuple[str, float | int | str] | None:
        """Relation and bound for a check, or None when the policy knows none."""
        if check.name.startswith("contract.") or check.name.endswith(".non_finite"):
            return "<=", 0  # a count of disagreements; what a stored report says its bound was does not matter
        kind = check.subject.split(" ")[0]  # "Q8_0 (name.gguf)" is a Q8_0
        quality = self.quality.get(kind)
        convert = self.convert.BF16 if kind == "BF16" else self.convert
        table: dict[str, tuple[str, float | int | str]] = {
            "bake.max_abs_logit": ("<=", self.bake.max_abs_logit),
            "bake.top1_disagreements": ("<=", self.bake.top1_disagreements),
            "dtype.rounding": ("<=", self.dtype.rounding),
            "convert.mean_kld": ("<=", convert.mean_kld),
            "convert.top1": (">=", convert.top1),
            "convert.rounding": ("<=", self.convert.rounding),
            "quantise.tensors_differ": ("<=", self.quantise.tensors_differ or 0),
            "quantise.unexplained": ("<=", self.quantise.unexplained),
            "quantise.output_error": ("<=", self.quantise.output_error),
            "controls.differs_from_base": (">=", self.controls.differs_from_base),
            # never below the bake leg's own bound: a loosened bake leg must still refuse the wrong bake
            "controls.transposed": (">=", max(self.controls.transposed, 2 * self.bake.max_abs_logit)),
            "evidence.positions": (">=", self.evidence.positions),
            "evidence.chunks": (">=", self.evidence.chunks),
            "evidence.entropy": (">=", self.evidence.entropy),
            "evidence.entropy_share": ("<=", self.evidence.entropy_share),
            "evidence.alignment": (">=", self.evidence.alignment),
            "evidence.repeat": ("<=", 0),
            "evidence.noise_floor": ("<=", self.convert.mean_kld),
        }
        for name in ("float32", "float16", "bfloat16"):
            table[f"dtype.mean_kld.{name}"] = ("<=", getattr(self.dtype, name))
        if quality:
            table["quality.mean_kld"] = ("<=", quality.mean_kld)
            table["quality.top1"] = (">=", quality.top1)
        if check.name.startswith("cells.") and kind in self.cells:
            table[check.name] = _cell_bound(check.name, self.cells[kind])
        return table.get(check.name)


def _cell_bound(name: str, bounds: LogitBounds) -> tuple[str, float]:
    return ("<=", bounds.mean_kld) if name.endswith(".mean_kld") else (">=", bounds.top1)


def load_policy(path: str | Path | None = None) -> Policy:
    """The default policy with the keys of a file laid over it, section by section.

    Raises:
        InputError: missing, not YAML, unknown key, wrong type, waiver without a reason.
    """
    if path is None:
        return make_policy({})
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"policy {path} does not exist; start from {DEFAULT_POLICY}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"policy {path} cannot be read: {' '.join(str(error).split())[:200]}") from None
    return make_policy({} if raw is None else raw, source=str(path))


def make_policy(overrides: Any, *, source: str = "policy") -> Policy:
    """Validate a mapping of overrides; see `load_policy`.

    Raises:
        InputError: no mapping, an unknown key, or a value out of its bounds.
    """
    if not isinstance(overrides, dict):
        raise InputError(f"{source} must be a mapping of keys, got {type(overrides).__name__}")
    merged = dict(_defaults())
    for key, value in overrides.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = {**merged[key], **value} if both else value
    try:
        return Policy.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        what = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
        raise InputError(f"{source}: `{where}` = {first.get('input')!r}: {what}") from None


@functools.cache
def _defaults() -> Mapping[str, Any]:
    defaults: dict[str, Any] = yaml.safe_load(DEFAULT_POLICY.read_text(encoding="utf-8"))
    return defaults
