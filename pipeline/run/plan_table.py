"""A run's plan as a table for the terminal."""

from __future__ import annotations

from typing import Any

from pipeline.run.plan import Plan


def plan_table(plan: Plan) -> Any:
    """The plan as a table for the terminal."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("Step", "State", "Time", "Host memory", "GPU memory", "Disk"):
        table.add_column(name, justify="left" if name in ("Step", "State") else "right")
    for step in plan.steps:
        cost = step.cost
        sizes = [size(value) for value in (cost.host, cost.gpu, cost.disk)]
        table.add_row(step.name, step.state, duration(cost.seconds) if cost.seconds else "", *sizes)
    running = [step.cost for step in plan.steps if step.cost.seconds]
    if running:
        peaks = [max(c.host for c in running), max(c.gpu for c in running), sum(c.disk for c in running)]
        table.add_row("all", "", duration(sum(c.seconds for c in running)), *map(size, peaks))
    return table


def size(count: float) -> str:
    """Bytes in GB or MB; empty for zero."""
    if not count:
        return ""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """A duration in words, with two figures at most, because it is an estimate."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
