"""The data step's rules for personal data, and for licences that a row itself states.

`PrivacyFilter.clean` looks at every text of a row that would be written out: messages, family, language and labels.
`exclude` drops the row; `mask` puts the kind in brackets in place of each finding and keeps the row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from pipeline.data.licences import LicencePolicy
from pipeline.data.pii.find import find, mask
from pipeline.data.rows import ThinkRow
from pipeline.data.think_form import SYSTEM_MESSAGE, RowError, read_assistant

GENERATOR_FACTS: dict[str, str | None] = {
    "licence": "MIT",
    "robots": "not-applicable",
    "collected": None,
    "purpose": "training",
    "url": None,
}


class PrivacyFilter:
    """Finds personal and confidential content in rows, and counts rows by kind of content."""

    def __init__(self, action: Literal["exclude", "mask"], kinds: Sequence[str]) -> None:
        self._action, self._kinds = action, frozenset(kinds)
        self.found: Counter[str] = Counter()  # rows by kind; a row with two kinds counts for both
        self.masked_rows = 0

    def clean(self, row: ThinkRow) -> ThinkRow:
        """The row, masked where the policy says so.

        Raises:
            RowError: `pii: KIND` of the first finding, if the policy excludes it; or a mask breaks the /think form.
        """
        kinds: list[str] = []
        cleaned = replace(
            row,
            messages=[self._every_text(message, kinds) for message in row.messages],
            tools=self._every_text(row.tools, kinds),
            family=self._text(row.family, kinds),
            language=self._text(row.language, kinds),
            labels={
                name: self._text(value, kinds)
                if isinstance(value, str | int) and not isinstance(value, bool)
                else value
                for name, value in row.labels.items()
            },
        )
        if not kinds:
            return row
        self.found.update(set(kinds))
        if self._action == "exclude":
            raise RowError(f"pii: {kinds[0]}")
        self.masked_rows += 1
        return replace(cleaned, answer=read_assistant(cleaned.messages[-1]).answer)

    def _every_text(self, value: Any, kinds: list[str]) -> Any:
        """Clean a message or the content of a tool call: each string and number alone; keys stay."""
        if isinstance(value, dict):
            return {key: part if key == "role" else self._every_text(part, kinds) for key, part in value.items()}
        if isinstance(value, list):
            return [self._every_text(part, kinds) for part in value]
        return value if value is None or isinstance(value, bool | float) else self._text(value, kinds)

    def _text(self, value: Any, kinds: list[str]) -> Any:
        text = str(value)
        if text == SYSTEM_MESSAGE:
            return value
        findings = find(text, self._kinds)
        if not findings:
            return value
        kinds += [finding.kind for finding in findings]
        return mask(text, findings)

    def to_json(self) -> dict[str, Any]:
        """Plain data for report.json."""
        return {"action": self._action, "found": dict(sorted(self.found.items())), "masked_rows": self.masked_rows}


def row_licence(row: dict[str, Any], policy: LicencePolicy) -> str | None:
    """The objection to a licence that the row states (`licence` or `license`); None without licence or objection."""
    for key in ("licence", "license"):
        if (own := row.get(key)) is not None:
            said = policy.objection(own) if isinstance(own, str) else "licence unknown"
            if said:
                return f"row's own {said}"
    return None
