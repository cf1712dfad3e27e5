"""VERIFICATION.md, a page for people who download a file, and its badge; a model card links both."""

from __future__ import annotations

import html
from collections import Counter
from pathlib import PurePath
from typing import Any

from verification.gate.report import Artefact, Report
from verification.gate.statement import policy_digest
from verification.show.words import VERDICT_WORDS, visible

CARD, BADGE = "VERIFICATION.md", "verification.svg"
_COLOURS = {"pass": "#12663a", "fail": "#b01c1c", "inconclusive": "#845400", "incomplete": "#845400"}
_DRAWERS = ("proven", "judged", "unexplained", "not compared")


def verification_card(report: Report) -> str:
    """VERIFICATION.md as Markdown: verdict, files with their digests and numbers, and how to verify again."""
    from verification.show.write import render_markdown  # `write` renders the other forms and has the filters

    files = [_file(report, a) for a in report.artefacts if a.role == "candidate"]
    reference = next((a for a in report.artefacts if a.role == "reference"), None)
    return render_markdown(
        "verification.md.j2",
        report=report,
        badge=BADGE,
        verdict=VERDICT_WORDS[report.verdict],
        files=files,
        reference=reference,
        reference_name=public_name(reference.path) if reference else "",
        policy=policy_digest(report.policy),
        drawers=[drawer for drawer in _DRAWERS if any(file["drawers"][drawer] for file in files)],
    )


def _file(report: Report, artefact: Artefact) -> dict[str, Any]:
    return {
        "name": PurePath(artefact.path).name,
        "artefact": artefact,
        "divergence": next((d for d in report.divergences if d.candidate == artefact.label), None),
        "drawers": Counter(row.drawer for row in report.tensors if row.candidate == artefact.label),
    }


def public_name(path: str) -> str:
    """A model's name without this computer's folders; for a file in the hub's cache, its id and revision."""
    parts = PurePath(path).parts
    for number, part in enumerate(parts):
        if part.startswith("models--") and parts[number + 1 : number + 2] == ("snapshots",) and len(parts) > number + 2:
            return f"{part.removeprefix('models--').replace('--', '/')}@{parts[number + 2][:12]}"
    return PurePath(path).name


def badge(report: Report) -> str:
    """A static SVG with the gate's verdict; it loads nothing and runs nothing."""
    count = sum(artefact.role == "candidate" for artefact in report.artefacts)
    passed = f"verified: {count} {'file' if count == 1 else 'files'} passed"
    right = passed if report.verdict == "pass" else f"not verified: {report.verdict}"
    widths = [round(12 + 6.6 * len(text)) for text in ("SO8T", right)]
    total, middle = sum(widths), widths[0] + widths[1] / 2
    text = html.escape(visible(right))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="20" role="img" aria-label="SO8T: {text}">\n'
        f"<title>SO8T: {text}</title>\n"
        f'<rect width="{total}" height="20" rx="3" fill="#3b434b"/>\n'
        f'<path d="M{widths[0]} 0h{widths[1] - 3}a3 3 0 0 1 3 3v14a3 3 0 0 1-3 3h-{widths[1] - 3}z" '
        f'fill="{_COLOURS[report.verdict]}"/>\n'
        '<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" text-anchor="middle">\n'
        f'<text x="{widths[0] / 2}" y="14">SO8T</text>\n<text x="{middle}" y="14">{text}</text>\n</g>\n</svg>\n'
    )
