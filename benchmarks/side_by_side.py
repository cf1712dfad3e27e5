"""Interleaved timing: every round runs each contender once, so that a slow phase of the machine slows all of them.

The figure is the ratio of a peer's time to SO8T's within one round; the report has its median over the rounds,
quartiles and range, and each contender's median time. Every round's ratio is kept, from which `compare` makes
intervals. Rounds are added, within a time limit, until two such runs could tell a slowdown of 30 % from none
(`rounds_needed`).
Source: the paired design of any A/B measurement.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

Run = Callable[[], Any] | tuple[Callable[[], Any], Callable[[Any], Any]]  # or (untimed preparation, timed work)

# Wanted half width h of the 99 % interval of the shift between two runs. The gate's floor is sqrt(1.3) = 1.14
# (`compare`), so a slowdown of 30 % lies ln 1.14 = 0.131 above it. The interval's near end passes the floor in 98 of
# 100 runs if 0.131 is the sum of h and 2.05 standard errors: h (1 + 2.05 / 2.576) = 0.131, h = 0.073.
HALF_WIDTH = 0.073
_NORMAL_99 = 2.576
_QUARTILES_OF_A_NORMAL = 1.349  # their distance in standard deviations


@dataclass(frozen=True)
class Comparison:
    """One figure: the peer's time over SO8T's (or SO8T's over the floor's), with its data."""

    name: str
    ours: str
    peer: str
    ratio: float
    quartiles: tuple[float, float]
    milliseconds: dict[str, float]
    rounds: int
    bar: float | None = None
    lower_is_better: bool = False
    notes: dict[str, Any] = field(default_factory=dict)
    group: str = ""
    ratios: tuple[float, ...] = ()  # of every round, in their order
    sizes: dict[str, float] = field(default_factory=dict)  # megabytes of each contender, where memory was measured

    @property
    def met(self) -> bool | None:
        """Whether the median reaches the bar; None without a bar."""
        if self.bar is None:
            return None
        return self.ratio <= self.bar if self.lower_is_better else self.ratio >= self.bar

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def interleave(
    contenders: dict[str, Run], *, rounds: int, warmup: int = 2, more_seconds: float = 0.0, slowed: float = 1.0
) -> dict[str, list[float]]:
    """Seconds of every contender in every round; each round reverses the order.

    Args:
        rounds: the least number; more are added for up to `more_seconds` while `rounds_needed` asks for them.
        slowed: plants a slowdown, to test the gate: the first contender takes `slowed` times as long, by waiting inside
            the timed part.
    """
    ours = next(iter(contenders))
    for run in contenders.values():
        for _ in range(warmup):
            _timed(run)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        number, deadline = 0, math.inf
        while number < rounds or (time.perf_counter() < deadline and number < _most_needed(seconds)):
            order = list(contenders) if number % 2 == 0 else list(reversed(contenders))
            for name in order:
                seconds[name].append(_timed(contenders[name], slowed if name == ours else 1.0))
            number += 1
            if number == rounds:
                deadline = time.perf_counter() + more_seconds
    finally:
        if collecting:
            gc.enable()
    return seconds


def rounds_needed(ratios: list[float]) -> int:
    """Rounds after which the 99 % interval of the shift between two such runs has a half width of HALF_WIDTH.

    The half width is 2.576 s sqrt(2 / n), where s is the spread of a round's log ratio; quartiles give s, so that a few
    disturbed rounds count little.
    """
    low, _, high = statistics.quantiles([math.log(ratio) for ratio in ratios], n=4)
    spread = (high - low) / _QUARTILES_OF_A_NORMAL
    return math.ceil(2 * (_NORMAL_99 * spread / HALF_WIDTH) ** 2)


def _most_needed(seconds: dict[str, list[float]]) -> int:
    ours, *peers = seconds.values()
    return max(
        (rounds_needed([b / a for a, b in zip(ours, peer, strict=True)]) for peer in peers if len(peer) > 1), default=0
    )


def _timed(run: Run, slowed: float = 1.0) -> float:
    prepared, timed = ((), run) if callable(run) else ((run[0](),), run[1])
    start = time.perf_counter()
    timed(*prepared)
    if slowed > 1.0:
        time.sleep((slowed - 1.0) * (time.perf_counter() - start))
    return time.perf_counter() - start


def compare(
    name: str,
    contenders: dict[str, Run],
    *,
    rounds: int,
    bar: float | None = None,
    lower_is_better: bool = False,
    warmup: int = 2,
    more_seconds: float = 0.0,
    slowed: float = 1.0,
    **notes: Any,
) -> list[Comparison]:
    """The first contender against each of the others: their time over its time, or with `lower_is_better` its time over
    theirs (an overhead over a floor)."""
    seconds = interleave(contenders, rounds=rounds, warmup=warmup, more_seconds=more_seconds, slowed=slowed)
    return comparisons(name, seconds, bar=bar, lower_is_better=lower_is_better, **notes)


def comparisons(
    name: str, seconds: dict[str, list[float]], *, bar: float | None, lower_is_better: bool, **notes: Any
) -> list[Comparison]:
    """Figures from the times of `interleave`."""
    ours, *peers = seconds
    found = []
    for peer in peers:
        pairs = zip(seconds[ours], seconds[peer], strict=True)
        ratios = [a / b if lower_is_better else b / a for a, b in pairs]
        low, _, high = statistics.quantiles(ratios, n=4)
        found.append(
            Comparison(
                name=name,
                ours=ours,
                peer=peer,
                ratio=statistics.median(ratios),
                quartiles=(low, high),
                milliseconds={who: 1e3 * statistics.median(seconds[who]) for who in (ours, peer)},
                rounds=len(ratios),
                bar=bar,
                lower_is_better=lower_is_better,
                notes=notes,
                ratios=tuple(ratios),
            )
        )
    return found


def measured(name: str, value: float, *, bar: float | None = None, peer: str = "") -> Comparison:
    """A figure that is not a time and has no spread (bytes that a graph keeps); lower is better."""
    return Comparison(
        name, "so8t", peer, value, (value, value), {}, rounds=1, bar=bar, lower_is_better=True, ratios=(value,)
    )


def of_memory(name: str, megabytes: dict[str, list[float]], *, bar: float | None = None, **notes: Any) -> Comparison:
    """The first contender's peak memory over the second's, in MB, with a pair of processes in each round."""
    (ours, own), (peer, others) = megabytes.items()
    ratios = tuple(a / b for a, b in zip(own, others, strict=True))
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    sizes = {ours: statistics.median(own), peer: statistics.median(others)}
    middle = statistics.median(ratios)
    return Comparison(
        name, ours, peer, middle, (low, high), {}, len(ratios), bar, True, notes, ratios=ratios, sizes=sizes
    )
