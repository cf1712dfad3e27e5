"""Compare two result files of one machine, figure by figure: did SO8T become slower or use more memory?

python -m benchmarks.compare OLD NEW [--again NEWER] [--old-again OLDER] [--other-machine] [--partial]

A figure's change is the shift (`shift`) of its ratio to the peer of the same run, with a 99 % interval; times are not
compared. A figure has regressed if the interval's near end lies beyond 1.14 (the square root of 1.3, half way on a log
scale from no change to the 30 % that must be seen) and the change is more than 0.2 ms or 16 MB. It is undecided if the
interval reaches from below 1.14 to above 1.3: measure again, longer. The interval does not cover effects that last for
a whole figure or process, such as other programs or the memory's layout. So measure OLD and NEW twice and give all four
files: a figure then has regressed only if both new files show it against both old files.
Exit codes: 0 no figure regressed; 1 a figure regressed or is missing; 2 the files cannot be compared.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.result_file import Figure, Results, read
from so8t_core.errors import InputError

LEVEL = 0.99
SEEN = 1.3  # the slowdown that must be seen
FLOOR = math.sqrt(SEEN)
MILLISECONDS = 0.2  # about a timer interrupt and a refilled cache
MEGABYTES = 16.0  # about what an allocator keeps or gives back by chance
_COUNTED = 0.005  # the floor of counted figures (bytes that a graph keeps), which have no noise

Status = Literal["regressed", "better", "same", "undecided"]


@dataclass(frozen=True)
class Change:
    """One figure in both files; `slower` is a factor on SO8T's time or memory, above 1 if it became worse."""

    name: str
    peer: str
    old: float
    new: float
    slower: float
    interval: tuple[float, float]
    extra: str  # the change as a time or a size
    status: Status


def shift(old: list[float], new: list[float], level: float = LEVEL) -> tuple[float, float, float]:
    """(estimate, low, high) of the shift from `old` to `new`, with the exact interval of the rank-sum test.

    The estimate (Hodges, Lehmann) is the median of all differences between a new and an old value; the test assumes no
    distribution. Too few rounds for the level give an infinite interval. Source: Hollander, Wolfe, Chicken,
    Nonparametric Statistical Methods, chapter 4.
    """
    differences = np.sort(np.subtract.outer(np.asarray(new), np.asarray(old)).ravel())
    cut = _rank_sum_cut(len(old), len(new), (1 - level) / 2)
    if cut < 0:
        return float(np.median(differences)), -math.inf, math.inf
    return float(np.median(differences)), float(differences[cut]), float(differences[-1 - cut])


@functools.cache
def _rank_sum_cut(m: int, n: int, tail: float) -> int:
    """The largest k with P(U <= k) <= tail for the rank-sum statistic U of m and n values; -1 if there is none.

    The interval runs from the sorted difference at index k to the one at the same index from the end. The number of
    ways to reach U = u is the coefficient of q^u in the Gaussian binomial (m + n choose n), in whole numbers.
    """
    ways = np.zeros(m * n + 1, dtype=object)
    ways[0] = 1
    for i in range(1, n + 1):  # times (1 - q^(m+i)) / (1 - q^i)
        ways[m + i :] = ways[m + i :] - ways[: max(0, len(ways) - m - i)]
        for start in range(i):
            ways[start::i] = np.cumsum(ways[start::i])
    below = np.cumsum(ways)
    return int(sum(count <= tail * int(below[-1]) for count in below)) - 1


def judge(old: Figure, new: Figure) -> Change:
    """The change of one figure."""
    sign = 1.0 if new.lower_is_better else -1.0
    before, after = ([sign * math.log(ratio) for ratio in figure.ratios] for figure in (old, new))
    floor = math.log(FLOOR)
    if new.milliseconds:
        estimate, low, high = shift(before, after)
    else:
        estimate, low, high = _whole_range(before, after)
        floor = floor if new.sizes else math.log1p(_COUNTED)
    slower = math.exp(estimate)
    own, unit, least = _own(new)
    extra = own * (1 - 1 / slower)
    status: Status
    if low > floor:
        status = "regressed" if own == 0 or extra > least else "same"
    elif high < -floor:
        status = "better"
    else:
        status = "same" if high < math.log(SEEN) else "undecided"
    interval = (math.exp(low), math.exp(min(high, 700.0)))  # 700: no overflow for an infinite interval
    shown = f"{extra:+.3g} {unit}" if own else ""
    return Change(new.name, new.peer, old.ratio, new.ratio, slower, interval, shown, status)


def _whole_range(old: list[float], new: list[float]) -> tuple[float, float, float]:
    """The shift of peak memory, which has almost no noise: all differences must agree, so a few rounds are enough."""
    differences = [b - a for a in old for b in new]
    return float(np.median(differences)), min(differences), max(differences)


def _own(figure: Figure) -> tuple[float, str, float]:
    """SO8T's time or memory, its unit, and the smallest change that counts."""
    if figure.ours in figure.milliseconds:
        return figure.milliseconds[figure.ours], "ms", MILLISECONDS
    if figure.ours in figure.sizes:
        return figure.sizes[figure.ours], "MB", MEGABYTES
    return 0.0, "", 0.0


def compare(old: Results, new: Results) -> tuple[list[Change], list[str]]:
    """(changes of the figures in both files, in the new file's order; names of figures that only the old file has)."""
    before = {figure.key: figure for figure in old.figures}
    changes = [judge(before.pop(figure.key), figure) for figure in new.figures if figure.key in before]
    return changes, list(before)


def confirmed(changes: list[Change], again: list[Change]) -> list[Change]:
    """The changes; a regression that the other comparison does not show becomes undecided."""
    worse = {(change.name, change.peer) for change in again if change.status == "regressed"}
    return [
        replace(change, status="undecided")
        if change.status == "regressed" and (change.name, change.peer) not in worse
        else change
        for change in changes
    ]


def main(arguments: list[str] | None = None) -> int:
    """Parse, compare, print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--again", type=Path, help="NEW measured a second time; a regression must be in both")
    parser.add_argument("--old-again", type=Path, help="OLD measured a second time; it must be against both")
    parser.add_argument("--other-machine", action="store_true", help="compare although the machines differ")
    parser.add_argument("--partial", action="store_true", help="figures may be missing from NEW")
    given = parser.parse_args(arguments)
    try:
        old, new = read(given.old), read(given.new)
        olds = [old, *([read(given.old_again)] if given.old_again else [])]
        news = [new, *([read(given.again)] if given.again else [])]
        for other in (*olds[1:], *news):
            if not old.machine.same_as(other.machine) and not given.other_machine:
                raise InputError(
                    f"measured on different machines, {old.machine} and {other.machine}: peers gain and lose "
                    "differently; measure both on one, or say --other-machine"
                )
        changes, gone = compare(old, new)
        for before, after in list(product(olds, news))[1:]:
            changes = confirmed(changes, compare(before, after)[0])
        if not changes:
            raise InputError(
                f"{given.old} and {given.new} have no figure in common; were they both quick, or both not?"
            )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _print(changes)
    for notice in _notices(old, new):
        print(notice)
    worse = [change.name for change in changes if change.status == "regressed"]
    unknown = [change.name for change in changes if change.status == "undecided"]
    print(f"{len(changes)} figures: {len(worse)} regressed, {len(unknown)} undecided")
    for name in unknown:
        print(f"undecided, too noisy to exclude {SEEN - 1:.0%}, or not confirmed: {name}")
    for name in worse:
        print(f"regressed: {name}")
    if gone and not given.partial:
        print(f"gone from {given.new}: {'; '.join(gone)} (say --partial if that is meant)")
    return 1 if worse or (gone and not given.partial) else 0


def _print(changes: list[Change]) -> None:
    table = Table(title="factor on our own time or memory, 99 % interval; above 1 is worse")
    for heading in ("figure", "against", "old ratio", "new ratio", "factor", "change", "status"):
        table.add_column(heading, justify="left" if heading in ("figure", "against", "status") else "right")
    for c in changes:
        factor = f"{c.slower:.3f} [{c.interval[0]:.3f}, {c.interval[1]:.3f}]"
        table.add_row(c.name, c.peer, f"{c.old:.3g}", f"{c.new:.3g}", factor, c.extra, c.status)
    Console(width=170).print(table)


def _notices(old: Results, new: Results) -> list[str]:
    found = [
        f"note: {name} was {old.machine.packages.get(name)}, is {new.machine.packages.get(name)}: its peers moved too"
        for name in sorted({*old.machine.packages, *new.machine.packages})
        if old.machine.packages.get(name) != new.machine.packages.get(name)
    ]
    for label, results in (("OLD", old), ("NEW", new)):
        if results.planted != 1.0:
            found.append(f"note: {label} was slowed by {results.planted:g} on purpose; it is no baseline")
    return found


if __name__ == "__main__":
    sys.exit(main())
