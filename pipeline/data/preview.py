"""`so8t data --preview N`: show the first training rows with their loss mask, and the counts; keep nothing.

Every line starts with "masked" or "trained", so that no colour is needed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from pipeline.config import RunConfig
from pipeline.data.build import build_dataset
from pipeline.data.masking import IGNORED, encode_row
from pipeline.data.report import DataReport

MASKED, TRAINED = ("masked", "dim"), ("trained", "bold green")


def preview(
    config: RunConfig, tokenizer: Any, rows: int, advance: Callable[[int], None] | None = None
) -> tuple[list[Text], DataReport]:
    """(the first `rows` training rows, the counts of the whole data step); its directory is removed afterwards.

    Raises:
        InputError: see `build_dataset`.
    """
    with tempfile.TemporaryDirectory(prefix="so8t-preview-") as scratch:
        report = build_dataset(config.data, tokenizer, Path(scratch), config.seed, advance)
        with (Path(scratch) / "train.jsonl").open(encoding="utf-8") as stream:
            shown = [row_text(tokenizer, json.loads(line)) for line, _ in zip(stream, range(rows), strict=False)]
    return shown, report


def row_text(tokenizer: Any, row: dict[str, Any]) -> Text:
    """One row of train.jsonl as the trainer encodes it."""
    encoded = encode_row(tokenizer, row["messages"], tools=row.get("tools", ()))
    ids, labels = encoded["input_ids"], encoded["labels"]
    first = next(at for at, label in enumerate(labels) if label != IGNORED)
    end = len(labels) - next(at for at, label in enumerate(reversed(labels)) if label != IGNORED)
    text = Text(f"{row['source']}: {len(ids)} tokens, {end - first} trained\n", style="bold")
    for part, (name, style) in ((ids[:first], MASKED), (ids[first:end], TRAINED), (ids[end:], MASKED)):
        if part:
            for line in tokenizer.decode(part, clean_up_tokenization_spaces=False).split("\n"):
                text.append(f"{name:>7} | {line}\n", style=style)
    return text


def counts_table(report: DataReport) -> Table:
    """The counts of kept and rejected rows of every source."""
    table = Table("source", "read", "kept", "left out", "because", box=None, pad_edge=False)
    for name, count in report.sources.items():
        reasons = dict(sorted(count.rejected.items(), key=lambda item: (-item[1], item[0])))
        if count.duplicates:
            reasons["exact duplicate"] = count.duplicates
        said = ", ".join(f"{reason}: {number}" for reason, number in reasons.items()) or "-"
        notes = "".join(f"; note: {note}: {number}" for note, number in sorted(count.notes.items()))
        cells = (name, count.read, count.kept, count.read - count.kept, said + notes)
        table.add_row(*(Text(str(cell)) for cell in cells))
    return table
