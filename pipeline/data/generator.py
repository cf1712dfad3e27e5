"""The built-in Japanese and English reasoning set: correct by construction, seeded, held out by problem family.

Every row is one (family, language, case, phrasing). The pools of all families of a split are shuffled by the seed and
dealt out in turn, so that any prefix of the result is balanced over families and languages. Training and held-out rows
come from disjoint families. No two rows have the same prompt.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import TypedDict

from pipeline.data.problems import arithmetic, dates, logic, units
from pipeline.data.problems.base import LANGUAGES, Family
from so8t_core.errors import InputError

FAMILIES: tuple[Family, ...] = (
    *arithmetic.FAMILIES,
    *dates.FAMILIES,
    *units.FAMILIES,
    *logic.FAMILIES,
)


class GeneratedRow(TypedDict):
    """One generated problem; `answer` is canonical, so that an exact comparison of strings decides."""

    id: str
    family: str
    language: str
    prompt: str
    steps: str
    answer: str


def families(*, heldout: bool) -> list[Family]:
    """The families of one split."""
    return [family for family in FAMILIES if family.heldout == heldout]


def capacity(languages: Sequence[str], *, heldout: bool) -> int:
    """How many distinct rows one split can hold in these languages."""
    return sum(family.count(language) for family in families(heldout=heldout) for language in languages)


def generate(
    rows: int, heldout_rows: int, languages: Sequence[str], seed: int
) -> tuple[list[GeneratedRow], list[GeneratedRow]]:
    """(train, heldout) rows; the same arguments give the same rows.

    Raises:
        InputError: an unknown language, a negative count, or more rows than distinct ones exist.
    """
    languages = list(dict.fromkeys(languages))
    unknown = [language for language in languages if language not in LANGUAGES]
    if unknown or not languages:
        shown = repr(unknown[0]) if unknown else "(none)"
        raise InputError(f"data.generator.languages: {shown} is not one of {', '.join(LANGUAGES)}")
    result = []
    for name, wanted, heldout in (("rows", rows, False), ("heldout_rows", heldout_rows, True)):
        possible = capacity(languages, heldout=heldout)
        if not 0 <= wanted <= possible:
            raise InputError(
                f"data.generator.{name} = {wanted}: 0 to {possible} distinct rows are possible "
                f"in {', '.join(languages)}; ask for fewer or add a language or a source file"
            )
        deal = _deal(families(heldout=heldout), languages, random.Random(f"{seed}/{name}"))
        result.append([next(deal) for _ in range(wanted)])
    return result[0], result[1]


def _deal(chosen: list[Family], languages: Sequence[str], rng: random.Random) -> Iterator[GeneratedRow]:
    """In each round one row of every (family, language) pool, in a new random order, until all pools are empty."""
    pools = []
    for family in chosen:
        for language in languages:
            numbers = list(range(family.count(language)))
            rng.shuffle(numbers)
            pools.append((family, language, numbers))
    while pools:
        rng.shuffle(pools)
        for family, language, numbers in pools:
            prompt, steps, answer = family.row(language, numbers.pop())
            digest = hashlib.sha256(prompt.encode()).hexdigest()[:10]
            yield GeneratedRow(
                id=f"{family.name}-{language}-{digest}",
                family=family.name,
                language=language,
                prompt=prompt,
                steps=steps,
                answer=answer,
            )
        pools = [pool for pool in pools if pool[2]]
