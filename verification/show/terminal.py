"""The verdict for the terminal: one table with a line for each step of the ladder, then the verdict in words.

The text fits 80 columns and says everything in words, so that it reads the same without colours, in a log file or
aloud. Texts from the report are never read as markup.
"""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from verification.gate.report import Report, Status, Verdict
from verification.show.words import (
    VERDICT_WORDS,
    Step,
    decisive,
    margin,
    next_action,
    steps,
    texts,
    trained_words,
    visible,
)

_STYLES: dict[Status, str] = {
    "pass": "green",
    "fail": "bold red",
    "inconclusive": "bold yellow",
    "not evaluated": "yellow",
    "waived": "magenta",
}
_VERDICT_STYLES: dict[Verdict, str] = {
    "pass": "bold green",
    "fail": "bold red",
    "inconclusive": "bold yellow",
    "incomplete": "bold yellow",
}


def verdict_table(report: Report) -> RenderableType:
    """A table of legs, compared models, headline values with bounds, and statuses; then the verdict and what to do."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), expand=False)
    table.add_column("Leg", no_wrap=True)
    table.add_column("Compared", overflow="fold", ratio=1)
    table.add_column("Value", justify="right", overflow="fold")
    table.add_column("Bound", overflow="fold")
    table.add_column("Status", no_wrap=True)
    for step in steps(report):
        value, bound = _value_and_bound(step)
        word = "FAIL" if step.status == "fail" else step.status
        table.add_row(
            Text(step.leg.name), Text(_compared(step)), Text(value), Text(bound), Text(word, style=_STYLES[step.status])
        )
    lines: list[RenderableType] = [table, Text(VERDICT_WORDS[report.verdict], style=_VERDICT_STYLES[report.verdict])]
    if report.summary:
        lines.append(Text(visible(report.summary)))
    if decisive_text(report):
        lines.append(
            Text(f"{'Closest to its bound' if report.verdict == 'pass' else 'Decisive'}: {decisive_text(report)}")
        )
    if trained_words(report):
        lines.append(Text(trained_words(report)))
    lines.append(Text(f"Next: {next_action(report)}"))
    return Group(*lines)


def decisive_text(report: Report) -> str:
    """ "Mean KL divergence (GGUF F16) 0.165 nats, bound <= 5e-5: 3,300x outside"; empty if nothing was measured."""
    found = decisive(report)
    if found is None:
        return ""
    leg, check = found
    value, bound = texts(check)
    where = visible(check.subject) or leg.name
    distance = margin(check)
    text = f"{visible(check.title)} ({where}) {value}"
    return text + (f", bound {bound}" if bound else "") + (f": {distance.words}" if distance else "")


def _compared(step: Step) -> str:
    text = visible(step.leg.compared or step.leg.title)
    return f"{text}: {visible(step.subject)}" if step.subject and step.subject not in step.leg.compared else text


def _value_and_bound(step: Step) -> tuple[str, str]:
    """The headline's value and bound, or the number of passed checks if all checks are equalities."""
    if not step.checks:
        return "no check", "-"
    if step.headline is None or step.as_count:
        return f"{step.held} of {len(step.checks)} held", "all"
    value, bound = texts(step.headline)
    return value, bound or "-"
