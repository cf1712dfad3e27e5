"""manifest.json: the sha256 of every input and output of each step, so that a finished step is not run again.

A step is up to date when its settings and the digests of its inputs equal the stored ones and every output still has
its stored digest. The file is written whole after every step, so a killed run loses at most its current step.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from so8t_core.errors import InputError
from so8t_core.files import explain_os_errors, sha256_path, write_text

NAME = "manifest.json"
PACKAGES = ("so8t", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "gguf", "llama-cpp-python", "numpy")


class StepRecord(BaseModel):
    """One finished step."""

    model_config = ConfigDict(extra="forbid")

    key: dict[str, Any]  # the settings the step depends on
    inputs: dict[str, str]  # label: sha256
    outputs: dict[str, str]  # path relative to the run directory: sha256
    seconds: float
    finished: str  # ISO 8601, UTC
    seed: int
    versions: dict[str, str]


class Manifest(BaseModel):
    """All finished steps of a run directory."""

    model_config = ConfigDict(extra="forbid")

    schema_version: str = "1.0"
    steps: dict[str, StepRecord] = Field(default_factory=dict)

    def why_stale(self, name: str, key: dict[str, Any], inputs: dict[str, str], run_dir: Path) -> str | None:
        """The reason why a step has to run, in a few words; None when it is up to date."""
        record = self.steps.get(name)
        if record is None:
            return "not done yet"
        if record.key != json.loads(json.dumps(key)):
            changed = sorted(k for k in {*record.key, *key} if record.key.get(k) != key.get(k))
            return f"settings changed ({', '.join(changed)})"
        if record.inputs != inputs:
            changed = sorted(k for k in {*record.inputs, *inputs} if record.inputs.get(k) != inputs.get(k))
            return f"input changed ({', '.join(changed)})"
        for relative, digest in record.outputs.items():
            path = run_dir / relative
            if not path.exists():
                return f"{relative} is gone"
            if sha256_path(path) != digest:
                return f"{relative} was changed by something else"
        return None


def load_manifest(run_dir: Path) -> Manifest:
    """The manifest of a run directory; an empty manifest where the directory has no manifest.json.

    Raises:
        InputError: the file is damaged.
    """
    path = run_dir / NAME
    if not path.is_file():
        return Manifest()
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError):
        raise InputError(f"{path} is damaged; delete it to run every step again, the artefacts stay") from None


def save_manifest(manifest: Manifest, run_dir: Path) -> None:
    """Write the manifest, whole or not at all."""
    write_text(run_dir / NAME, manifest.model_dump_json(indent=1) + "\n")


def versions() -> dict[str, str]:
    """Versions of Python and of every package that decides a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run directory for this process.

    Raises:
        InputError: another run holds the directory, or it cannot be written.
    """
    with explain_os_errors(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        handle = open(run_dir / ".lock", "w")  # noqa: SIM115 (held until the block ends)
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another so8t run is working in {run_dir}; wait for it or choose another run_dir"
            ) from None
        yield
