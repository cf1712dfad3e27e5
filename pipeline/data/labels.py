"""Labels of unsafe rows (NSFW, harmful); such rows have one use: to teach refusal.

A label stands in the row (`safety_label`), in a label file, or in the manifest (purpose: refusal); the strictest
label counts. A row with an unsafe label is excluded unless its answer is a refusal. A row whose label is on neither
list is excluded too. Lines of a label file name a row by its `id`, or by `source` (as in the report) and `line`:

    {"source": "rows.jsonl", "line": 12, "label": "harmful", "by": "reviewer 2"}
No classifier runs here: a row that nobody labelled is taken as safe.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.refusal import MAX_STEPS, is_refusal
from pipeline.data.source_rows import read_lines
from pipeline.data.think_form import BrokenLine, RowError, Thought
from so8t_core.errors import InputError

FIELD = "safety_label"
NOT_REFUSED = "unsafe and no refusal"
UNKNOWN = "unknown safety label"
_KEYS = {"id", "source", "line", "label", "by"}


@dataclass(frozen=True)
class UnsafeLabel:
    """The reason why a row counts as unsafe: the label and the field that holds it."""

    kind: str
    source: str


class SafetyLabels:
    """All labels of one data step; memory holds only the labels of a label file, under 16-byte keys.

    Raises:
        InputError: a missing label file, or a broken line in it (by file and line).
    """

    def __init__(self, file: Path | None, unsafe: list[str], safe: list[str]) -> None:
        self._unsafe = {label.casefold() for label in unsafe}
        self._safe = {label.casefold() for label in safe}
        if both := self._unsafe & self._safe:
            raise InputError(f"the label {min(both)!r} is in data.unsafe_labels and in data.safe_labels; keep one")
        self._by_key: dict[bytes, tuple[str, str]] = {}
        self._file = file
        self._used: set[bytes] = set()
        self.counts: Counter[str] = Counter()  # "kind (label source)": rows that were used for refusal
        if file is not None:
            self._read(file)

    def _read(self, path: Path) -> None:
        for number, item in read_lines(path, what="data.safety_labels"):
            where = f"{path}, line {number}"
            if isinstance(item, BrokenLine):
                raise InputError(f"{where}: {item}")
            if unknown := sorted(set(item) - _KEYS):
                raise InputError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(_KEYS))}")
            label, key = item.get("label"), _key_of(item)
            if not isinstance(label, str) or key is None:
                raise InputError(f"{where}: needs `label` (a string) and either `id` or `source` with `line`")
            if label.casefold() not in self._unsafe | self._safe:
                raise InputError(f"{where}: label {label!r} is in neither data.unsafe_labels nor data.safe_labels")
            by = item.get("by")
            source = path.name if by is None else f"{path.name}: {by}"
            if key not in self._by_key or label.casefold() in self._unsafe:  # the strictest label counts
                self._by_key[key] = (label.casefold(), source)

    def look_up(self, row: dict[str, Any], source: str, line: int, *, refusal_only: bool) -> UnsafeLabel | None:
        """The unsafe label of a row, None for a safe or unlabelled one.

        Raises:
            RowError: a label that is on neither list.
        """
        found: list[tuple[str, str]] = []
        own = row.get(FIELD)
        if own is not None:
            found.append((str(own).casefold(), "row"))
        if self._by_key:
            keys = (_digest(f"id/{row.get('id')}"), _digest(f"line/{source}/{line}"))
            for key in keys:
                if key in self._by_key:
                    self._used.add(key)
                    found.append(self._by_key[key])
        if refusal_only:
            found.append(("unsafe", "manifest"))
        for kind, origin in found:
            if kind in self._unsafe or origin == "manifest":
                return UnsafeLabel(kind, origin)
        unknown = [kind for kind, _ in found if kind not in self._safe]
        if unknown:
            raise RowError(UNKNOWN, f"{unknown[0][:40]!r} is in neither data.unsafe_labels nor data.safe_labels")
        return None

    def check(self, label: UnsafeLabel, thought: Thought) -> None:
        """Raise `RowError` unless the target refuses."""
        if not is_refusal(thought.answer) or len(thought.steps) > MAX_STEPS:
            raise RowError(NOT_REFUSED, f"labelled {label.kind} by {label.source}")

    def require_match(self) -> None:
        """Raise `InputError` if no label of the label file matches a row: the file then belongs to other rows."""
        if self._by_key and not self._used:
            raise InputError(
                f"{self._file}: none of its {len(self._by_key)} labels names a row; check id, source, line"
            )

    @property
    def unmatched(self) -> int:
        """The number of labels in the file that match no row."""
        return len(self._by_key) - len(self._used)


def _key_of(item: dict[str, Any]) -> bytes | None:
    if isinstance(item.get("id"), str) and "source" not in item and "line" not in item:
        return _digest(f"id/{item['id']}")
    line = item.get("line")
    if isinstance(item.get("source"), str) and isinstance(line, int) and "id" not in item:
        return _digest(f"line/{item['source']}/{line}")
    return None


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]
