"""The report's files in a directory: which they are, and that none of an earlier run is taken for this one's."""

from __future__ import annotations

import tempfile
from pathlib import Path

from so8t_core.errors import InputError
from so8t_core.files import explain_os_errors
from verification.gate.report import Report

REPORT_FILES = ("report.json", "report.html", "report.md", "junit.xml", "report.intoto.json")


def clear_report(out: Path) -> None:
    """Take away an earlier report, so that a verification that cannot run never leaves another one's pass behind.

    A place that cannot hold the report is found here too, before the measuring and not after it.

    Raises:
        InputError: the directory cannot be made or written.
    """
    with explain_os_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
        for name in REPORT_FILES:
            (out / name).unlink(missing_ok=True)


def require_candidate(report: Report, path: Path) -> None:
    """Refuse a report about no file: nothing is called for in it, so everything in it could pass.

    Raises:
        InputError: with the way out.
    """
    if not any(artefact.role == "candidate" for artefact in report.artefacts):
        raise InputError(f"{path} names no candidate file, so there is nothing to release; verify again")
