"""Which licences allow training: SPDX identifiers against an allow-list and a forbidden list.

A licence on neither list is unknown and excludes its rows like a forbidden one. `A OR B` needs one allowed part,
`A AND B` all of them; `*` at the end of a list entry stands for any rest. Case does not matter (SPDX, annex D).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from pipeline.config import DataConfig

OWN = "LicenseRef-Own"  # data of one's own, or made for one: stated by the user, not by SPDX

ALLOWED = (
    "CC0-1.0", "CC-BY-2.0", "CC-BY-2.5", "CC-BY-3.0", "CC-BY-4.0", "CC-BY-2.1-JP", "PDDL-1.0", "ODC-By-1.0",
    "CDLA-Permissive-1.0", "CDLA-Permissive-2.0", "MIT", "MIT-0", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "0BSD",
    "ISC", "Unlicense", OWN,
)  # fmt: skip
FORBIDDEN = ("CC-BY-NC*", "CC-BY-ND*", "NONE", "LicenseRef-Proprietary", "LicenseRef-No-Training")


@dataclass(frozen=True)
class LicencePolicy:
    """The two lists; an entry on both is forbidden."""

    allowed: Sequence[str] = ALLOWED
    forbidden: Sequence[str] = FORBIDDEN

    @classmethod
    def of(cls, config: DataConfig) -> LicencePolicy:
        """The lists of a configuration; a list that it leaves out is the one of this module."""
        allowed, forbidden = config.allowed_licences, config.forbidden_licences
        return cls(ALLOWED if allowed is None else allowed, FORBIDDEN if forbidden is None else forbidden)

    def objection(self, licence: str) -> str | None:
        """`licence forbidden`, `licence unknown`, or None where rows under it may be used."""
        words = licence.split()
        if "OR" in words and "AND" in words:
            return "licence unknown"  # needs parentheses to mean one thing; state the licence that was chosen
        joint = "OR" if "OR" in words else "AND"
        parts = [" ".join(part.split()) for part in " ".join(words).split(f" {joint} ")]
        found = [self._one(part) for part in parts]
        if joint == "OR" and None in found:
            return None
        return "licence forbidden" if "licence forbidden" in found else next(filter(None, found), None)

    def _one(self, licence: str) -> str | None:
        if _listed(licence, self.forbidden):
            return "licence forbidden"
        return None if _listed(licence, self.allowed) else "licence unknown"


def _listed(licence: str, patterns: Sequence[str]) -> bool:
    folded = licence.casefold()
    for pattern in patterns:
        wanted = pattern.casefold()
        stem = wanted.removesuffix("*")
        if folded == wanted or (stem != wanted and fnmatchcase(folded, stem + "*")):
            return True
    return False
