"""The report as the summary of a GitHub job: appended to the file in $GITHUB_STEP_SUMMARY, if that is set."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from verification.gate.report import Report
from verification.show.write import to_markdown

_VARIABLE = "GITHUB_STEP_SUMMARY"
_LIMIT = 1 << 20  # bytes; GitHub drops the whole summary of a step that is larger


def append_step_summary(report: Report) -> Path | None:
    """Append the report in Markdown; returns the file, or None if nothing was written.

    An error in the summary does not change a decided job; a line on standard error says what went wrong. Call this
    function after the verdict was printed.
    """
    named = os.environ.get(_VARIABLE)
    if not named:
        return None
    try:
        return _append(report, Path(named))
    except Exception as error:  # the verdict is valid without a summary
        print(f"so8t: no step summary was written to {named!r}: {type(error).__name__}: {error}"[:500], file=sys.stderr)
        return None


def _append(report: Report, path: Path) -> Path:
    """Append the report to a regular file.

    Raises:
        OSError: not a regular file (a pipe would wait for its reader), or a file that cannot be written.
    """
    if path.exists() and not path.is_file():
        raise OSError("it is not a regular file")
    text = to_markdown(report) + "\n"
    taken = path.stat().st_size if path.exists() else 0
    if taken + len(text.encode()) > _LIMIT:
        text = f"**{report.verdict}**: {report.summary}\n\nThe whole report is too long for a step summary.\n"
    with path.open("a", encoding="utf-8") as stream:
        stream.write(text)
    return path
