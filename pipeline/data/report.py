"""Counts of the data step: kept and rejected rows of each source, and the content of each output file.

For each reason the first rejected rows are shown by place and shape (see `pii.find.sample`): no letter or digit of a
row is shown. `DataReport.to_json()` is report.json and the only source of data_card.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.data.pii.find import find, sample

SAMPLES = 3  # rows shown for each reason
MAX_NAMES = 1000  # families, languages or labels counted by name; every row may have another
OTHER_NAMES = "(other)"
_SEARCHED = 20_000  # characters of a row that a sample looks at
QUANTILES = {"min": 0.0, "p50": 0.5, "p95": 0.95, "max": 1.0}


def tally(counter: Counter[str], name: str) -> None:
    """Count `name`; once `MAX_NAMES` names are counted, all new names are counted together."""
    counter[name if name in counter or len(counter) < MAX_NAMES else OTHER_NAMES] += 1


@dataclass
class SourceCount:
    """The counts of one source's rows: read = kept + duplicates + sum(rejected)."""

    facts: dict[str, str | None] = field(default_factory=dict)  # from the manifest: licence, robots, collected, purpose
    objection: str | None = None  # why the whole source is excluded
    read: int = 0
    kept: int = 0
    duplicates: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)  # changes to kept rows, and findings in them
    samples: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def reject(self, reason: str, where: str, row: dict[str, Any] | None, shown: str = "") -> None:
        """Count a rejected row; the first rows of each reason are kept as samples.

        Args:
            shown: particulars without any text of the row, such as the special token that it spells.
        """
        self.rejected[reason] += 1
        self._show(reason, where, row, shown)

    def duplicate(self, where: str, row: dict[str, Any]) -> None:
        """Count an exact duplicate."""
        self.duplicates += 1
        self._show("exact duplicate", where, row)

    def _show(self, reason: str, where: str, row: dict[str, Any] | None, said: str = "") -> None:
        shown = self.samples.setdefault(reason, [])
        if len(shown) < SAMPLES:
            shown.append({"row": where, "shape": _shape(row), **({"because": said} if said else {})})

    def to_json(self) -> dict[str, Any]:
        """Plain data for report.json; reasons in alphabetical order."""
        rejected = dict(sorted(self.rejected.items()))
        counts = {"read": self.read, "kept": self.kept, "duplicates": self.duplicates, "rejected": rejected}
        notes = {"notes": dict(sorted(self.notes.items()))} if self.notes else {}
        return {**self.facts, "excluded_because": self.objection, **counts, **notes}


def _shape(row: dict[str, Any] | None) -> str:
    """Masked sample of a row, from its first finding on if it has one."""
    if row is None:
        return ""
    text = " ".join(_texts(row))[:_SEARCHED]
    findings = find(text)
    start = max(0, findings[0].start - 20) if findings else 0
    moved = [type(f)(f.kind, f.start - start, f.end - start) for f in findings]
    return sample(text[start:], moved)


def _texts(value: Any) -> Iterator[str]:
    """Every string in a row, keys and roles left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, dict):
        for key, part in value.items():
            if key not in ("role", "id", "source"):
                yield from _texts(part)


@dataclass
class SplitCount:
    """The content of one output file; `tokens[n]` rows have n tokens, rendered through the chat template."""

    rows: int = 0
    families: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)  # unsafe rows, by "label (label's source)"

    def quantile(self, share: float) -> int:
        """The smallest length that a `share` of the rows at least does not exceed; 0 without rows."""
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
    policy: dict[str, Any]  # found and masked personal data, labels without a row

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
    def notes(self) -> dict[str, int]:
        """Changes to kept rows and findings in them, over all sources."""
        return dict(sorted(sum((source.notes for source in self.sources.values()), Counter[str]()).items()))

    @property
    def duplicates(self) -> int:
        """Exact duplicates removed, all sources together."""
        return sum(source.duplicates for source in self.sources.values())

    @property
    def samples(self) -> dict[str, list[dict[str, str]]]:
        """The first rejected rows of each reason, over all sources, by place and shape."""
        found: dict[str, list[dict[str, str]]] = {}
        for source in self.sources.values():
            for reason, rows in source.samples.items():
                found[reason] = [*found.get(reason, []), *rows][:SAMPLES]
        return dict(sorted(found.items()))

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
                "refusals": dict(sorted(split.refusals.items())),
            }
        return {
            **splits,
            "duplicates": self.duplicates,
            "rejected": self.rejected,
            "notes": self.notes,
            "samples": self.samples,
            **self.policy,
            "sources": {name: count.to_json() for name, count in self.sources.items()},
            "seed": self.seed,
            "config": self.config,
        }
