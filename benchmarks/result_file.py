"""The result file of a benchmark run: every figure with all its rounds, the machine and the commit.

The file is `benchmarks/results/DATE-MACHINE.json`, versioned; `page` makes the page beside it, `compare` reads two
files. pytest-benchmark describes machine and commit; names of the host and of persons are left out.
"""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from benchmarks.number_type import has_bfloat16
from benchmarks.side_by_side import Comparison
from so8t_core.errors import InputError

SCHEMA_VERSION = "2.0"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "llama-cpp-python", "gguf", "numpy")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Machine(_Model):
    """The machine of a run. The first four fields and `bfloat16` decide whether two files may be compared."""

    cpu: str
    cores: int
    capability: str  # of the vector unit, as torch names it
    gpu: str | None
    memory_gb: float
    cache: dict[str, int | str] = Field(default_factory=dict)
    bfloat16: bool  # see `number_type`
    system: str
    python: str
    packages: dict[str, str]
    load: float | None = None  # when the file was written

    def same_as(self, other: Machine) -> bool:
        """Whether ratios of both machines may be compared."""
        mine, yours = ((m.cpu, m.cores, m.capability, m.bfloat16, m.gpu) for m in (self, other))
        return mine == yours

    def __str__(self) -> str:
        unit = f"{self.capability} + bfloat16" if self.bfloat16 else self.capability
        return f"{self.cpu}, {self.cores} cores, {unit}, {self.gpu or 'no GPU'}"


class Figure(_Model):
    """One `Comparison` with all its rounds."""

    name: str
    ours: str
    peer: str
    ratio: float = Field(gt=0)
    quartiles: tuple[float, float]
    milliseconds: dict[str, float]
    sizes: dict[str, float] = Field(default_factory=dict)
    rounds: int = Field(ge=1)
    bar: float | None = None
    met: bool | None = None
    lower_is_better: bool
    notes: dict[str, Any] = Field(default_factory=dict)
    group: str = ""
    ratios: list[float] = Field(min_length=1)

    @field_validator("ratios")
    @classmethod
    def _positive(cls, ratios: list[float]) -> list[float]:
        if min(ratios) <= 0:
            raise ValueError(f"a ratio of {min(ratios)} is no ratio of two times")
        return ratios

    @property
    def key(self) -> str:
        """The figure's key, the same in every run."""
        return f"{self.name} | {self.ours} | {self.peer}"


class Results(_Model):
    """The whole file."""

    schema_version: str = SCHEMA_VERSION
    date: str
    commit: str
    changed: bool  # whether the working tree differed from the commit
    quick: bool
    planted: float = 1.0  # a slowdown that was added on purpose
    seconds: float = 0.0  # duration of the run
    cpu_seconds: float = 0.0  # of the run and its child processes; far below `seconds` on a busy machine
    machine: Machine
    figures: list[Figure]
    absent: dict[str, str] = Field(default_factory=dict)  # figures that could not be measured here, with the reason


def machine() -> Machine:
    """This machine."""
    import torch
    from pytest_benchmark.plugin import pytest_benchmark_generate_machine_info

    found = pytest_benchmark_generate_machine_info()
    cpu = found["cpu"]
    return Machine(
        cpu=str(cpu.get("brand_raw") or found["processor"] or found["machine"]),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        capability=torch.backends.cpu.get_cpu_capability(),
        gpu=torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        memory_gb=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        cache={name: cpu[name] for name in ("l2_cache_size", "l3_cache_size") if name in cpu},
        bfloat16=has_bfloat16(),
        system=platform.system(),
        python=platform.python_version(),
        packages={name: found for name in PACKAGES if (found := _version(name))},
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def make(figures: list[Comparison], *, quick: bool, planted: float, seconds: float, absent: dict[str, str]) -> Results:
    """The file's content, dated now."""
    from pytest_benchmark.utils import get_commit_info

    commit = get_commit_info()
    return Results(
        date=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        commit=str(commit["id"]),
        changed=bool(commit["dirty"]),
        quick=quick,
        planted=planted,
        seconds=round(seconds, 1),
        cpu_seconds=round(sum(os.times()[:4]), 1),
        machine=machine(),
        figures=[Figure(**figure.to_dict()) for figure in figures],
        absent=absent,
    )


def file_name(results: Results) -> str:
    """DATE-MACHINE.json; a quick run has another name, so that it never replaces a whole run."""
    text = f"{results.machine.cpu}-{results.machine.cores}-cores{'-quick' if results.quick else ''}"
    plain = "".join(c if c.isalnum() else "-" for c in text).lower()
    while "--" in plain:
        plain = plain.replace("--", "-")
    return f"{results.date[:10]}-{plain}.json"


def to_json(results: Results) -> str:
    """JSON with five digits, and a figure's rounds on one line."""
    document = results.model_dump(mode="json", exclude={"figures"})
    lines = [json.dumps(_rounded(figure.model_dump(mode="json"))) for figure in results.figures]
    head = json.dumps(_rounded(document), indent=1)[:-2]
    return head + ',\n "figures": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def read(path: Path) -> Results:
    """A result file.

    Raises:
        InputError: no such file, no JSON, another schema version, or a wrong field.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    found = document.get("schema_version", "none") if isinstance(document, dict) else "none"
    if found != SCHEMA_VERSION:
        raise InputError(
            f"{path} has schema version {found}, this reads {SCHEMA_VERSION}; measure again: tox -e bench -- --save"
        )
    try:
        results = Results(**document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{path} is no result file: {where}: {first['msg']}") from None
    keys = [figure.key for figure in results.figures]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise InputError(f"{path} holds the figure {twice!r} twice; one of them must go")
    return results
