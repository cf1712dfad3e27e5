"""Load the arms of a study: `study.yaml` holds the settings that all arms share, every other file is one arm.

An arm is a method and a few `train` keys of a run's configuration, which replace the shared keys; all other settings
are the same for all arms. LoRA alone and PEFT's OFT are not SO8T adapters but stock PEFT.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.config import ConfigError, RunConfig, TrainConfig, describe_errors

STUDY_NAME = "study.yaml"
BASE = "base"  # the arm without training; every other arm is also compared with it


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Tuning(_Section):
    """The choice of learning rates: on other rows than the study's, validated on some of the training families."""

    seed: int = Field(ge=0)
    steps: int = Field(ge=1)
    validation_rows: int = Field(ge=1)
    every: int = Field(ge=2)  # each `every`-th of the training families is kept for validation
    grid: dict[str, list[float]]  # arm: learning rates


class CostPlan(_Section):
    """The measurement of time and memory: interleaved rounds, each arm in a separate process."""

    rounds: int = Field(ge=2)
    steps: int = Field(ge=2)  # timed steps in a round, after an untimed one


class Selection(_Section):
    """Successive halving on separate seeds; it chooses the arms and rates for the confirmation.

    `steps` are the rungs. On every rung each remaining arm is trained at rates a factor of two apart, from its own
    start outwards until the best rate has a worse neighbour on both sides; the better half of the arms goes on.
    """

    seeds: list[int] = Field(min_length=1)
    steps: list[int] = Field(min_length=1)
    widest: int = Field(ge=1)  # factors of two, up or down from an arm's start, before the search gives up
    text_chunks: int = Field(ge=2)  # of general text, for the forgetting
    rate_factors: list[float] = Field(min_length=2)  # of the chosen rate: points of a finalist's curve


class Study(_Section):
    """The settings that all arms share."""

    seeds: list[int] = Field(min_length=2)  # of training rows, initial weights and order of batches
    heldout_seed: int = Field(ge=0)  # the held-out rows are the same for all arms and seeds
    base_dtype: Literal["float32", "bfloat16"]  # of the frozen base during training
    comparisons: list[tuple[str, str]]  # [arm, against]
    tuning: Tuning
    selection: Selection | None = None  # a study of forms at equal budgets; null = a study of the given arms
    cost: CostPlan
    run: dict[str, Any]  # keys of a run's configuration

    @model_validator(mode="after")
    def _seeds_differ(self) -> Study:
        apart = [self.heldout_seed, self.tuning.seed, *(self.selection.seeds if self.selection else [])]
        if len(set(self.seeds)) != len(self.seeds) or set(apart) & set(self.seeds):
            raise ValueError("seeds, heldout_seed, tuning.seed and selection.seeds must all differ")
        return self


Method = Literal["none", "lora", "so8t", "oft", "peft"]


class _ArmFile(_Section):
    title: str
    method: Method
    budget: str | None = None  # for example "60k"; arms of one budget are compared
    peft: dict[str, Any] | None = None  # for the method peft: `peft_type` and the arguments of its config
    train: dict[str, Any] = Field(default_factory=dict)


class Arm(_Section):
    """One arm, resolved."""

    name: str
    title: str
    method: Method
    config: RunConfig
    budget: str | None = None
    peft: dict[str, Any] | None = None

    @property
    def train(self) -> TrainConfig:
        return self.config.train


def load_study(directory: Path) -> tuple[Study, dict[str, Arm]]:
    """The study and its arms, base first, then by name.

    Raises:
        ConfigError: a missing or wrong file, a comparison of arms that do not exist, or no base arm.
    """
    study = _validated(Study, directory / STUDY_NAME)
    arms = {}
    for path in sorted(directory.glob("*.yaml"), key=lambda p: (p.stem != BASE, p.stem)):
        if path.name == STUDY_NAME:
            continue
        given = _validated(_ArmFile, path)
        shared = study.run.get("train", {})
        try:
            config = RunConfig.model_validate({**study.run, "train": {**shared, **given.train}})
        except ValidationError as error:
            raise ConfigError(f"{path}: {describe_errors(error)}") from None
        _check_method(path, given, config.train)
        arms[path.stem] = Arm(name=path.stem, config=config, **given.model_dump(exclude={"train"}))
    if arms.get(BASE) is None or arms[BASE].method != "none":
        raise ConfigError(f"{directory} needs {BASE}.yaml with method: none; every arm is held against it")
    named = {name for pair in study.comparisons for name in pair} | set(study.tuning.grid)
    if unknown := sorted(named - set(arms)):
        raise ConfigError(f"{directory / STUDY_NAME} names {unknown[0]}, but the arms are {', '.join(arms)}")
    if study.selection is not None and (lost := [a.name for a in arms.values() if a.name != BASE and not a.budget]):
        raise ConfigError(f"{directory / lost[0]}.yaml needs `budget`: arms are selected among those of one budget")
    return study, arms


def _check_method(path: Path, given: _ArmFile, train: TrainConfig) -> None:
    if given.method == "lora" and train.lora is None:
        raise ConfigError(f"{path}: method lora needs `train.lora`")
    if (given.method == "peft") != (given.peft is not None):
        raise ConfigError(f"{path}: method peft, and only that one, needs `peft` with a `peft_type`")
    if given.method == "oft" and train.lora is not None:
        raise ConfigError(f"{path}: method oft has no LoRA inside; set `train.lora: null`")


def _validated(model: type[Any], path: Path) -> Any:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        return model.model_validate(raw)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; the study's own is configs/study") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe_errors(error)}") from None
