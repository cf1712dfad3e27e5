"""The README stays true: CI runs its very test command, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """The lines of the first shell block that are no comments."""
    block = re.search(r"```sh\n(.*?)```", README, re.S)
    assert block is not None
    return [line for line in block[1].splitlines() if not line.startswith("#")]


def test_two_commands_and_ci_runs_the_second() -> None:
    demo, tests = commands()
    assert demo.endswith("tox -q -e demo")
    assert tests in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:configs|tests|verification|docs)/[\w./]+)`", README))))
def test_named_files_exist(path: str) -> None:
    assert (ROOT / path).exists()


def test_the_picture_is_there() -> None:
    assert (ROOT / "docs" / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_python_names_are_public() -> None:
    import so8t_core
    import verification

    for module, names in re.findall(r"^from (so8t_core|verification) import (.+)$", README, re.M):
        package = {"so8t_core": so8t_core, "verification": verification}[module]
        assert all(hasattr(package, name.strip()) for name in names.split(",")), names
