"""The names of the report's files in a directory, and their deletion before a new run."""

from __future__ import annotations

import tempfile
from pathlib import Path

from so8t_core.errors import InputError
from so8t_core.files import explain_os_errors
from verification.gate.report import Report

REPORT_FILES = ("report.json", "report.html", "report.md", "junit.xml", "report.intoto.json")


def clear_report(out: Path) -> None:
    """Delete an earlier report, so that a verification that cannot run never leaves the pass of an earlier run.

    A directory that cannot be written is found here, before the measuring.

    Raises:
        InputError: the directory cannot be made or written.
    """
    with explain_os_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
        for name in REPORT_FILES:
            (out / name).unlink(missing_ok=True)


def require_candidate(report: Report, path: Path) -> None:
    """Refuse a report without a candidate: it requires no checks, so it could always pass.

    Raises:
        InputError: the report names no candidate.
    """
    if not any(artefact.role == "candidate" for artefact in report.artefacts):
        raise InputError(f"{path} names no candidate file, so there is nothing to release; verify again")
