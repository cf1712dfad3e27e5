"""A result file as one self-contained page: every round of every figure on a log axis, and the numbers in a table.

python -m benchmarks.page RESULTS.json > page.html
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from html import escape
from itertools import groupby
from pathlib import Path

from benchmarks.result_file import Figure, Results, read

ROW, LEFT, WIDTH, RIGHT = 24, 430, 560, 20  # px
NAME = 70  # letters of a name that fit left of the plot
STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#5a6370;--line:#d9dee5;--card:#fff;--ours:#0b66c3;--bad:#b3261e;
--good:#1a7f37}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ee;--soft:#9aa4b2;--line:#353c46;--card:#15181c;--ours:#6cb2ff;
--bad:#ff8a80;--good:#6fdc8c}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--card);max-width:1060px;margin:2em auto;
padding:0 1em}
svg{width:100%;height:auto;font:12px system-ui,sans-serif;fill:var(--ink)}
svg .soft{fill:var(--soft)} svg .grid{stroke:var(--line)} svg .one{stroke:var(--soft);stroke-width:1.4}
svg .box{fill:var(--ours);opacity:.25} svg .dot{fill:var(--ours);opacity:.45} svg .mid{stroke:var(--ours);
stroke-width:3} svg .bar{fill:none;stroke:var(--good);stroke-width:2} svg .missed{stroke:var(--bad)}
table{border-collapse:collapse;width:100%;font-size:13px} th,td{padding:.25em .6em;border-bottom:1px solid var(--line);
text-align:right;vertical-align:top}
th:first-child,th:nth-child(2),td:first-child,td:nth-child(2){text-align:left}
td.missed{color:var(--bad);font-weight:600} .soft{color:var(--soft)} .scroll{overflow-x:auto}
"""


def page(results: Results) -> str:
    """The page's HTML."""
    parts = [f"<p>{_about(results)}</p>"]
    if results.planted != 1.0:
        parts.append(f"<p><b>Slowed on purpose by {results.planted:g}: no baseline.</b></p>")
    parts.append(
        "<p>Every figure is a ratio against a peer or a floor of the same run, measured in turns. A dot is one round, "
        "the box its quartiles, the stroke the median; a triangle is the bar, pointing to the side where it is met.</p>"
    )
    for better, title in (
        (False, "Times as fast as the peer (higher is better)"),
        (True, "Times the floor (lower is better)"),
    ):
        chosen = [figure for figure in results.figures if figure.lower_is_better is better]
        if chosen:
            parts.append(f"<h2>{title}</h2>{_plot(chosen, title)}")
    parts.append(f'<h2>All numbers</h2><div class="scroll">{_table(results.figures)}</div>')
    if results.absent:
        rows = "".join(f"<li>{escape(name)}: {escape(why)}</li>" for name, why in results.absent.items())
        parts.append(f"<h2>Not measured here</h2><ul>{rows}</ul>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width,initial-scale=1"><title>SO8T benchmarks</title>'
        f"<style>{STYLE}</style></head><body><h1>SO8T benchmarks</h1>{''.join(parts)}</body></html>\n"
    )


def _about(results: Results) -> str:
    m = results.machine
    packages = ", ".join(f"{name} {version}" for name, version in m.packages.items())
    kind = "quick run" if results.quick else "whole run"
    state = " with changes" if results.changed else ""
    return (
        f"{escape(str(m))}, {m.memory_gb:g} GB, bfloat16 unit: {'yes' if m.bfloat16 else 'no'}, load {m.load} at the "
        f'end.<br><span class="soft">{escape(results.date)}, commit {escape(results.commit[:12])}{state}, {kind} of '
        f"{results.seconds:.0f} s, of CPU {results.cpu_seconds:.0f} s. "
        f"{escape(m.system)}, Python {escape(m.python)}, {escape(packages)}.</span>"
    )


def _plot(figures: list[Figure], title: str) -> str:
    values = [v for f in figures for v in (*f.ratios, *([f.bar] if f.bar else []), 1.0)]
    low, high = math.log10(min(values)) - 0.04, math.log10(max(values)) + 0.04
    rows = [(group, list(members)) for group, members in groupby(figures, key=lambda figure: figure.group)]
    height = ROW * (len(figures) + len(rows) + 2)

    def x(value: float) -> float:
        return LEFT + WIDTH * (math.log10(value) - low) / (high - low)

    drawn = []
    for tick in _ticks(low, high):
        at, kind = f"{x(tick):.1f}", "one" if tick == 1 else "grid"
        drawn.append(f'<line class="{kind}" x1="{at}" x2="{at}" y1="4" y2="{height - ROW}"/>')
        drawn.append(f'<text class="soft" text-anchor="middle" x="{at}" y="{height - 6}">{tick:g}</text>')
    y = ROW
    for group, members in rows:
        drawn.append(f'<text class="soft" x="0" y="{y:.0f}" font-weight="600">{escape(group)}</text>')
        y += ROW
        for figure in members:
            drawn.append(_row(figure, y - 4, x))
            y += ROW
    box = f"0 0 {LEFT + WIDTH + RIGHT} {height}"
    return f'<svg viewBox="{box}" role="img" aria-label="{escape(title)}">{"".join(drawn)}</svg>'


def _ticks(low: float, high: float) -> list[float]:
    steps = (1, 2, 5) if high - low < 2.2 else (1,)
    found = [s * 10.0**p for p in range(math.floor(low), math.ceil(high) + 1) for s in steps]
    return [tick for tick in found if low <= math.log10(tick) <= high]


def _row(figure: Figure, y: float, x: Callable[[float], float]) -> str:
    name = f"{figure.name} ({figure.peer})" if figure.peer else figure.name
    short = name if len(name) <= NAME else figure.name if len(figure.name) <= NAME else figure.name[: NAME - 1] + "…"
    parts = [
        f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end" font-size="11">'
        f"<title>{escape(name)}</title>{escape(short)}</text>"
    ]
    left, right = (x(max(value, min(figure.ratios))) for value in figure.quartiles)
    if len(figure.ratios) > 1:
        parts.append(f'<rect class="box" x="{left:.1f}" y="{y - 7}" width="{right - left:.1f}" height="14"/>')
    parts += [f'<circle class="dot" cx="{x(value):.1f}" cy="{y}" r="2.2"/>' for value in figure.ratios]
    middle = x(figure.ratio)
    parts.append(f'<line class="mid" x1="{middle:.1f}" x2="{middle:.1f}" y1="{y - 8}" y2="{y + 8}"/>')
    if figure.bar is not None:
        at, way = x(figure.bar), -7 if figure.lower_is_better else 7
        kind = "bar" if figure.met else "bar missed"
        parts.append(f'<path class="{kind}" d="M{at:.1f} {y - 7}l{way} 7l{-way} 7z"/>')
    return "".join(parts)


def _table(figures: list[Figure]) -> str:
    head = "".join(
        f"<th>{name}</th>"
        for name in ("figure", "against", "ours", "theirs", "ratio", "quartiles", "range", "rounds", "bar")
    )
    rows = []
    for f in figures:
        bar = "" if f.bar is None else f"{'≤' if f.lower_is_better else '≥'} {f.bar:g} {'met' if f.met else 'missed'}"
        once = len(f.ratios) == 1
        cells = [
            f.name,
            f.peer,
            _amount(f, f.ours),
            _amount(f, f.peer),
            f"{f.ratio:.3g}",
            "" if once else f"{f.quartiles[0]:.3g} to {f.quartiles[1]:.3g}",
            "" if once else f"{min(f.ratios):.3g} to {max(f.ratios):.3g}",
            str(f.rounds),
        ]
        missed = ' class="missed"' if f.met is False else ""
        rows.append(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in cells)}<td{missed}>{escape(bar)}</td></tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _amount(figure: Figure, who: str) -> str:
    if who in figure.milliseconds:
        return f"{figure.milliseconds[who]:.3g} ms"
    return f"{figure.sizes[who]:.4g} MB" if who in figure.sizes else ""


if __name__ == "__main__":
    sys.stdout.write(page(read(Path(sys.argv[1]))))
