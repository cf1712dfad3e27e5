"""One Markdown table of all candidates for a model card: type, size, measurements and verdict of each."""

from __future__ import annotations

from pathlib import Path

from verification.gate.report import Report
from verification.show.words import SEVERITY, number, percent, size, visible

_WORDS = {"pass": "pass", "waived": "pass", "fail": "**fail**", "inconclusive": "open", "not evaluated": "open"}


def model_card_table(report: Report) -> str:
    """One row for each candidate, in the report's order; a dash stands for a value that was not measured."""
    measured = {d.candidate: d for d in report.divergences}
    rows = [
        "| file | type | size | mean KLD, nats (95 %) | same top-1 | PPL ratio | verdict |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for artefact in report.artefacts:
        if artefact.role != "candidate":
            continue
        found = [check.status for leg in report.legs for check in leg.checks if check.subject == artefact.label]
        status = min(found, key=SEVERITY.index, default="not evaluated")
        d = measured.get(artefact.label)
        values = ["-"] * 3
        if d is not None and d.tokens:
            low, high = d.mean_kld_interval
            values = [
                f"{number(d.mean_kld)} ({number(low)} to {number(high)})",
                percent(d.top1),
                number(d.ppl_ratio, 4),
            ]
        cells = [Path(artefact.path).name, artefact.label.split(" ")[0], size(artefact.bytes), *values, _WORDS[status]]
        rows.append(f"| {' | '.join(visible(cell).replace('|', '&#124;') for cell in cells)} |")
    return "\n".join([*rows, "", visible(report.summary), ""])
