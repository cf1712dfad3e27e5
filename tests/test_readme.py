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


def test_it_is_read_in_one_sitting() -> None:
    assert len(README.splitlines()) <= 120


def test_the_picture_is_there_and_small() -> None:
    picture = (ROOT / "docs" / "report.png").read_bytes()
    assert picture[:4] == b"\x89PNG"
    assert len(picture) < 200_000


def test_the_original_project_is_named_and_led_on() -> None:
    [line] = [line for line in README.splitlines() if "Borea-Phi-3.5-mini-Instruct-Jp SO8T/thinking" in line]
    assert "(docs/original.md)" in line
    assert "`configs/borea_phi35_so8t_thinking.yaml`" in line


@pytest.mark.parametrize("heading", ["What was measured", "Planted faults"])
def test_a_number_has_its_place(heading: str) -> None:
    """Every place letter of a table is explained below it, with a processor and a day."""
    text = README.split(f"## {heading}")[1].split("\n## ")[0]
    used = set(re.findall(r"\| ([A-Z]) \|", text)) | set(re.findall(r"\(place ([A-Z])\)", text))
    assert used
    for letter in used:
        said = re.search(rf"^.*\b{letter}: (.*?)(?:\b[A-Z]: |\n\n)", README, re.M | re.S)
        assert said is not None
        assert re.search(r"EPYC|Xeon", said[1])
        assert re.search(r"20\d\d-\d\d-\d\d", said[1])
