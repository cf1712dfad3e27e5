"""The result of `lint` for the terminal: the verdict, then one line a finding (place, expected, found, action).

The text says everything in words, so that it reads the same without colours. Text from files is never read as markup,
and control characters in it are shown escaped.
"""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from so8t_core.files import atomic_file
from verification.commands.lint_result import LintCheck, LintReport
from verification.show.words import visible

_WORDS = {"pass": "PASS", "fail": "FAIL", "incomplete": "INCOMPLETE"}
_STYLES = {"pass": "bold green", "fail": "bold red", "incomplete": "bold yellow"}
_ROWS = 8  # most findings shown for one check; lint.json has all


def lint_table(report: LintReport) -> RenderableType:
    """Everything a person needs to act on a lint."""
    lines: list[RenderableType] = [Text(headline(report), style=_STYLES[report.verdict])]
    found = [check for check in report.checks if check.status in ("fail", "note") and check.findings]
    if found:
        lines.append(_findings(found))
    for check in report.checks:
        if check.status == "not evaluated":
            lines.append(Text(f"Not evaluated: {check.title}: {visible(check.detail)}", style="yellow"))
    held = sum(check.status == "pass" for check in report.checks)
    if report.runs_on is not None:
        lines.append(Text(f"llama.cpp: {visible(report.runs_on.sentence)}."))
    lines.append(Text(f"{held} of {len(report.checks)} checks held in {report.seconds.get('total', 0):.1f} s."))
    if report.hypotheses:
        lines.append(Text(_hypotheses(report)))
    elif report.reference is None:
        lines.append(Text("Held against itself only; --reference HF_DIR adds metadata, tokens, chats and weights."))
    return Group(*lines)


def headline(report: LintReport) -> str:
    """ "FAIL: x.gguf (llama, Q8_0, 272 tensors): 2 faults in metadata, weights"."""
    failed = [check for check in report.checks if check.status == "fail"]
    faults = sum(len(check.findings) for check in failed)
    name = visible(Path(report.file).name)
    kind = "" if report.kind == "a language model" else f"{visible(report.kind)}, "
    what = f"{name} ({kind}{visible(report.architecture)}, {report.file_type}, {report.tensors_total} tensors)"
    if report.verdict == "fail":
        names = ", ".join(check.name for check in failed)
        return f"FAIL: {what}: {faults} {'fault' if faults == 1 else 'faults'} in {names}"
    if report.verdict == "incomplete":
        return f"INCOMPLETE: {what}: no fault found, but not everything could be checked"
    return f"PASS: {what}: no fault found"


def _findings(checks: list[LintCheck]) -> Table:
    """Faults one by one; notes as one line a check, because they decide nothing."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("Check", no_wrap=True)
    table.add_column("What, expected, found", overflow="fold", ratio=3)
    table.add_column("What to do", overflow="fold", ratio=2)
    for check in checks:
        note = check.status == "note"
        label = Text(f"{'note' if note else 'FAIL'} {check.name}", style="magenta" if note else "bold red")
        shown = 1 if note else _ROWS
        more = len(check.findings) - shown
        for number, finding in enumerate(check.findings[:shown]):
            cause = f" ({visible(finding.cause)})" if finding.cause else ""
            text = (
                f"{visible(finding.where)}: expected {visible(finding.expected)}, found {visible(finding.found)}{cause}"
            )
            text += f", and {more} more" if more > 0 and number == shown - 1 else ""
            table.add_row(label, Text(text), Text(visible(finding.action)))
    return table


def _hypotheses(report: LintReport) -> str:
    rows = report.hypotheses
    expected = [row for row in rows if row.best == "expected"]
    margins = [row.z for row in rows if row.z is not None]
    text = f"Attention tensors nearest to the reference's own: {len(expected)} of {len(rows)}"
    if margins:
        text += f", smallest margin {min(margins):.0f} standard errors"
    angles = [row.residual_rms for row in rows if row.residual_rms is not None]
    errors = [row.standard_error for row in rows if row.standard_error is not None]
    if angles:
        text += f"; rotation left over in o_proj at most {max(angles):.1g} rad (one angle: +-{max(errors):.1g})"
    return text + "."


def write_lint(report: LintReport, out: Path) -> Path:
    """Write lint.json, whole or not at all."""
    path = out / "lint.json"
    with atomic_file(path) as temporary:
        temporary.write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return path
