"""The study's statistics: means, and paired differences with Student's t intervals.

With several seeds: seed s gives x_s for one arm and y_s for another, trained on the same rows in the same order; the
95 % interval of the mean of d_s = x_s - y_s is mean(d) +- t(0.975, S - 1) sd(d) / sqrt(S). It holds for other seeds on
these held-out rows. The base has no seed: its one value is every y_s. With one seed the pairs are the held-out rows,
prompts or chunks: the interval then holds for other such rows after this training, and not for other seeds.
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
    """One column: its key in a run's record, its heading, and the factor of its unit."""

    key: str
    title: str
    digits: int
    factor: float = 1.0
    share: bool = False  # units are 0 or 1


METRICS = (
    Metric("heldout_loss", "held-out loss, nats", 3),
    Metric("form", "/think form, %", 0, 100.0, share=True),
    Metric("exact", "exact, %", 0, 100.0, share=True),
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
        """Whether zero lies outside the interval."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def paired(a: Sequence[float], b: Sequence[float]) -> Difference:
    """a - b, pair by pair, with Student's interval."""
    found = [x - y for x, y in zip(a, b, strict=True)]
    mean = statistics.fmean(found)
    if len(found) < 2:
        return Difference(mean, None)
    half = float(t.ppf(0.975, len(found) - 1)) * statistics.stdev(found) / math.sqrt(len(found))
    return Difference(mean, (mean - half, mean + half))


def paired_shares(a: Sequence[float], b: Sequence[float], one: float) -> Difference:
    """a - b for units that are 0 or `one`; even for 32 of 32, the interval is not a point.

    Half a pair is added to each of the four outcomes, then the normal interval. Source: Agresti and Min, Simple
    improved confidence intervals for comparing matched proportions, Statistics in Medicine 24 (2005).
    """
    up = sum(x > y for x, y in zip(a, b, strict=True)) + 0.5
    down = sum(x < y for x, y in zip(a, b, strict=True)) + 0.5
    count = len(a) + 2
    centre = (up - down) / count
    half = 1.959964 * math.sqrt(up + down - (up - down) ** 2 / count) / count
    low, high = max(-1.0, centre - half), min(1.0, centre + half)
    return Difference(statistics.fmean(a) - statistics.fmean(b), (one * low, one * high))


def values(runs: Sequence[dict[str, Any]], arm: str, metric: Metric, seeds: Sequence[int]) -> list[float]:
    """A metric of one arm for each seed; for the base, its one value for every seed.

    Raises:
        InputError: a run is missing.
    """
    return [statistics.fmean(units(runs, arm, metric, seed)) for seed in seeds]


def units(runs: Sequence[dict[str, Any]], arm: str, metric: Metric, seed: int) -> list[float]:
    """A metric of one run for each unit (held-out row, prompt or chunk)."""
    wanted = None if arm == BASE else seed
    for run in runs:
        if run["arm"] == arm and run["seed"] == wanted:
            return [value * metric.factor for value in run["units"][metric.key]]
    raise InputError(f"there is no run of arm {arm} with seed {seed}")


def difference(
    runs: Sequence[dict[str, Any]], arm: str, against: str, metric: Metric, seeds: Sequence[int]
) -> Difference:
    """arm - against over the seeds, or over the units of the only seed."""
    if len(seeds) == 1:
        a, b = units(runs, arm, metric, seeds[0]), units(runs, against, metric, seeds[0])
        return paired_shares(a, b, metric.factor) if metric.share else paired(a, b)
    return paired(values(runs, arm, metric, seeds), values(runs, against, metric, seeds))


def check_batches(runs: Sequence[dict[str, Any]]) -> None:
    """Raises InputError unless all arms of a seed were trained on the same batches; otherwise they are no pairs."""
    for seed in {run["seed"] for run in runs if run["arm"] != BASE}:
        seen = {run["batches"]: run["arm"] for run in runs if run["seed"] == seed}
        if len(seen) > 1:
            raise InputError(
                f"seed {seed}: the arms {' and '.join(sorted(seen.values())[:2])} were trained on different batches, "
                "so they are no pairs; remove the seed's results and run again"
            )
