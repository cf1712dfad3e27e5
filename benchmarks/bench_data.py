"""The data step's throughput against parsing and writing the same rows, the least work of any JSONL reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.config import DataConfig
from pipeline.data.build import build_dataset
from pipeline.data.generator import generate
from so8t_core.files import atomic_dir
from verification.reference.tokenizer import load_tokenizer


def rows_file(path: Path, rows: int) -> Path:
    """Generated Japanese and English rows as a JSONL file."""
    made, _ = generate(rows, 0, ["ja", "en"], 0)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8")
    return path


def build(source: Path, tokenizer: Any, out: Path) -> int:
    """The whole data step over one file; returns the number of kept rows."""
    config = DataConfig(sources=[str(source)], unlisted_sources="allow", heldout_share=0.1)
    with atomic_dir(out) as folder:
        report = build_dataset(config, tokenizer, folder, 0)
    return report.train_rows + report.heldout_rows


def parse_and_write(source: Path, out: Path) -> None:
    """json.loads and json.dumps of every line."""
    with source.open(encoding="utf-8") as lines, out.open("w", encoding="utf-8") as stream:
        for line in lines:
            stream.write(json.dumps(json.loads(line), ensure_ascii=False) + "\n")


def bench_data(figures: Any, tokenizer_dir: Path, quick: bool, tmp_path: Path) -> None:
    tokenizer, rows = load_tokenizer(tokenizer_dir), 300 if quick else 1000
    source = rows_file(tmp_path / "rows.jsonl", rows)
    assert build(source, tokenizer, tmp_path / "out") > 0.9 * rows
    repeats = range(20)
    figures(
        f"data step, {rows} rows",
        {
            "so8t": lambda: build(source, tokenizer, tmp_path / "out"),
            "json.loads + dumps, 20 times": lambda: [parse_and_write(source, tmp_path / "floor") for _ in repeats],
        },
        rounds=9,
        lower_is_better=True,
        rows=rows,
    )
