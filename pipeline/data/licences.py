"""The licences that allow training: SPDX identifiers against an allow-list and a forbidden list.

A licence on neither list is unknown, and its rows are excluded like those of a forbidden licence. `A OR B` needs one
allowed part, `A AND B` needs all parts; OR beside AND needs parentheses. `A WITH B` is one licence. `*` at the end of a
list entry stands for any rest. Case does not matter in names (SPDX, annex D). license-expression reads the expressions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain, zip_longest
from typing import Any

from pipeline.config import DataConfig

OWN = "LicenseRef-Own"  # the user's own data, or data made for the user; no licence of SPDX

ALLOWED = (
    "CC0-1.0",
    "CC-BY-2.0",
    "CC-BY-2.5",
    "CC-BY-3.0",
    "CC-BY-4.0",
    "CC-BY-2.1-JP",
    "PDDL-1.0",
    "ODC-By-1.0",
    "CDLA-Permissive-1.0",
    "CDLA-Permissive-2.0",
    "MIT",
    "MIT-0",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "0BSD",
    "ISC",
    "Unlicense",
    OWN,
)
FORBIDDEN = ("CC-BY-NC*", "CC-BY-ND*", "NONE", "LicenseRef-Proprietary", "LicenseRef-No-Training")
_FORBIDDEN, _UNKNOWN = "licence forbidden", "licence unknown"
_OPERATOR = re.compile(r"((?<![^\s()])(?:AND|OR)(?![^\s()])|[()])")
_GAP = re.compile(r"(?:^|\(|AND|OR) *(?:$|\)|AND|OR)")  # a missing name, which the library lets pass: `MIT OR ISC OR`
_NESTING = 50  # depth of parentheses: no licence needs more, and no row may exhaust the stack


@dataclass(frozen=True)
class LicencePolicy:
    """The two lists; an entry on both is forbidden."""

    allowed: Sequence[str] = ALLOWED
    forbidden: Sequence[str] = FORBIDDEN

    @classmethod
    def of(cls, config: DataConfig) -> LicencePolicy:
        """The lists of a configuration; this module's list replaces a missing one."""
        allowed, forbidden = config.allowed_licences, config.forbidden_licences
        return cls(ALLOWED if allowed is None else allowed, FORBIDDEN if forbidden is None else forbidden)

    def objection(self, licence: str) -> str | None:
        """`licence forbidden`, `licence unknown`, or None where rows under it may be used."""
        pieces = _OPERATOR.split(licence)  # name, operator, name, ...
        names, operators = [" ".join(name.split()) for name in pieces[::2]], pieces[1::2]
        if not {"AND", "OR"} & set(operators):
            whole = self._one(" ".join(licence.split()))
            if whole != _UNKNOWN or not operators:
                return whole  # parentheses may belong to a name on a list
        from license_expression import ExpressionError, Licensing  # most licences are one name and never get here

        # Each name becomes a symbol: the lists may hold names that SPDX forbids, and a small `or` is no operator.
        symbols = [f"name-{k}" if name else "" for k, name in enumerate(names)]
        expression = " ".join(chain(*zip_longest(symbols, operators, fillvalue="")))
        if _GAP.search(expression) or not _is_clear(operators):
            return _UNKNOWN
        grammar, by_symbol = Licensing(), dict(zip(symbols, names, strict=True))
        try:
            tree = grammar.parse(expression)
        except ExpressionError:
            return _UNKNOWN

        def of(part: Any) -> str | None:
            if not part.args:
                return self._one(by_symbol[part.key])
            found = [of(smaller) for smaller in part.args]
            if isinstance(part, grammar.OR) and None in found:
                return None
            return _FORBIDDEN if _FORBIDDEN in found else next(filter(None, found), None)

        return of(tree)

    def _one(self, licence: str) -> str | None:
        if _listed(licence, self.forbidden):
            return _FORBIDDEN
        return None if _listed(licence, self.allowed) else _UNKNOWN


def _is_clear(operators: Sequence[str]) -> bool:
    """Whether parentheses pair and are not too deep, and none holds both AND and OR, whose order is not obvious."""
    levels: list[set[str]] = [set()]
    for operator in operators:
        if operator == "(":
            levels.append(set())
        elif operator == ")":
            levels.pop()
        else:
            levels[-1].add(operator)
        if not levels or len(levels[-1]) > 1 or len(levels) > _NESTING:
            return False
    return len(levels) == 1


def _listed(licence: str, patterns: Sequence[str]) -> bool:
    folded = licence.casefold()
    for pattern in patterns:
        wanted = pattern.casefold()
        stem = wanted.removesuffix("*")
        if folded == wanted or (stem != wanted and fnmatchcase(folded, stem + "*")):
            return True
    return False
