"""The report's figures: matplotlib drawn to inline SVG that follows the page's colours and never clashes.

Every figure is drawn with placeholder colours that are then replaced by CSS variables of the page (`var(--ink)`,
`var(--s0)` ...), so one drawing reads in light, dark and print. Text stays text. Ids get the figure's name as prefix,
dates and random salts are off: the same report gives the same bytes. A figure without data is None and vanishes.
Candidates differ by colour and by line style and marker.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from verification.report_view import number, visible
from verification.schema import Curve, Divergence, Report, TensorRow

_INK, _SOFT, _LINE, _CARD = "#010101", "#020202", "#030303", "#040404"
_SERIES = [f"#0{i}0a0b" for i in range(6)]
_VARIABLES = {_INK: "--ink", _SOFT: "--soft", _LINE: "--line", _CARD: "--card"} | {
    colour: f"--s{i}" for i, colour in enumerate(_SERIES)
}
_MARKERS, _DASHES = "os^Dvp", ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2))]
_RC = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.unicode_minus": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": _SOFT,
    "axes.labelcolor": _SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "text.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
}
_CURVES: list[tuple[str, str, bool, list[str]]] = [  # figure name, axis label, log axis, curve names
    ("loss", "loss (nats per token)", False, ["loss", "heldout_loss"]),
    ("lambda", "PET weight", False, ["lambda"]),
    ("pet", "PET penalty", True, ["pet"]),
    ("orthogonality", "max |R^T R - I|", True, ["orthogonality"]),
    ("angles", "rotation angle (rad)", False, ["max_angle", "mean_angle"]),
    ("learning_rate", "learning rate", False, ["learning_rate"]),
]


def labels(report: Report) -> list[str]:
    """Candidates in one order for all figures: as listed among the artefacts, then any other that was measured."""
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
            axes.plot([], [], label=_short(d.candidate), color=style["color"], ls=style["ls"])
            if d.mean_kld > 0 and math.isfinite(d.mean_kld):
                axes.axvline(math.log10(d.mean_kld), color=style["color"], lw=1, ls=":")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: number(float(10.0**x), 2)))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set(xlabel="KLD of one position (nats); dotted: mean", ylabel="positions (%)", ylim=(0, None))

    text = "; ".join(f"{d.candidate}: mean {number(d.mean_kld)}, maximum {number(d.max_kld)} nats" for d in rows)
    return _svg("kld-distribution", f"Distribution of the KL divergence. {text}", draw) if rows else None


def kld_by_position(report: Report) -> str | None:
    """Mean KLD against the position in the context: a step means a length-dependent fault (RoPE scaling, window)."""
    series = [(d.candidate, [(float(x), y) for x, y in d.kld_by_position]) for d in report.divergences]
    return _lines(report, "kld-position", series, "position in the context (tokens)", "mean KLD (nats)")


def kld_by_confidence(report: Report) -> str | None:
    """Mean KLD against the reference's own top-1 probability: damage where the model was sure is the worse one."""
    series = [(d.candidate, [(x, y) for x, y, count in d.kld_by_confidence if count]) for d in report.divergences]
    return _lines(report, "kld-confidence", series, "reference's top-1 probability, bucket start", "mean KLD (nats)")


def kld_by_cell(report: Report) -> str | None:
    """Mean KLD of every execution cell on a log axis, one row a cell, with its 95 % interval."""
    found = [(c, c.divergence) for c in report.cells if c.divergence and _plottable(c.divergence.mean_kld)]
    rows = list(dict.fromkeys(c.title for c, _ in found))
    names = list(dict.fromkeys(c.candidate for c, _ in found))

    def draw(axes: Any) -> None:
        for i, name in enumerate(names):
            style, shift = _style(report, name), 0.5 * (i - (len(names) - 1) / 2) / max(1, len(names))
            own = [(rows.index(c.title), d) for c, d in found if c.candidate == name]
            x = [d.mean_kld for _, d in own]
            bars = [[max(0.0, d.mean_kld - max(d.mean_kld_interval[0], d.mean_kld / 1e3)) for _, d in own],
                    [max(0.0, d.mean_kld_interval[1] - d.mean_kld) for _, d in own]]  # fmt: skip
            y = [row + shift for row, _ in own]
            axes.errorbar(
                x, y, xerr=bars, fmt=style["marker"], color=style["color"], ms=4, capsize=2, label=_short(name)
            )
        axes.set_xscale("log")
        axes.set_yticks(range(len(rows)), [_short(row) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.xaxis.set_major_locator(LogLocator(numticks=6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: number(float(x))))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="mean KLD (nats)")

    text = "; ".join(f"{c.candidate}, {c.title}: {number(d.mean_kld)}" for c, d in found)
    height = 1.1 + 0.27 * len(rows)
    return _svg("kld-cells", f"Mean KL divergence by cell. {text}", draw, inches=(4.6, height)) if found else None


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
    """Size of the file against its mean KLD; hollow: the base model's own damage at the same type."""
    sizes = {a.label: a.bytes / 2**20 for a in report.artefacts if a.role == "candidate" and a.bytes > 0}
    points = [d for d in report.divergences if d.candidate in sizes and _plottable(d.mean_kld)]
    base = [d for d in report.base_divergences if d.candidate in sizes and _plottable(d.mean_kld)]

    def draw(axes: Any) -> None:
        for d, hollow in [*((d, True) for d in base), *((d, False) for d in points)]:
            style, low_high = _style(report, d.candidate), d.mean_kld_interval
            x, y = sizes[d.candidate], d.mean_kld
            face = _CARD if hollow else style["color"]
            bars = [[max(0.0, y - low_high[0])], [max(0.0, low_high[1] - y)]]
            axes.errorbar(x, y, yerr=bars, fmt=style["marker"], color=style["color"], mfc=face, ms=7, capsize=3)
            if not hollow:
                axes.annotate(_short(d.candidate), (x, y), xytext=(9, 5), textcoords="offset points", color=_INK)
        axes.margins(x=0.2, y=0.16)
        axes.set(xlabel="file size (MiB)" + ("; hollow: base model's own" if base else ""), ylabel="mean KLD (nats)")
        _log_y(axes)

    text = "; ".join(f"{d.candidate}: {number(sizes[d.candidate])} MiB, {number(d.mean_kld)} nats" for d in points)
    return _svg("size-tradeoff", f"File size against mean KL divergence. {text}", draw) if points else None


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
        axes.bar(layers, [high for _, _, high in rows], color=_SERIES[0], alpha=0.35, width=0.75, label="largest")
        axes.bar(layers, [mean for _, mean, _ in rows], color=_SERIES[0], width=0.75, label="mean")
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.set(xlabel="layer", ylabel="|angle| (rad)")

    text = f"Rotation angles by layer, largest {number(max((high for _, _, high in rows), default=0.0))} rad"
    return _svg("angles-layer", text, draw, inches=(3.7, 2.5)) if rows else None


def angles_by_block(report: Report) -> str | None:
    """Largest |angle| of every block of every adapted layer, rad, as a map: layers across, blocks downwards."""
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
    return _svg("angles-block", text, draw, legend=False, inches=(3.7, 2.5))


def worst_tensors(report: Report, count: int = 12) -> list[TensorRow]:
    """The tensors with the largest relative error over all candidates."""
    rows = [row for row in report.tensors if row.rel_error is not None]
    return sorted(rows, key=lambda row: -(row.rel_error or 0.0) if row.rel_error == row.rel_error else -math.inf)[
        :count
    ]


def percentiles(divergences: Iterable[Divergence]) -> list[str]:
    """All percentile keys that occur, in numeric order."""
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
                color=_SERIES[i % 6],
                ls=_DASHES[i % 6],
                marker=None if many else _MARKERS[i % 6],
                label=_short(words.get(curve.name, curve.name)),
            )
        axes.set(xlabel="optimiser step", ylabel=_short(label))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        values = [y for curve in curves for _, y in curve.points]
        if log and min(values) > 0 and max(values) > 30 * min(values):
            _log_y(axes)
        else:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: number(float(y))))

    ends = "; ".join(
        f"{words.get(c.name, c.name)} from {number(c.points[0][1])} to {number(c.points[-1][1])}" for c in curves
    )
    return (
        _svg(name, f"{label} over the training: {ends}", draw, legend=len(curves) > 1, inches=(3.7, 2.5))
        if curves
        else None
    )


def _lines(
    report: Report, name: str, series: list[tuple[str, list[tuple[float, float]]]], x: str, y: str
) -> str | None:
    """One line a candidate over a log y axis; values that a log axis cannot show are left out."""
    kept = [(who, [p for p in points if _plottable(p[1])]) for who, points in series]
    kept = [(who, points) for who, points in kept if points]

    def draw(axes: Any) -> None:
        for who, points in kept:
            axes.plot(*zip(*points, strict=True), label=_short(who), **_style(report, who))
        axes.set(xlabel=x, ylabel=y)
        axes.xaxis.set_major_locator(
            MaxNLocator(8, integer=all(p[0] == int(p[0]) for _, points in kept for p in points))
        )
        _log_y(axes)

    text = "; ".join(
        f"{who}: {number(min(v for _, v in pts))} to {number(max(v for _, v in pts))}" for who, pts in kept
    )
    return _svg(name, f"{y} by {x}. {text}", draw) if kept else None


def _style(report: Report, candidate: str) -> dict[str, Any]:
    order = labels(report)
    i = (order.index(candidate) if candidate in order else len(order)) % 6
    return {"color": _SERIES[i], "ls": _DASHES[i], "marker": _MARKERS[i]}


def _short(text: str) -> str:
    """Text that cannot push the drawing out of its own figure."""
    text = " ".join(visible(text).split())
    return text if len(text) <= 28 else f"{text[:25]}..."


def _plottable(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _log_y(axes: Any) -> None:
    """Log axis with plain tick texts (1e-5, 0.01) and at least two labelled decades."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if math.log10(high / low) < 1.2:
        middle = math.sqrt(low * high)
        axes.set_ylim(middle / 5, middle * 5)
    narrow = math.log10(axes.get_ylim()[1] / axes.get_ylim()[0]) < 2.2
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if narrow else (1.0,), numticks=7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: number(float(y))))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _svg(
    name: str,
    description: str,
    draw: Callable[[Any], None],
    *,
    legend: bool = True,
    inches: tuple[float, float] = (4.3, 2.8),
) -> str:
    """Draw on fresh axes and return the themed, id-safe `<svg>` element; smaller `inches` make larger text."""
    buffer = io.StringIO()
    with mpl.rc_context({**_RC, "svg.hashsalt": name}):
        figure = Figure(figsize=inches, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        handles, labels = axes.get_legend_handles_labels()
        if legend and handles:
            # A legend wider than the figure would be cut off; a line and its gaps take the room of about six letters.
            letters = sum(len(label) + 6 for label in labels)
            columns = len(handles) if letters <= 11 * inches[0] else 2
            figure.legend(handles, labels, loc="outside upper left", ncols=columns)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _theme(buffer.getvalue(), name, description)


def _theme(svg: str, name: str, description: str) -> str:
    """Cut prolog and metadata, prefix the ids, put CSS variables for the placeholder colours, name it for readers."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", body).replace("xlink:href", "href")
    body = re.sub("|".join(_VARIABLES), lambda match: f"var({_VARIABLES[match[0]]})", body)
    box = re.search(r'viewBox="([^"]+)"', body)
    content = body[body.index(">") + 1 :]
    label = html.escape(visible(description))
    return f'<svg viewBox="{box[1] if box else "0 0 345 216"}" role="img" aria-label="{label}">{content.strip()}'
