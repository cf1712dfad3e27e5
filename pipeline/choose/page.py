"""The report of a choice: a table, `choose.json`, `choose.md`, and an SVG of size against KLD with the frontier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.choose.choose import Choice
from so8t_core.files import write_text
from verification.show.svg import log_y, svg_figure
from verification.show.words import number, size
from verification.show.write import strict_json


def frontier(choice: Choice) -> set[str]:
    """The types on the frontier: no other measured type is both smaller and nearer to the checkpoint."""
    found, best = set(), float("inf")
    for one in sorted(choice.measured, key=lambda one: (one.bytes, one.macro.mean_kld)):
        if one.macro.mean_kld < best:
            best = one.macro.mean_kld
            found.add(one.kind)
    return found


def table(choice: Choice) -> list[list[str]]:
    """A header row, then one row for each type, from small to large."""
    names = list(choice.measured[0].domains) if choice.measured else []
    rows = [["type", "size", "weight error", "macro mean KLD (95 %)", *names, ""]]
    measured, edge = {one.kind: one for one in choice.measured}, frontier(choice)
    for rung in sorted(choice.ladder, key=lambda rung: rung.bytes):
        one = measured.get(rung.kind)
        if one is None:
            values = ["not measured: dominated, or too large", *["-"] * len(names)]
        else:
            low, high = one.macro.mean_kld_interval
            values = [f"{number(one.macro.mean_kld)} ({number(low)} to {number(high)})"]
            values += [number(value) for value in one.domains.values()]
        mark = "chosen, proven" if rung.kind == choice.chosen else "tried" if rung.kind in choice.tried else ""
        mark = mark or ("frontier" if rung.kind in edge else "")
        rows.append([rung.kind, size(rung.bytes), number(rung.weight_error), *values, mark])
    return rows


def answer(choice: Choice) -> str:
    """The choice in one sentence."""
    if choice.chosen is not None:
        return f"Ship {choice.chosen}: {choice.path}. It was proven on text that did not rank it."
    if not choice.tried:
        return "No file keeps the limits on the ranking text; allow a larger KLD or size, or try other types."
    why = choice.report.summary if choice.report is not None else ""
    return f"No file was proven: {', '.join(choice.tried)} kept the limits on the ranking text only. {why}"


def figure(choice: Choice) -> str | None:
    """An SVG of size against macro mean KLD: the frontier is a line, the chosen file's mark is filled."""
    points = [one for one in choice.measured if one.macro.mean_kld > 0]
    edge = [one for one in sorted(points, key=lambda one: one.bytes) if one.kind in frontier(choice)]

    def draw(axes: Any) -> None:
        axes.plot(
            [one.bytes / 2**20 for one in edge], [one.macro.mean_kld for one in edge], "-", lw=1, label="frontier"
        )
        for one in points:
            x, y, (low, high) = one.bytes / 2**20, one.macro.mean_kld, one.macro.mean_kld_interval
            bars = [[max(0.0, y - low)], [max(0.0, high - y)]]
            style = {
                "fmt": "o",
                "capsize": 3,
                "color": "#0f766e",
                "mfc": "#0f766e" if one.kind == choice.chosen else "w",
            }
            axes.errorbar(x, y, yerr=bars, **style)
            axes.annotate(one.kind, (x, y), xytext=(6, 4), textcoords="offset points")
        axes.set(xlabel="file size (MiB)", ylabel="macro mean KLD (nats)")
        axes.margins(x=0.2, y=0.16)
        log_y(axes)

    text = "; ".join(
        f"{one.kind}: {number(one.bytes / 2**20)} MiB, {number(one.macro.mean_kld)} nats" for one in points
    )
    return svg_figure("choose", f"File size against macro mean KL divergence. {text}", draw) if points else None


def write_choice(choice: Choice, out: Path) -> None:
    """Write choose.json, choose.md and choose.svg."""
    record = {
        "answer": answer(choice),
        "chosen": choice.chosen,
        "file": None if choice.path is None else choice.path.name,
        "tried": choice.tried,
        "frontier": sorted(frontier(choice)),
        "ladder": [{"type": r.kind, "bytes": r.bytes, "weight_error": r.weight_error} for r in choice.ladder],
        "measured": [one.model_dump(mode="json") for one in choice.measured],
    }
    write_text(out / "choose.json", strict_json(record))
    header, *rows = table(choice)
    lines = [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]]
    write_text(out / "choose.md", "\n".join([*lines, "", answer(choice), ""]))
    if (svg := figure(choice)) is not None:
        write_text(out / "choose.svg", svg)
