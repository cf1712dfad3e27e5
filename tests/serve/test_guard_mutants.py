"""Mutation test of the guard: every small change to its source is caught by a law."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from guard_laws import LAWS, law_silence
from mutation import load, mutants

from pipeline.serve import guard

SOURCE = Path(str(guard.__file__))


def survivors(source: Path, laws: Iterable[object]) -> tuple[list[str], int]:
    """Keys of the mutants that no law catches, and how many there were."""
    alive, count = [], 0
    for mutant in mutants(source):
        count += 1
        try:
            module = load(mutant.source, "guard_mutant")
            for law in laws:
                law(module)  # type: ignore[operator]
        except Exception:
            continue
        alive.append(mutant.key)
    return alive, count


def test_laws_hold_for_the_source_read_back() -> None:
    for law in LAWS.values():
        law(load(SOURCE.read_text(encoding="utf-8"), "guard_again"))


@pytest.mark.soak
def test_no_mutant_of_the_guard_survives() -> None:
    alive, count = survivors(SOURCE, LAWS.values())
    assert alive == []
    assert count > 150


@pytest.mark.soak
def test_mutants_survive_laws_that_are_too_few() -> None:
    alive, count = survivors(SOURCE, [law_silence])
    assert len(alive) > count // 4
