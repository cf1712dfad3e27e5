"""The `figures` fixture: a benchmark's figures go into one table at the end, one dated JSON file and its page."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.side_by_side import Comparison, Run, compare

_FIGURES: list[Comparison] = []
_ABSENT: dict[str, str] = {}
_START = time.monotonic()
RESULTS = Path(__file__).parent / "results"
MORE_SECONDS, MORE_SECONDS_QUICK = 12.0, 1.0  # time for more rounds of a noisy figure


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="fewer rounds and smaller models, under three minutes")
    parser.addoption("--save", action="store_true", help="write benchmarks/results/DATE-MACHINE.json and .html")
    parser.addoption("--save-to", type=Path, help="write the result file and its page here instead")
    parser.addoption("--plant", type=float, default=1.0, help="slow our side of every timed figure, 1.3: by 30 %%")
    parser.addoption("--more", type=float, help="seconds a figure may add to reach its precision (12; quick: 1)")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread, so that the ratios compare arithmetic and not schedulers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether the run should end within three minutes."""
    return bool(request.config.getoption("--quick"))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as an ordinary bfloat16 checkpoint."""
    from pipeline.base_model import prepare_base
    from pipeline.config import DEMO_MODEL

    return prepare_base(DEMO_MODEL, tmp_path_factory.mktemp("models") / "smollm2")


@pytest.fixture(scope="session")
def tokenizer_dir(quick: bool, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with SmolLM2's tokenizer and chat template; a quick run does not unpack the model for it."""
    if not quick:
        return Path(request.getfixturevalue("smollm2"))
    from transformers import AutoTokenizer

    from pipeline.base_model import demo_file

    folder = tmp_path_factory.mktemp("models") / "tokenizer"
    AutoTokenizer.from_pretrained(str(demo_file().parent), gguf_file=demo_file().name).save_pretrained(folder)
    return folder


@pytest.fixture
def figures(request: pytest.FixtureRequest, quick: bool, record: Callable[[Comparison], None]) -> Any:
    """`compare`; its results are kept for the table."""
    more = request.config.getoption("--more")
    options = {
        "more_seconds": more if more is not None else MORE_SECONDS_QUICK if quick else MORE_SECONDS,
        "slowed": request.config.getoption("--plant"),
    }

    def run(name: str, contenders: dict[str, Run], *, rounds: int, **rest: Any) -> list[Comparison]:
        rounds = max(5, rounds // 3) if quick else rounds
        found = compare(name, contenders, rounds=rounds, **{**options, **rest})
        for figure in found:
            record(figure)
        return found

    return run


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[Comparison], None]:
    """Keep a figure that was not measured by `compare` (bytes, memory)."""
    group = request.module.__name__.rpartition("bench_")[2]
    return lambda figure: _FIGURES.append(replace(figure, group=group))


@pytest.fixture
def absent() -> Callable[[str, str], None]:
    """Record that a figure cannot be measured here and why, for table, file and page; then skip."""

    def say(name: str, why: str) -> None:
        _ABSENT[name] = why
        pytest.skip(f"{name}: {why}")

    return say


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _FIGURES and not _ABSENT:
        return
    table = Table(title="Side by side: interleaved rounds, medians, quartiles in brackets, range")
    for heading in ("figure", "against", "ours", "theirs", "ratio", "range", "rounds", "bar"):
        table.add_column(heading, justify="left" if heading in ("figure", "against") else "right")
    for figure in _FIGURES:
        low, high = figure.quartiles
        bar = (
            ""
            if figure.bar is None
            else f"{'<=' if figure.lower_is_better else '>='} {figure.bar:g} {'met' if figure.met else 'MISSED'}"
        )
        table.add_row(
            figure.name,
            figure.peer,
            amount(figure, figure.ours),
            amount(figure, figure.peer),
            f"{figure.ratio:.3g} [{low:.3g}, {high:.3g}]",
            f"{min(figure.ratios):.3g} - {max(figure.ratios):.3g}" if len(figure.ratios) > 1 else "",
            str(figure.rounds),
            bar,
        )
    Console(width=180).print(table)
    terminalreporter.write_line(f"{time.monotonic() - _START:.0f} s, {sum(os.times()[:4]):.0f} s of CPU")
    for name, why in _ABSENT.items():
        terminalreporter.write_line(f"not measured: {name}: {why}")
    if config.getoption("--save") or config.getoption("--save-to"):
        _save(terminalreporter, config)


def amount(figure: Comparison, who: str) -> str:
    """Time or memory of one contender, with its unit."""
    if who in figure.milliseconds:
        return f"{figure.milliseconds[who]:.3g} ms"
    return f"{figure.sizes[who]:.4g} MB" if who in figure.sizes else ""


def _save(terminalreporter: Any, config: pytest.Config) -> None:
    from benchmarks.page import page
    from benchmarks.result_file import file_name, make, to_json
    from so8t_core.files import write_text

    results = make(
        _FIGURES,
        quick=config.getoption("--quick"),
        planted=config.getoption("--plant"),
        seconds=time.monotonic() - _START,
        absent=_ABSENT,
    )
    path = config.getoption("--save-to") or RESULTS / file_name(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, to_json(results))
    write_text(path.with_suffix(".html"), page(results))
    terminalreporter.write_line(f"written: {path} and {path.with_suffix('.html').name}")
