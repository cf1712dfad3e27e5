"""The data card: a description of a dataset, written from the content of report.json alone.

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
        f"{train['rows']} training rows and {heldout['rows']} held-out rows {_form(config)}: the assistant's "
        "turn holds its steps first and its answer last. Every row was rendered through the model's own chat template "
        "and passed the round-trip check; lengths below are in that model's tokens.",
        "## Sources",
        _table(
            ("source", "read", "kept", "duplicates", "rejected"),
            [
                (name, c["read"], c["kept"], c["duplicates"], sum(c["rejected"].values()))
                for name, c in report["sources"].items()
            ],
        ),
        "## Licences and permissions",
        "Rows of a source without an allowed licence, or whose page robots.txt forbids, are excluded. "
        "The source `generator` is made by this project, under its licence.",
        _table(
            ("source", "licence", "robots.txt", "collected", "purpose", "excluded because"),
            [(name, *_facts(c)) for name, c in report["sources"].items()],
        ),
        "## Rows left out, by reason",
        _table(("reason", "rows"), [*report["rejected"].items(), *_duplicates(report)])
        if report["rejected"] or report["duplicates"]
        else "None.",
        *(["## Notes on kept rows", _table(("note", "rows"), [*report["notes"].items()])] if report["notes"] else []),
        "## Personal and confidential content",
        _privacy_text(report),
        "## Unsafe rows",
        _unsafe_text(report),
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
        "## Limits",
        "Generated problems are small and templated: small integers, dates inside one month, times inside one hour. "
        "They teach the form and simple reasoning, not general skill; a score on them is no general score. "
        "Rows from files are checked for form; for truth only where rules can tell (sums, numbers and dates of the "
        "last step against the answer, an answer that the row states). Names of people are out of reach of the rules "
        "that look for personal data, and a row that nobody labelled as unsafe is taken as safe.",
        "## How to regenerate",
        f"`so8t data CONFIG.yaml` with seed {report['seed']} and this `data` section (file names without their "
        "directories) writes the same bytes again:",
        "```yaml\n" + "\n".join(_yaml(config)) + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _form(config: Mapping[str, Any]) -> str:
    return "in /think form" if config["think_form"] == "so8t" else "in the base model's own thinking form"


def _facts(count: Mapping[str, Any]) -> list[str]:
    keys = ("licence", "robots", "collected", "purpose", "excluded_because")
    return [str(count.get(key) or ("-" if key == "excluded_because" else "not stated")) for key in keys]


def _duplicates(report: Mapping[str, Any]) -> list[tuple[str, int]]:
    return [("exact duplicate", report["duplicates"])] if report["duplicates"] else []


def _privacy_text(report: Mapping[str, Any]) -> str:
    pii, kinds = report["pii"], ", ".join(report["config"]["pii_kinds"])
    action = "were excluded" if pii["action"] == "exclude" else f"had it masked ({pii['masked_rows']} rows)"
    found = ", ".join(f"{kind}: {rows}" for kind, rows in pii["found"].items()) or "none"
    return (
        f"Looked for: {kinds}. Rows with any of it {action}. Rows by what was found: {found}. "
        "Names of people cannot be found by rules: a row may still name somebody."
    )


def _unsafe_text(report: Mapping[str, Any]) -> str:
    purpose = (
        "Rows labelled as unsafe (NSFW, harmful) serve one purpose: to teach refusal. Each of them that is kept has a "
        "refusal as its answer; any other was excluded. "
    )
    rows = [(name, report[name]["refusals"]) for name in ("train", "heldout")]
    if not any(counts for _, counts in rows):
        return purpose + "This dataset has none."
    kinds = [*rows[0][1], *(kind for kind in rows[1][1] if kind not in rows[0][1])]
    table = [(kind, rows[0][1].get(kind, 0), rows[1][1].get(kind, 0)) for kind in kinds]
    return f"{purpose}\n\n{_table(('label (its source)', 'train', 'held-out'), table)}"


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
