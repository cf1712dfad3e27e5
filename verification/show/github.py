"""The report as a CI job's summary: appended to the file that $GITHUB_STEP_SUMMARY names, where it is set."""

from __future__ import annotations

import os
from pathlib import Path

from verification.gate.report import Report
from verification.show.write import to_markdown

_VARIABLE = "GITHUB_STEP_SUMMARY"
_LIMIT = 1 << 20  # bytes GitHub takes for a step; beyond it the whole summary is dropped


def append_step_summary(report: Report) -> Path | None:
    """Append the report in Markdown; returns the file, or None where there is none to write to.

    A summary that cannot be written is no reason to fail a job that was decided: it is left out.
    """
    named = os.environ.get(_VARIABLE)
    if not named:
        return None
    path, text = Path(named), to_markdown(report) + "\n"
    try:
        taken = path.stat().st_size if path.exists() else 0
        if taken + len(text.encode()) > _LIMIT:
            text = f"**{report.verdict}**: {report.summary}\n\nThe whole report is too long for a step summary.\n"
        with path.open("a", encoding="utf-8") as stream:
            stream.write(text)
    except OSError:
        return None
    return path
