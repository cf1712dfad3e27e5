"""`so8t lint --explain`: explain notes and findings to the person who runs the file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from verification.contract.explanations import CHECKS, CODES, explanation

if TYPE_CHECKING:
    from verification.commands.lint_result import LintReport


def explained(report: LintReport) -> RenderableType:
    """One paragraph for each check that has a finding or a note, or that could not be made."""
    lines: list[RenderableType] = []
    for check in report.checks:
        if check.status == "pass":
            continue
        codes: list[str] = list(dict.fromkeys(finding.code for finding in check.findings if finding.code))
        for code in codes or [""]:
            lines += _entry(
                f"{check.name}{f', {code}' if code else ''} ({check.status})", explanation(check.name, code)
            )
    return Group(*(lines or [Text("Nothing to explain: every check passed.")]))


def all_explanations() -> RenderableType:
    """The whole table: checks by name, then recognised kinds of fault by code."""
    return Group(*(line for name, text in (CHECKS | CODES).items() for line in _entry(name, text)))


def _entry(name: str, text: str) -> list[RenderableType]:
    return [Text(name, style="bold"), Padding(Text(text), (0, 0, 0, 2))]
