"""The study's three figures as SVG files: every run, the paired differences, the losses in training."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from benchmarks.study.arms import BASE
from benchmarks.study.statistics import METRICS, Metric, difference, values
from so8t_core.files import atomic_file

_RC = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}
_PLAIN, _PET, _GREY = "#1f5fa8", "#c4581b", "#777777"
SMOOTHED = 5  # steps in a running mean of the loss


def write_figures(results: dict[str, Any], folder: Path) -> None:
    """Write arms.svg, differences.svg and losses.svg."""
    _save(folder / "arms.svg", (10, 6), lambda figure: _panels(figure, results, _arms_panel))
    _save(folder / "differences.svg", (10, 5), lambda figure: _panels(figure, results, _differences_panel))
    _save(folder / "losses.svg", (8, 3.2), lambda figure: _losses(figure, results))


def _save(path: Path, inches: tuple[float, float], draw: Callable[[Figure], None]) -> None:
    with mpl.rc_context({**_RC, "svg.hashsalt": path.stem}), atomic_file(path) as temporary:
        figure = Figure(figsize=inches, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None}, facecolor="white")


def _panels(figure: Figure, results: dict[str, Any], panel: Callable[..., list[str]]) -> None:
    axes = figure.subplots(2, 3, sharey=True)
    for number, (axis, metric) in enumerate(zip(axes.flat, METRICS, strict=True)):
        names = panel(axis, results, metric)
        axis.set_title(metric.title, fontsize=9, loc="left")
        if number == 0:
            axis.set_yticks(range(len(names)), names)
            axis.invert_yaxis()
        axis.grid(axis="y", visible=False)


def _arms_panel(axis: Any, results: dict[str, Any], metric: Metric) -> list[str]:
    runs, seeds = results["runs"], results["seeds"]
    for row, name in enumerate(results["arms"]):
        found = values(runs, name, metric, seeds)
        colour = _GREY if name == BASE else _PET if name.endswith("_pet") else _PLAIN
        axis.plot(found, [row] * len(found), "o", ms=4, color=colour, alpha=0.65)
        axis.plot(statistics.fmean(found), row, "|", ms=12, mew=1.6, color=colour)
        if name == BASE:
            axis.axvline(found[0], color=_GREY, lw=0.8, ls=":")
    return [arm["title"] for arm in results["arms"].values()]


def _differences_panel(axis: Any, results: dict[str, Any], metric: Metric) -> list[str]:
    runs, seeds = results["runs"], results["seeds"]
    titles = {name: arm["title"] for name, arm in results["arms"].items()}
    axis.axvline(0, color=_GREY, lw=0.8)
    for row, (arm, against) in enumerate(results["comparisons"]):
        d = difference(runs, arm, against, metric, seeds)
        colour = _PET if arm.endswith("_pet") else _PLAIN
        if d.interval is not None:
            axis.plot(d.interval, [row, row], "-", lw=1.5, color=colour)
        axis.plot(d.mean, row, "o" if d.shown else "s", ms=5, color=colour, mfc=colour if d.shown else "white")
    return [f"{titles[arm]}\n- {titles[against]}" for arm, against in results["comparisons"]]


def _losses(figure: Figure, results: dict[str, Any]) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    styles = ["-", "--", "-.", ":"]
    for axis, pet in ((left, False), (right, True)):
        names = [name for name in results["arms"] if name != BASE and name.endswith("_pet") == pet]
        for number, name in enumerate(names):
            curves = [run["losses"] for run in results["runs"] if run["arm"] == name]
            means = [statistics.fmean(step) for step in zip(*curves, strict=True)]
            smooth = [statistics.fmean(means[max(0, i - SMOOTHED + 1) : i + 1]) for i in range(len(means))]
            axis.plot(
                range(1, len(smooth) + 1), smooth, styles[number % 4], lw=1.4, label=results["arms"][name]["title"]
            )
        axis.set(xlabel="optimiser step", title="with PET" if pet else "without PET")
        if names:
            axis.legend(fontsize=8)
    left.set_ylabel(f"task loss, nats (mean of {SMOOTHED} steps)")
