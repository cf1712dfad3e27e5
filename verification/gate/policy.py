"""The policy: bounds, required legs and waivers that decide whether a file may be released, from a YAML file.

`default_policy.yaml` comments every key; a user's file replaces single keys of it. `decide` applies the policy.
"""

from __future__ import annotations

import functools
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from so8t_core.errors import InputError
from so8t_core.files import read_regular
from verification.gate.report import Check, LegName
from verification.gate.strict_yaml import MAX_NUMBER, read_yaml

DEFAULT_POLICY = Path(__file__).with_name("default_policy.yaml")


_SEE = f"every key is explained in {DEFAULT_POLICY}"
_MAX_BYTES = 1 << 16  # the default policy has 6,000 with its comments; PyYAML reads 100,000 in a second
_MAX_WAIVERS = 1000  # each failed check is compared with each waiver
# least values; every other bound is a largest value
_AT_LEAST = {"top1", "differs_from_base", "transposed", "positions", "chunks", "entropy", "alignment"}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _number(cls, given: Any, info: ValidationInfo) -> Any:
        """Refuse `true`, which would be read as 1: as nats or positions, every file keeps that bound."""
        if isinstance(given, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError("true and false are no bounds")
        if isinstance(given, int) and abs(given) >= MAX_NUMBER:
            raise ValueError("a bound has 64 bits at most")
        return given


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
    """Bounds of float files: logits and the worst weight in roundings."""

    rounding: float = Field(gt=0)
    BF16: LogitBounds  # for bfloat16 files, whose kernels round the activations too


class QuantiseBounds(_Section):
    """Numbers of tensors."""

    tensors_differ: int | None = Field(default=None, ge=0)  # None accepts any number of tensors judged healthy
    unexplained: int = Field(ge=0)
    output_error: float = Field(gt=0)  # divided by the error of llama.cpp's quantiser
    codes_error: float = Field(gt=0)  # squared, divided by that with the nearest codes
    kld_ratio: float = Field(gt=0)  # divided by the KLD of llama.cpp's quantisation


class ContractBounds(_Section):
    """Contract checks demand equality and have no bounds; fallback types are the one difference that can be allowed."""

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
    """A failure that is accepted, with a reason."""

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
    waivers: list[Waiver] = Field(default_factory=list, max_length=_MAX_WAIVERS)

    def bound(self, check: Check, kind: str) -> tuple[str, float | int | str] | None:
        """Relation and bound for a check about a file of the type `kind`; None if the policy has no such bound."""
        if check.name.startswith("contract.") or check.name.endswith(".non_finite"):
            return "<=", 0  # a count of disagreements; a bound stored in the report is ignored
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
            "quantise.codes_error": ("<=", self.quantise.codes_error),
            "quantise.kld_ratio": ("<=", self.quantise.kld_ratio),
            "controls.differs_from_base": (">=", self.controls.differs_from_base),
            # at least twice the bound of the bake leg: a loosened bake leg must still refuse the wrong bake
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
    """The default policy; the keys in the file replace its keys, section by section.

    Raises:
        InputError: missing, not YAML, unknown key, wrong type, waiver without a reason.
    """
    if path is None:
        return make_policy({})
    path = Path(path)
    try:
        raw = read_yaml(read_regular(path, most=_MAX_BYTES).decode("utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"policy {path} does not exist; start from {DEFAULT_POLICY}") from None
    except OSError as error:
        raise InputError(f"policy {path} cannot be read: {error.strerror}; {_SEE}") from None
    except ValueError as error:
        raise InputError(f"policy {path} cannot be read: {_line(str(error), 200)}; {_SEE}") from None
    return make_policy({} if raw is None else raw, source=str(path))


def make_policy(overrides: Any, *, source: str = "policy") -> Policy:
    """Validate a mapping of overrides; see `load_policy`.

    Raises:
        InputError: not a mapping, an unknown key, or a value out of its bounds.
    """
    if not isinstance(overrides, dict):
        raise InputError(f"{source} must be a mapping of keys, got {type(overrides).__name__}; {_SEE}")
    merged = dict(_defaults())
    for key, value in overrides.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = {**merged[key], **value} if both else value
    try:
        return Policy.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        where = _line(".".join(str(part) for part in first["loc"]), 200)
        known = f"unknown key, known are {', '.join(_keys_beside(first['loc']))}"
        what = known if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
        given = reprlib.repr(first.get("input"))
        raise InputError(f"{source}: `{where}` = {given}: {what}; {_SEE}") from None


def _keys_beside(place: tuple[int | str, ...]) -> list[str]:
    """The keys that are allowed in the section of a wrong key."""
    section: Any = _defaults()
    for part in place[:-1]:
        if part == "waivers":
            return list(Waiver.model_fields)
        section = section.get(part, LogitBounds.model_fields)  # a type in quality or cells that the default lacks
    return list(section)


def weaker(policy: Policy, than: Policy) -> list[str]:
    """The points in which a policy is weaker than another: looser bounds, added types, missing legs, waivers."""
    mine, theirs = policy.model_dump(), than.model_dump()
    found = [f"required without {leg}" for leg in theirs.pop("required") if leg not in mine["required"]]
    found += _looser(mine, theirs)
    return found + [f"waiver of {waiver.check}" for waiver in policy.waivers if waiver not in than.waivers]


def _looser(mine: dict[str, Any], theirs: dict[str, Any], above: str = "") -> list[str]:
    found = []
    for key, value in mine.items():
        name = f"{above}{key}"
        if isinstance(value, dict):
            found += _looser(value, theirs[key], f"{name}.") if key in theirs else [f"{name} added"]
        elif not isinstance(value, list):
            bound, other = (math.inf if x is None else x for x in (value, theirs[key]))  # None: any number
            if bound < other if key in _AT_LEAST else bound > other:
                found.append(f"{name} {bound:g} for {other:g}")
    return found


def _line(text: str, most: int) -> str:
    """Text from a file in one line of printable characters."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))[:most]


@functools.cache
def _defaults() -> Mapping[str, Any]:
    defaults: dict[str, Any] = yaml.safe_load(DEFAULT_POLICY.read_text(encoding="utf-8"))
    return defaults
