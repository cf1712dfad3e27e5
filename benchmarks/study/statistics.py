"""From runs to numbers: means over seeds, and paired differences with Student's t intervals.

Seed s gives x_s for one arm and y_s for another, trained on the same rows in the same order; d_s = x_s - y_s, and the
95 % interval of its mean is mean(d) +- t(0.975, S - 1) sd(d) / sqrt(S). The base has no seed: its one value stands for
y_s. The interval speaks of other seeds on these held-out rows; it does not hold the choice of the held-out rows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import t

from benchmarks.study.arms import BASE
from so8t_core.errors import InputError


@dataclass(frozen=True)
class Metric:
    """One column: its key in a run's record, what a reader sees, and its unit's factor."""

    key: str
    title: str
    digits: int
    factor: float = 1.0


METRICS = (
    Metric("heldout_loss", "held-out loss, nats", 3),
    Metric("form", "/think form, %", 0, 100.0),
    Metric("exact", "exact, %", 0, 100.0),
    Metric("second_difference", "second difference", 3),
    Metric("kld_q8_0", "KLD Q8_0, 1e-3 nats", 2, 1e3),
    Metric("kld_q4_k_m", "KLD Q4_K_M, 1e-3 nats", 1, 1e3),
)


@dataclass(frozen=True)
class Difference:
    """Mean paired difference, and its interval; None with a single seed."""

    mean: float
    interval: tuple[float, float] | None

    @property
    def shown(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def paired(a: Sequence[float], b: Sequence[float]) -> Difference:
    """a - b, pair by pair."""
    found = [x - y for x, y in zip(a, b, strict=True)]
    mean = statistics.fmean(found)
    if len(found) < 2:
        return Difference(mean, None)
    half = float(t.ppf(0.975, len(found) - 1)) * statistics.stdev(found) / math.sqrt(len(found))
    return Difference(mean, (mean - half, mean + half))


def values(runs: Sequence[dict[str, Any]], arm: str, metric: Metric, seeds: Sequence[int]) -> list[float]:
    """A metric of one arm, seed by seed; the base's one value for every seed.

    Raises:
        InputError: a run that is not there.
    """
    found = {run["seed"]: run[metric.key] * metric.factor for run in runs if run["arm"] == arm}
    if arm == BASE and None in found:
        return [found[None]] * len(seeds)
    if missing := [seed for seed in seeds if seed not in found]:
        raise InputError(f"there is no run of arm {arm} with seed {missing[0]}")
    return [found[seed] for seed in seeds]


def check_batches(runs: Sequence[dict[str, Any]]) -> None:
    """Raises InputError unless all arms of a seed were trained on the same batches: only then are they pairs."""
    for seed in {run["seed"] for run in runs if run["arm"] != BASE}:
        seen = {run["batches"]: run["arm"] for run in runs if run["seed"] == seed}
        if len(seen) > 1:
            raise InputError(
                f"seed {seed}: the arms {' and '.join(sorted(seen.values())[:2])} were trained on different batches, "
                "so they are no pairs; remove the seed's results and run again"
            )
