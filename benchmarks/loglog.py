"""A small log-log plot as SVG in the page's colours: one line for each varied axis, over the sizes on that axis."""

from __future__ import annotations

import math
from html import escape
from typing import Literal

from benchmarks.scaling_jobs import Point

_COLOURS = ("#0b66c3", "#c2410c", "#1a7f37", "#7c3aed", "#b3261e")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 500, 300, 52, 34, 10, 78  # px


def plot(points: list[Point], what: Literal["seconds", "megabytes"]) -> str:
    """Draw the points; sizes are relative to the first of each line, so that layers and tokens share an axis."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        lines.setdefault(point.axis, []).append((float(point.value), float(getattr(point, what))))
    ranges = {axis: (min(x for x, _ in line), max(x for x, _ in line)) for axis, line in lines.items()}
    span = max(high / low for low, high in ranges.values())
    values = [y for line in lines.values() for _, y in line]
    low, high = math.log10(min(values)) - 0.1, math.log10(max(values)) + 0.1

    def px(ratio: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(ratio) / math.log(span)

    def py(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (math.log10(value) - low) / (high - low)

    drawn = []
    steps = (1, 2, 5) if high - low < 1.5 else (1,)
    for tick in (s * 10.0**p for p in range(math.floor(low), math.ceil(high) + 1) for s in steps):
        if low <= math.log10(tick) <= high:
            drawn.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>'
            )
            drawn.append(f'<text class="soft" text-anchor="end" x="{LEFT - 6}" y="{py(tick) + 4:.1f}">{tick:g}</text>')
    for power in range(int(math.log2(span)) + 1):
        x = px(2.0**power)
        drawn.append(f'<text class="soft" text-anchor="middle" x="{x:.1f}" y="{HEIGHT - 18}">x{2**power}</text>')
    ends: list[tuple[float, float, str, str]] = []
    for colour, (axis, line) in zip(_COLOURS, lines.items(), strict=False):
        at = [(px(x / ranges[axis][0]), py(y)) for x, y in sorted(line)]
        drawn.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" '
            f'points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in at)}"/>'
        )
        drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in at]
        ends.append((at[-1][1] + 4, at[-1][0] + 7, axis, colour))
    placed: list[tuple[float, float]] = []
    for y, x, axis, colour in sorted(ends):  # from above; a label moves if it would cover another
        y = max([y, *(other + 13 for other, left in placed if abs(left - x) < 55 and other + 13 > y)])
        placed.append((y, x))
        drawn.append(f'<text x="{x:.1f}" y="{y:.1f}" style="fill:{colour}">{escape(axis)}</text>')
    drawn.append(
        f'<text class="soft" text-anchor="middle" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}">'
        f"size over the smallest; {what}</text>"
    )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{what} against size">{"".join(drawn)}</svg>'
