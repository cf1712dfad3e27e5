"""`so8t release`: put the files that passed and their verification into one folder for the Hub.

The folder holds the verified GGUF files and their companions, `report/`, and two files that a model card links:
VERIFICATION.md and the badge verification.svg. It holds nothing else of the run.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from so8t_core.errors import InputError
from so8t_core.files import atomic_dir, sha256_file, write_text
from verification.gate.report import Report
from verification.gate.stored import REPORT_FILES
from verification.show.card import BADGE, CARD, badge, verification_card

_COMPANIONS = ("Modelfile", "*.Modelfile", "types.json", "SHA256SUMS")


def make_release(report: Report, report_dir: Path, target: Path) -> dict[str, str]:
    """Put all files of the release into `target`, whole or not at all; returns sha256 by GGUF file name.

    Args:
        report: the decided report; its verdict is a pass.
        report_dir: the folder of the report's files.

    Raises:
        InputError: a verified file is missing or was changed, two files share a name, or the folder cannot be written.
    """
    digests: dict[str, str] = {}
    with atomic_dir(target) as folder:
        for artefact in (a for a in report.artefacts if a.role == "candidate"):
            source = Path(artefact.path)
            if not source.is_file():
                raise InputError(f"{source} is verified but not here; put it back, or verify the files that are here")
            if source.name in digests:
                raise InputError(f"two verified files have the name {source.name}; rename one and verify again")
            _place(source, folder / source.name)
            if sha256_file(folder / source.name) != artefact.sha256:
                raise InputError(f"{source} is not what was verified: its sha256 is another; verify again")
            digests[source.name] = artefact.sha256
        for parent in {Path(a.path).parent for a in report.artefacts if a.role == "candidate"}:
            _companions(parent, folder, digests)
        (folder / "report").mkdir()
        for name in REPORT_FILES:
            if (report_dir / name).is_file():
                shutil.copyfile(report_dir / name, folder / "report" / name)
        write_text(folder / CARD, verification_card(report))
        write_text(folder / BADGE, badge(report))
    return digests


def _place(source: Path, target: Path) -> None:
    """Give the file a second name: by a hard link where the file system has them, otherwise by a copy."""
    source = source.resolve()  # the hub's cache holds links
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _companions(parent: Path, folder: Path, digests: dict[str, str]) -> None:
    """Copy the files that `so8t convert` wrote beside the GGUF files; types.json shows that it wrote there."""
    if not (parent / "types.json").is_file():
        return
    for pattern in _COMPANIONS:
        for found in parent.glob(pattern):
            shutil.copyfile(found, folder / found.name)
    if (parent / "README.md").is_file():
        card = (parent / "README.md").read_text(encoding="utf-8")
        write_text(folder / "README.md", with_badge(card))


def with_badge(card: str) -> str:
    """A model card with the badge below its first heading, linked to the verification."""
    line = f"[![verification]({BADGE})]({CARD})"
    lines = card.splitlines()
    if line in lines:
        return card
    at = next((number + 1 for number, text in enumerate(lines) if text.startswith("# ")), len(lines))
    return "\n".join([*lines[:at], "", line, *lines[at:]]) + "\n"


def local_paths(report: Report) -> list[str]:
    """A note if the report for publication names folders of this computer."""
    named = [artefact.path for artefact in report.artefacts if Path(artefact.path).is_absolute()]
    how = "verify with relative paths to keep them out"
    return [f"Note: report.json names folders of this computer, {named[0]} for one; {how}."] if named else []
