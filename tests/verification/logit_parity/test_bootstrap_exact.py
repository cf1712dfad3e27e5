"""The intervals against their formulas, written out plainly: every term, both forms, the edges."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
from scipy import stats

from verification.logit_parity.intervals import ROUNDS, mean_interval, resampled, share_interval, wilson


def data(chunks: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(chunks)
    counts = rng.integers(3, 60, chunks).astype(float)
    return counts * rng.lognormal(size=chunks), counts


def test_rounds_are_drawn_from_the_seeds_digest() -> None:
    drawn = resampled(5, "a seed")
    assert drawn.shape == (ROUNDS, 5) == (2000, 5)
    assert drawn.dtype == np.float64
    assert (drawn.sum(axis=1) == 5).all()
    assert np.array_equal(drawn, resampled(5, "a seed"))
    number = int.from_bytes(hashlib.sha256(b"a seed").digest()[:8], "big")
    wanted = np.random.default_rng(number).multinomial(5, [0.2] * 5, size=2000)
    assert np.array_equal(drawn, wanted)


@pytest.mark.parametrize("chunks", [6, 7, 12])
def test_from_six_chunks_on_the_interval_is_studentised(chunks: int) -> None:
    sums, counts = data(chunks)
    drawn = resampled(chunks, "s")
    mean = sums.sum() / counts.sum()
    factor = chunks / (chunks - 1)
    error = math.sqrt(factor * ((sums - mean * counts) ** 2).sum()) / counts.sum()
    deviations = []
    for weights in drawn:
        again = (weights * sums).sum() / (weights * counts).sum()
        own = math.sqrt(factor * (weights * (sums - again * counts) ** 2).sum()) / (weights * counts).sum()
        if np.count_nonzero(weights) > 1:
            deviations.append((again - mean) / own)
    low, high = np.quantile(deviations, [0.025, 0.975])
    found = mean_interval(sums, counts, drawn, extremes=(0, 0))
    assert found == (pytest.approx(mean - high * error, rel=1e-9), pytest.approx(mean - low * error, rel=1e-9))


@pytest.mark.parametrize("chunks", [2, 3, 5])
def test_below_six_chunks_the_interval_is_of_expanded_percentiles(chunks: int) -> None:
    sums, counts = data(chunks)
    drawn = resampled(chunks, "s")
    means = [(weights * sums).sum() / (weights * counts).sum() for weights in drawn]
    tail = stats.norm.cdf(-math.sqrt(chunks / (chunks - 1)) * stats.t.ppf(0.975, chunks - 1))
    mean = sums.sum() / counts.sum()
    low, high = np.quantile(means, [tail, 1 - tail])
    found = mean_interval(sums, counts, drawn, extremes=(0, 0))
    assert found == (pytest.approx(min(low, mean), rel=1e-12), pytest.approx(max(high, mean), rel=1e-12))
    assert found[0] < found[1]


def test_one_chunk_with_tokens_has_the_extremes_and_empty_ones_do_not_count() -> None:
    sums, counts = np.array([4.0, 0, 0]), np.array([2.0, 0, 0])
    assert mean_interval(sums, counts, resampled(3, "s"), extremes=(1.5, 2.5)) == (1.5, 2.5)
    assert mean_interval(np.zeros(0), np.zeros(0), np.zeros((2000, 0)), extremes=(0.0, 1.0)) == (0.0, 1.0)
    one_token = mean_interval(np.array([1.0, 3.0]), np.array([1.0, 1.0]), resampled(2, "s"), extremes=(9, 9))
    assert one_token == (1.0, 3.0)


def test_a_resample_without_tokens_is_left_out() -> None:
    """Of the rows below the first draws only the chunk that is empty, the second one token-bearing chunk alone."""
    counts = np.array([10.0, 10, 10, 10, 10, 10, 0])
    sums = np.array([1.0, 2, 3, 4, 5, 6, 0])
    drawn = resampled(6, "s")
    padded = np.vstack([np.c_[drawn, np.zeros(len(drawn))], [[0, 0, 0, 0, 0, 0, 6]], [[6, 0, 0, 0, 0, 0, 0]]])
    assert mean_interval(sums, counts, padded, extremes=(0, 9)) == (
        mean_interval(sums[:6], counts[:6], drawn, extremes=(0, 9))
    )
    for scale in (1e-6, 1.0, 333.3, 1e6):  # nothing usable: no width, at any size of the values
        mean = scale * sums.sum() / 60
        assert mean_interval(scale * sums, counts, padded[-1:], extremes=(0, 9)) == (mean, mean)


def test_a_resample_without_tokens_is_left_out_of_percentiles_too() -> None:
    counts, sums, drawn = np.array([10.0, 10, 10, 0]), np.array([1.0, 2, 3, 0]), resampled(3, "s")
    padded = np.vstack([np.c_[drawn, np.zeros(len(drawn))], [[0, 0, 0, 3]]])
    assert mean_interval(sums, counts, padded, extremes=(0, 9)) == (
        mean_interval(sums[:3], counts[:3], drawn, extremes=(0, 9))
    )


def test_a_resample_of_one_token_counts() -> None:
    counts, sums = np.array([1.0, 1, 0]), np.array([1.0, 3, 0])
    drawn = np.array([[1.0, 0, 2], [0, 1, 2], [1, 1, 1]])
    low, high = mean_interval(sums, counts, drawn, extremes=(9, 9))
    assert (low, high) == (pytest.approx(1, abs=1e-3), pytest.approx(3, abs=1e-3))


def test_nothing_but_zeros_has_a_mean_of_zero_and_plain_numbers_come_out() -> None:
    counts = np.full(7, 10.0)
    assert mean_interval(np.zeros(7), counts, resampled(7, "s"), extremes=(0, 9)) == (0.0, 0.0)
    for chunks in (3, 7):
        sums, lengths = data(chunks)
        for found in (
            mean_interval(sums, lengths, resampled(chunks, "s"), extremes=(0, 9)),
            share_interval(np.floor(lengths / 2), lengths, resampled(chunks, "s")),
            share_interval(lengths, lengths, resampled(chunks, "s")),
            mean_interval(lengths, lengths, resampled(chunks, "s"), extremes=(0, 9)),
        ):
            assert [type(end) for end in found] == [float, float]


def test_equal_chunks_of_unequal_length_have_no_width() -> None:
    counts = np.array([1.0, 2, 4, 8, 16, 32])
    assert mean_interval(counts * 0.5, counts, resampled(6, "s"), extremes=(0, 9)) == (0.5, 0.5)


@pytest.mark.parametrize(("hits", "total"), [(0, 10), (10, 10), (3, 10), (1, 1), (97, 100), (999, 1000)])
def test_wilsons_interval_solves_its_equation(hits: int, total: int) -> None:
    """Both ends p solve (share - p)^2 = z^2 p (1 - p) / n."""
    share, z = hits / total, 1.959963984540054
    roots = np.roots([1 + z * z / total, -(2 * share + z * z / total), share * share])
    assert wilson(hits, total) == (pytest.approx(roots.min(), abs=1e-9), pytest.approx(roots.max(), abs=1e-9))
    assert wilson(hits, total)[0] <= share <= wilson(hits, total)[1]


def test_nothing_has_the_share_of_anything() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(1, 1)[0] > 0.2  # one token is something


def test_a_share_takes_the_wider_of_both_intervals_and_stays_a_share() -> None:
    drawn, counts = resampled(8, "s"), np.full(8, 400.0)
    hits = np.array([400.0, 399, 400, 398, 400, 400, 397, 400])
    chunks = mean_interval(hits, counts, drawn, extremes=(0, 1))
    tokens = wilson(int(hits.sum()), int(counts.sum()))
    assert share_interval(hits, counts, drawn) == (min(chunks[0], tokens[0]), min(1.0, max(chunks[1], tokens[1])))
    spread = np.array([400.0, 0, 400, 0, 400, 400, 0, 400])
    assert share_interval(spread, counts, drawn)[0] == max(
        0.0, mean_interval(spread, counts, drawn, extremes=(0, 1))[0]
    )
    wild = np.array([400.0, 400, 400, 400, 400, 400, 400, 0])
    assert share_interval(wild, counts, drawn)[1] == 1.0
    assert share_interval(400 - wild, counts, drawn)[0] == 0.0
    assert share_interval(hits[:1] / 4, counts[:1], resampled(1, "s")) == (
        0.0,
        1.0,
    )  # one chunk: no interval of its own
