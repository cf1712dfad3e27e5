"""The benchmarks load and are found: they are run by hand, and would otherwise rot unseen."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest
from forked import forked

from benchmarks.side_by_side import comparisons, interleave, measured

ROOT = Path(__file__).parents[1]
MODULES = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem not in ("conftest", "__init__"))


@pytest.mark.parametrize("name", MODULES)
def test_every_benchmark_imports(name: str) -> None:
    importlib.import_module(f"benchmarks.{name}")


def test_the_command_of_tox_finds_them() -> None:
    tox = (ROOT / "tox.ini").read_text(encoding="utf-8")
    (line,) = [line for line in tox.splitlines() if line.startswith("commands = pytest benchmarks")]
    words = line.removeprefix("commands = ").removesuffix(" {posargs}").split()
    assert words[0] == "pytest"

    def collect() -> None:
        for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
            del os.environ[name]
        os.chdir(ROOT)
        sys.exit(int(pytest.main([*words[1:], "--collect-only", "-q", "-p", "no:cacheprovider"])))

    done = forked(collect)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bench_core.py::bench_exponential_forward" in done.stdout


def test_a_slower_peer_is_a_larger_ratio_and_a_bar_is_held_in_its_direction() -> None:
    seconds = {"ours": [1.0, 1.1, 0.9, 1.0], "peer": [8.0, 8.2, 7.9, 8.1]}
    (figure,) = comparisons("x", seconds, bar=3.0, lower_is_better=False)
    assert 7.4 < figure.quartiles[0] <= figure.ratio <= figure.quartiles[1] < 9.0
    assert figure.met
    (turned,) = comparisons("x", seconds, bar=0.1, lower_is_better=True)
    assert turned.ratio == pytest.approx(1 / figure.ratio, rel=0.01)
    assert not turned.met
    assert measured("memory", 2.0, bar=1.0).met is False
    assert measured("memory", 2.0).met is None


def test_every_round_runs_everyone_once_and_turns_the_order() -> None:
    order: list[str] = []
    runs = {name: (lambda: None, lambda _, name=name: order.append(name)) for name in "ab"}
    seconds = interleave(runs, rounds=3, warmup=0)
    assert "".join(order) == "abbaab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
