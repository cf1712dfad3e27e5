"""Counts of the data step: per source what became of its rows, per output file what it holds.

`DataReport.to_json()` is report.json and the only source of data_card.md.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

QUANTILES = {"min": 0.0, "p50": 0.5, "p95": 0.95, "max": 1.0}


@dataclass
class SourceCount:
    """What became of one source's rows: read = kept + duplicates + sum(rejected)."""

    read: int = 0
    kept: int = 0
    duplicates: int = 0
    rejected: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        """Plain data for report.json; reasons in alphabetical order."""
        rejected = dict(sorted(self.rejected.items()))
        return {"read": self.read, "kept": self.kept, "duplicates": self.duplicates, "rejected": rejected}


@dataclass
class SplitCount:
    """What one output file holds; `tokens[n]` rows have n tokens, rendered through the chat template."""

    rows: int = 0
    families: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)

    def quantile(self, share: float) -> int:
        """Smallest length that at least `share` of the rows do not exceed; 0 without rows."""
        seen = 0
        for length in sorted(self.tokens):
            seen += self.tokens[length]
            if seen >= share * self.rows:
                return length
        return 0


@dataclass(frozen=True)
class DataReport:
    """Counts of one data step, the source of report.json and data_card.md."""

    sources: dict[str, SourceCount]
    train: SplitCount
    heldout: SplitCount
    seed: int
    config: dict[str, Any]

    @property
    def train_rows(self) -> int:
        """Rows in train.jsonl."""
        return self.train.rows

    @property
    def heldout_rows(self) -> int:
        """Rows in heldout.jsonl."""
        return self.heldout.rows

    @property
    def rejected(self) -> dict[str, int]:
        """Rejected rows by reason, all sources together, most frequent first."""
        total = sum((source.rejected for source in self.sources.values()), Counter[str]())
        return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))

    @property
    def duplicates(self) -> int:
        """Exact duplicates removed, all sources together."""
        return sum(source.duplicates for source in self.sources.values())

    def to_json(self) -> dict[str, Any]:
        """Plain data for report.json."""
        splits = {}
        for name, split in (("train", self.train), ("heldout", self.heldout)):
            quantiles = {label: split.quantile(q) for label, q in QUANTILES.items()}
            mean = sum(n * count for n, count in split.tokens.items()) / max(split.rows, 1)
            splits[name] = {
                "rows": split.rows,
                "families": dict(sorted(split.families.items())),
                "languages": dict(sorted(split.languages.items())),
                "tokens": {**quantiles, "mean": round(mean, 2), "total": sum(n * c for n, c in split.tokens.items())},
            }
        return {
            **splits,
            "duplicates": self.duplicates,
            "rejected": self.rejected,
            "sources": {name: count.to_json() for name, count in self.sources.items()},
            "seed": self.seed,
            "config": self.config,
        }
