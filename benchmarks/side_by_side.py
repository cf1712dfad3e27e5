"""Interleaved timing: every round runs each contender once, so that whatever slows the machine slows them all.

The figure is the ratio of a peer's time to ours within one round; reported are its median over the rounds and its
quartiles, beside each contender's median time. Source: the paired design of any A/B measurement.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

Run = Callable[[], Any] | tuple[Callable[[], Any], Callable[[Any], Any]]  # or (what is prepared untimed, what is timed)


@dataclass(frozen=True)
class Comparison:
    """One figure: peer's time over ours (or ours over the floor's), with where it comes from."""

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

    @property
    def met(self) -> bool | None:
        """Whether the median reaches the bar; None without a bar."""
        if self.bar is None:
            return None
        return self.ratio <= self.bar if self.lower_is_better else self.ratio >= self.bar

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def interleave(contenders: dict[str, Run], *, rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of every contender in every round; the order turns around from round to round."""
    for run in contenders.values():
        for _ in range(warmup):
            _timed(run)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            order = list(contenders) if number % 2 == 0 else list(reversed(contenders))
            for name in order:
                seconds[name].append(_timed(contenders[name]))
    finally:
        if collecting:
            gc.enable()
    return seconds


def _timed(run: Run) -> float:
    prepared, timed = ((), run) if callable(run) else ((run[0](),), run[1])
    start = time.perf_counter()
    timed(*prepared)
    return time.perf_counter() - start


def compare(
    name: str,
    contenders: dict[str, Run],
    *,
    rounds: int,
    bar: float | None = None,
    lower_is_better: bool = False,
    **notes: Any,
) -> list[Comparison]:
    """The first contender against each of the others: their time over its time, or with `lower_is_better` its time over
    theirs (an overhead over a floor)."""
    return comparisons(name, interleave(contenders, rounds=rounds), bar=bar, lower_is_better=lower_is_better, **notes)


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
            )
        )
    return found


def measured(name: str, value: float, *, bar: float | None = None, peer: str = "") -> Comparison:
    """A figure that is no time (bytes, memory); lower is better."""
    return Comparison(name, "so8t", peer, value, (value, value), {}, rounds=1, bar=bar, lower_is_better=True)
