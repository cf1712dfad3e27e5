"""Draws Matplotlib figures as inline SVG with the page's colours and unique ids.

Every figure is drawn with placeholder colours, which are then replaced by CSS variables of the page (`var(--ink)`,
`var(--s0)` ...), so that one drawing is readable in light, dark and print. Text stays text. Ids get the figure's name
as prefix. Dates and random salts are off, so the same report gives the same bytes.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from verification.show.words import number, visible

INK, SOFT, LINE, CARD = "#010101", "#020202", "#030303", "#040404"
SERIES = [f"#0{i}0a0b" for i in range(6)]
_VARIABLES = {INK: "--ink", SOFT: "--soft", LINE: "--line", CARD: "--card"} | {
    colour: f"--s{i}" for i, colour in enumerate(SERIES)
}
MARKERS, DASHES = "os^Dvp", ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2))]
_RC = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.unicode_minus": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
}


def short(text: str) -> str:
    """A text cut so that it fits into its figure."""
    text = " ".join(visible(text).split())
    return text if len(text) <= 28 else f"{text[:25]}..."


def plottable(value: float) -> bool:
    """Whether a log axis can show a value."""
    return math.isfinite(value) and value > 0


def log_y(axes: Any) -> None:
    """Set a log y axis with plain tick texts (1e-5, 0.01) and at least two labelled decades."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if math.log10(high / low) < 1.2:
        middle = math.sqrt(low * high)
        axes.set_ylim(middle / 5, middle * 5)
    narrow = math.log10(axes.get_ylim()[1] / axes.get_ylim()[0]) < 2.2
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if narrow else (1.0,), numticks=7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: number(float(y))))
    axes.yaxis.set_minor_formatter(NullFormatter())


def svg_figure(
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
            # A legend wider than the figure is cut off. Each entry's line and gaps are as wide as about six letters.
            letters = sum(len(label) + 6 for label in labels)
            columns = len(handles) if letters <= 11 * inches[0] else 2
            figure.legend(handles, labels, loc="outside upper left", ncols=columns)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _theme(buffer.getvalue(), name, description)


def _theme(svg: str, name: str, description: str) -> str:
    """Remove prolog and metadata, prefix ids, replace placeholder colours by CSS variables, add a description."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", body).replace("xlink:href", "href")
    body = re.sub("|".join(_VARIABLES), lambda match: f"var({_VARIABLES[match[0]]})", body)
    box = re.search(r'viewBox="([^"]+)"', body)
    content = body[body.index(">") + 1 :]
    label = html.escape(visible(description))
    return f'<svg viewBox="{box[1] if box else "0 0 345 216"}" role="img" aria-label="{label}">{content.strip()}'
