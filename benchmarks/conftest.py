"""The `figures` fixture: what a benchmark measures goes into one table at the end and one dated JSON file."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.side_by_side import Comparison, Run, compare

_FIGURES: list[Comparison] = []
RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="a third of the rounds")
    parser.addoption("--save", action="store_true", help="write benchmarks/results/DATE-MACHINE.json")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread: the ratios are those of the arithmetic, not of two schedulers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Callable[..., list[Comparison]]:
    """`compare`, whose results are kept for the table."""

    def run(name: str, contenders: dict[str, Run], *, rounds: int, **rest: Any) -> list[Comparison]:
        rounds = max(5, rounds // 3) if request.config.getoption("--quick") else rounds
        found = compare(name, contenders, rounds=rounds, **rest)
        _FIGURES.extend(found)
        return found

    return run


@pytest.fixture
def record() -> Callable[[Comparison], None]:
    """Keep a figure that was not measured by `compare` (bytes, memory)."""
    return _FIGURES.append


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _FIGURES:
        return
    table = Table(title="Side by side: interleaved rounds, medians, quartiles in brackets")
    for heading in ("figure", "against", "ours ms", "theirs ms", "ratio", "bar"):
        table.add_column(heading, justify="left" if heading in ("figure", "against") else "right")
    for figure in _FIGURES:
        low, high = figure.quartiles
        bar = (
            ""
            if figure.bar is None
            else f"{'<=' if figure.lower_is_better else '>='} {figure.bar:g} {'met' if figure.met else 'MISSED'}"
        )
        ours, theirs = figure.milliseconds.get(figure.ours), figure.milliseconds.get(figure.peer)
        table.add_row(
            figure.name,
            figure.peer,
            "" if ours is None else f"{ours:.3g}",
            "" if theirs is None else f"{theirs:.3g}",
            f"{figure.ratio:.3g} [{low:.3g}, {high:.3g}]",
            bar,
        )
    Console(width=160).print(table)
    if config.getoption("--save"):
        now = datetime.now(UTC)
        system = machine()
        name = "".join(c if c.isalnum() else "-" for c in f"{system['cpu']}-{system['cores']}-cores").lower()
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{now:%Y-%m-%d}-{name}.json"
        document = {"date": f"{now:%Y-%m-%dT%H:%M:%SZ}", "machine": system, "figures": [f.to_dict() for f in _FIGURES]}
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        terminalreporter.write_line(f"written: {path}")
