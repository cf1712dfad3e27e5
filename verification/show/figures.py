"""The report's figures, each a function of the report; a figure without data is None and is not shown.

Candidates differ by colour, line style and marker. `svg` makes each figure a part of the page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from verification.gate.report import Curve, Divergence, Report, TensorRow
from verification.show.svg import CARD, DASHES, INK, MARKERS, SERIES, log_y, plottable, short, svg_figure
from verification.show.words import number, visible

_CURVES: list[tuple[str, str, bool, list[str]]] = [  # figure name, axis label, log axis, curve names
    ("loss", "loss (nats per token)", False, ["loss", "heldout_loss"]),
    ("lambda", "PET weight", False, ["lambda"]),
    ("pet", "PET penalty", True, ["pet"]),
    ("orthogonality", "max |R^T R - I|", True, ["orthogonality"]),
    ("angles", "rotation angle (rad)", False, ["max_angle", "mean_angle"]),
    ("learning_rate", "learning rate", False, ["learning_rate"]),
]


def labels(report: Report) -> list[str]:
    """Candidates in one order for all figures: the order of the artefacts, then any other measured file."""
    named = [a.label for a in report.artefacts if a.role == "candidate" and a.label]
    return list(
        dict.fromkeys([*named, *(d.candidate for d in report.divergences), *(t.candidate for t in report.tensors)])
    )


def kld_distribution(report: Report) -> str | None:
    """Share of scored positions per bucket of log10 KLD, one outline a candidate; a dotted line at each mean."""
    rows = [d for d in report.divergences if sum(count for _, count in d.histogram) > 0]

    def draw(axes: Any) -> None:
        for d in rows:
            style = _style(report, d.candidate)
            starts = [start for start, _ in d.histogram]
            width = min((b - a for a, b in pairwise(starts) if b > a), default=0.5)
            total = sum(count for _, count in d.histogram)
            shares = [100 * count / total for _, count in d.histogram]
            axes.stairs(shares, [*starts, starts[-1] + width], color=style["color"], fill=True, alpha=0.13)
            axes.stairs(shares, [*starts, starts[-1] + width], color=style["color"], ls=style["ls"], lw=1.4)
            axes.plot([], [], label=short(d.candidate), color=style["color"], ls=style["ls"])
            if d.mean_kld > 0 and math.isfinite(d.mean_kld):
                axes.axvline(math.log10(d.mean_kld), color=style["color"], lw=1, ls=":")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: number(float(10.0**x), 2)))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set(xlabel="KLD of one position (nats); dotted: mean", ylabel="positions (%)", ylim=(0, None))

    text = "; ".join(f"{d.candidate}: mean {number(d.mean_kld)}, maximum {number(d.max_kld)} nats" for d in rows)
    return svg_figure("kld-distribution", f"Distribution of the KL divergence. {text}", draw) if rows else None


def kld_by_position(report: Report) -> str | None:
    """Mean KLD against the position in the context: a step means a length-dependent fault (RoPE scaling, window)."""
    series = [(d.candidate, [(float(x), y) for x, y in d.kld_by_position]) for d in report.divergences]
    return _lines(report, "kld-position", series, "position in the context (tokens)", "mean KLD (nats)")


def kld_by_confidence(report: Report) -> str | None:
    """Mean KLD against the reference's top-1 probability: damage is worse if the model was sure."""
    series = [(d.candidate, [(x, y) for x, y, count in d.kld_by_confidence if count]) for d in report.divergences]
    return _lines(report, "kld-confidence", series, "reference's top-1 probability, bucket start", "mean KLD (nats)")


def kld_by_cell(report: Report) -> str | None:
    """Mean KLD of every execution cell on a log axis, one row a cell, with its 95 % interval."""
    found = [(c, c.divergence) for c in report.cells if c.divergence and plottable(c.divergence.mean_kld)]
    rows = list(dict.fromkeys(c.title for c, _ in found))
    names = list(dict.fromkeys(c.candidate for c, _ in found))

    def draw(axes: Any) -> None:
        for i, name in enumerate(names):
            style, shift = _style(report, name), 0.5 * (i - (len(names) - 1) / 2) / max(1, len(names))
            own = [(rows.index(c.title), d) for c, d in found if c.candidate == name]
            x = [d.mean_kld for _, d in own]
            bars = [
                [max(0.0, d.mean_kld - max(d.mean_kld_interval[0], d.mean_kld / 1e3)) for _, d in own],
                [max(0.0, d.mean_kld_interval[1] - d.mean_kld) for _, d in own],
            ]
            y = [row + shift for row, _ in own]
            axes.errorbar(
                x, y, xerr=bars, fmt=style["marker"], color=style["color"], ms=4, capsize=2, label=short(name)
            )
        axes.set_xscale("log")
        axes.set_yticks(range(len(rows)), [short(row) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.xaxis.set_major_locator(LogLocator(numticks=6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: number(float(x))))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="mean KLD (nats)")

    text = "; ".join(f"{c.candidate}, {c.title}: {number(d.mean_kld)}" for c, d in found)
    height = 1.1 + 0.27 * len(rows)
    return svg_figure("kld-cells", f"Mean KL divergence by cell. {text}", draw, inches=(4.6, height)) if found else None


def tensor_errors(report: Report) -> str | None:
    """Largest relative error of any tensor in a layer, one line a candidate."""
    worst: dict[str, dict[int, float]] = {}
    for row in report.tensors:
        if row.layer is not None and row.rel_error is not None:
            layers = worst.setdefault(row.candidate, {})
            layers[row.layer] = max(layers.get(row.layer, 0.0), row.rel_error)
    series = [(name, [(float(k), v) for k, v in sorted(by.items())]) for name, by in worst.items()]
    return _lines(report, "tensor-errors", series, "layer", "largest relative error in the layer")


def size_tradeoff(report: Report) -> str | None:
    """Size of the file against its mean KLD; hollow markers: the damage of the base model at the same type."""
    sizes = {a.label: a.bytes / 2**20 for a in report.artefacts if a.role == "candidate" and a.bytes > 0}
    points = [d for d in report.divergences if d.candidate in sizes and plottable(d.mean_kld)]
    base = [d for d in report.base_divergences if d.candidate in sizes and plottable(d.mean_kld)]

    def draw(axes: Any) -> None:
        for d, hollow in [*((d, True) for d in base), *((d, False) for d in points)]:
            style, low_high = _style(report, d.candidate), d.mean_kld_interval
            x, y = sizes[d.candidate], d.mean_kld
            face = CARD if hollow else style["color"]
            bars = [[max(0.0, y - low_high[0])], [max(0.0, low_high[1] - y)]]
            axes.errorbar(x, y, yerr=bars, fmt=style["marker"], color=style["color"], mfc=face, ms=7, capsize=3)
            if not hollow:
                axes.annotate(short(d.candidate), (x, y), xytext=(9, 5), textcoords="offset points", color=INK)
        axes.margins(x=0.2, y=0.16)
        axes.set(xlabel="file size (MiB)" + ("; hollow: base model's own" if base else ""), ylabel="mean KLD (nats)")
        log_y(axes)

    text = "; ".join(f"{d.candidate}: {number(sizes[d.candidate])} MiB, {number(d.mean_kld)} nats" for d in points)
    return svg_figure("size-tradeoff", f"File size against mean KL divergence. {text}", draw) if points else None


def training_curves(report: Report) -> list[tuple[str, str]]:
    """(caption, SVG) of the loss, PET weight, penalty, orthogonality and angle curves that were logged."""
    if report.training is None:
        return []
    by_name = {curve.name: curve for curve in report.training.curves}
    known = {name for _, _, _, names in _CURVES for name in names}
    groups = _CURVES + [(f"curve-{i}", name, False, [name]) for i, name in enumerate(by_name) if name not in known]
    drawn = (
        (label, _curves(f"train-{figure}", label, log, [by_name[n] for n in names if n in by_name]))
        for figure, label, log, names in groups
    )
    return [(visible(label), svg) for label, svg in drawn if svg]


def angles_by_layer(report: Report) -> str | None:
    """Largest and mean |angle| of the learned rotation per adapted layer, rad."""
    rows = report.training.angles_by_layer if report.training else []

    def draw(axes: Any) -> None:
        layers = [layer for layer, _, _ in rows]
        axes.bar(layers, [high for _, _, high in rows], color=SERIES[0], alpha=0.35, width=0.75, label="largest")
        axes.bar(layers, [mean for _, mean, _ in rows], color=SERIES[0], width=0.75, label="mean")
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.set(xlabel="layer", ylabel="|angle| (rad)")

    text = f"Rotation angles by layer, largest {number(max((high for _, _, high in rows), default=0.0))} rad"
    return svg_figure("angles-layer", text, draw, inches=(3.7, 2.5)) if rows else None


def angles_by_block(report: Report) -> str | None:
    """A map of the largest |angle|, rad, of every block of every adapted layer: layers across, blocks downwards."""
    rows = report.training.angles_by_block if report.training else []
    if not rows:
        return None
    table = np.full((max(len(angles) for _, angles in rows), len(rows)), np.nan)  # (blocks, layers)
    for column, (_, angles) in enumerate(rows):
        table[: len(angles), column] = angles
    block, farthest_column = (int(i) for i in np.unravel_index(int(np.nanargmax(table)), table.shape))
    layer = rows[farthest_column][0]

    def draw(axes: Any) -> None:
        image = axes.imshow(table, aspect="auto", origin="lower", vmin=0.0, cmap="viridis", interpolation="nearest")
        axes.grid(False)
        axes.figure.colorbar(image, ax=axes, label="|angle| (rad)")
        places = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), 10)).round().astype(int))
        axes.set_xticks(places, [str(rows[place][0]) for place in places])
        axes.set(xlabel="layer", ylabel="block of 8 channels")

    farthest = f"block {block} of layer {layer}, {number(float(table[block, farthest_column]))} rad"
    text = f"Largest angle of each block; the farthest is {farthest}"
    return svg_figure("angles-block", text, draw, legend=False, inches=(3.7, 2.5))


def worst_tensors(report: Report, count: int = 12) -> list[TensorRow]:
    """The tensors with the largest relative error over all candidates."""
    rows = [row for row in report.tensors if row.rel_error is not None]
    return sorted(rows, key=lambda row: -(row.rel_error or 0.0) if row.rel_error == row.rel_error else -math.inf)[
        :count
    ]


def percentiles(divergences: Iterable[Divergence]) -> list[str]:
    """All percentile keys in the report, in numeric order."""
    return sorted({key for d in divergences for key in d.kld_percentiles}, key=lambda key: float(key))


def _curves(name: str, label: str, log: bool, curves: Sequence[Curve]) -> str | None:
    curves = [curve for curve in curves if any(math.isfinite(y) for _, y in curve.points)]
    words = {"heldout_loss": "held-out", "loss": "training", "max_angle": "largest", "mean_angle": "mean"}

    def draw(axes: Any) -> None:
        for i, curve in enumerate(curves):
            points = [(x, y) for x, y in curve.points if math.isfinite(y)]
            many = len(points) > 25
            axes.plot(
                *zip(*points, strict=True),
                color=SERIES[i % 6],
                ls=DASHES[i % 6],
                marker=None if many else MARKERS[i % 6],
                label=short(words.get(curve.name, curve.name)),
            )
        axes.set(xlabel="optimiser step", ylabel=short(label))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        values = [y for curve in curves for _, y in curve.points]
        if log and min(values) > 0 and max(values) > 30 * min(values):
            log_y(axes)
        else:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: number(float(y))))

    ends = "; ".join(
        f"{words.get(c.name, c.name)} from {number(c.points[0][1])} to {number(c.points[-1][1])}" for c in curves
    )
    return (
        svg_figure(name, f"{label} over the training: {ends}", draw, legend=len(curves) > 1, inches=(3.7, 2.5))
        if curves
        else None
    )


def _lines(
    report: Report, name: str, series: list[tuple[str, list[tuple[float, float]]]], x: str, y: str
) -> str | None:
    """One line a candidate over a log y axis; values that a log axis cannot show are left out."""
    kept = [(who, [p for p in points if plottable(p[1])]) for who, points in series]
    kept = [(who, points) for who, points in kept if points]

    def draw(axes: Any) -> None:
        for who, points in kept:
            axes.plot(*zip(*points, strict=True), label=short(who), **_style(report, who))
        axes.set(xlabel=x, ylabel=y)
        axes.xaxis.set_major_locator(
            MaxNLocator(8, integer=all(p[0] == int(p[0]) for _, points in kept for p in points))
        )
        log_y(axes)

    text = "; ".join(
        f"{who}: {number(min(v for _, v in pts))} to {number(max(v for _, v in pts))}" for who, pts in kept
    )
    return svg_figure(name, f"{y} by {x}. {text}", draw) if kept else None


def _style(report: Report, candidate: str) -> dict[str, Any]:
    order = labels(report)
    i = (order.index(candidate) if candidate in order else len(order)) % 6
    return {"color": SERIES[i], "ls": DASHES[i], "marker": MARKERS[i]}
