"""The data card: what a dataset consists of, written from report.json's content alone.

No dates and no machine paths: the same data gives the same card, byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def data_card(report: Mapping[str, Any]) -> str:
    """Markdown text from `DataReport.to_json()`."""
    train, heldout, config = report["train"], report["heldout"], report["config"]
    parts = [
        "# Data card",
        f"{train['rows']} training rows and {heldout['rows']} held-out rows in /think form: the assistant's turn holds "
        "its steps first and its answer last. Every row was rendered through the model's own chat template and passed "
        "the round-trip check; lengths below are in that model's tokens.",
        "## Sources",
        _table(
            ("source", "read", "kept", "duplicates", "rejected"),
            [
                (name, c["read"], c["kept"], c["duplicates"], sum(c["rejected"].values()))
                for name, c in report["sources"].items()
            ],
        ),
        "## Rejected rows, by reason",
        _table(("reason", "rows"), list(report["rejected"].items())) if report["rejected"] else "None.",
        "## Families and languages",
        _counts("family", train["families"], heldout["families"]),
        _counts("language", train["languages"], heldout["languages"]),
        f"## Token lengths (at most {config['max_tokens']})",
        _table(
            ("split", *train["tokens"]),
            [("train", *train["tokens"].values()), ("held-out", *heldout["tokens"].values())],
        ),
        "## What is held out",
        _heldout_text(config),
        "## Licence",
        "Rows of the source `generator` are made by this project and licensed under Apache-2.0 with it. "
        "Rows of every other source keep that source's licence, which this step does not know.",
        "## Limits",
        "Generated problems are small and templated: small integers, dates inside one month, times inside one hour. "
        "They teach the form and simple reasoning, not general skill; a score on them is no general score. "
        "Rows from files are checked for form, not for truth. Nothing was filtered for personal data.",
        "## How to regenerate",
        f"`so8t data CONFIG.yaml` with seed {report['seed']} and this `data` section (file names without their "
        "directories) writes the same bytes again:",
        "```yaml\n" + "\n".join(_yaml(config)) + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _heldout_text(config: Mapping[str, Any]) -> str:
    sentences = []
    if config["generator"]:
        sentences.append("Generated: whole problem families that training never sees, near relatives of trained ones.")
    if config["heldout_sources"]:
        sentences.append(f"Files: {', '.join(config['heldout_sources'])}.")
    elif config["sources"] and config["heldout_share"]:
        share = f"{config['heldout_share']:.0%}"
        sentences.append(f"Files: {share} of the distinct prompts, chosen by the hash of the prompt.")
    sentences.append("A training row whose prompt is held out is rejected (compared after NFKC, case and spacing).")
    return " ".join(sentences)


def _yaml(config: Mapping[str, Any], indent: str = "") -> list[str]:
    lines = []
    for key, value in config.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *_yaml(value, indent + "  ")]
        elif isinstance(value, list):
            lines.append(f"{indent}{key}: [{', '.join(value)}]")
        else:
            shown = {None: "null", True: "true", False: "false"}.get(value, value) if not _is_number(value) else value
            lines.append(f"{indent}{key}: {shown}")
    return lines


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)  # 1 == True would print as "true"


def _counts(name: str, train: Mapping[str, int], heldout: Mapping[str, int]) -> str:
    keys = [*train, *(key for key in heldout if key not in train)]
    return _table((name, "train", "held-out"), [(key, train.get(key, 0), heldout.get(key, 0)) for key in keys])


def _table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
