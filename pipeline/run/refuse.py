"""Refuse a run, before its first step, that would fail in a late step: weights, packages, the converter."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.run.estimate import Shape, shape_of
from so8t_core.checkpoint_admission import admit_checkpoint
from so8t_core.errors import InputError

_PACKAGES = {"llama_cpp": "llama-cpp-python", "gguf": "gguf", "peft": "peft", "accelerate": "accelerate"}


def refuse_early(config: RunConfig, base_dir: Path, *, trains: bool, converts: bool) -> None:
    """Refuse a run with a step that must fail.

    Args:
        trains, converts: whether the run reaches these steps.

    Raises:
        InputError: weights are missing or cut; a layer, target or package does not exist; the converter is missing or
            does not know the architecture.
    """
    problems = missing_weights(base_dir)
    if trains and not problems:
        problems, _ = missing_tools(config, shape_of(base_dir, config.train), converts=converts)
    if problems:
        raise InputError(problems[0])


def missing_weights(directory: Path) -> list[str]:
    """The faults of a checkpoint's weights: missing, damaged (the header shows a cut file), or quantised."""
    try:
        admit_checkpoint(directory)
    except InputError as error:
        return [str(error)]
    return []


def missing_tools(config: RunConfig, shape: Shape | None, *, converts: bool) -> tuple[list[str], list[str]]:
    """(problems, notes) about packages, the converter, and whether the converter knows the architecture."""
    from verification.engines.convert import cache_directory, find_converter
    from verification.engines.program_digests import SCRIPT

    wanted = dict(_PACKAGES)
    if config.train.quantization != "none":
        wanted["bitsandbytes"] = "bitsandbytes"
    problems = [
        f"the package {package} is not installed; pip install {package}"
        for module, package in wanted.items()
        if importlib.util.find_spec(module) is None
    ]
    if not converts:
        return problems, []
    home = cache_directory()
    if config.convert.converter or os.environ.get("SO8T_CONVERTER"):
        try:
            home = find_converter(config.convert.converter)
        except InputError as error:
            return [*problems, str(error)], []
    if not (home / SCRIPT).is_file():
        return problems, ["upstream's converter is not here yet; the first conversion installs it with pip"]
    if shape is not None and not _knows(home, shape.name):
        problems.append(f"the converter in {home} does not know {shape.name}; give a newer one as convert.converter")
    return problems, []


def _knows(home: Path, architecture: str) -> bool:
    """Whether the converter's source names the architecture."""
    sources = [home / "convert_hf_to_gguf.py", *(home / "conversion").glob("*.py")]
    return any(f'"{architecture}"' in path.read_text(encoding="utf-8") for path in sources if path.is_file())
