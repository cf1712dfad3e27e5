"""Laws of the divergence: closed forms, invariances, and that each statistic can move."""

from __future__ import annotations

import math

import numpy as np
import pytest

from so8t_core.errors import InputError
from verification import divergence

RNG = np.random.default_rng(0)


def stream(chunks: int = 4, n_ctx: int = 32, vocab: int = 50, scale: float = 2.0, seed: int = 0):
    rng = np.random.default_rng(seed)
    rows = n_ctx - 1 - n_ctx // 2
    logits = [(rng.normal(size=(rows, vocab)) * scale).astype(np.float32) for _ in range(chunks)]
    tokens = [rng.integers(0, vocab, n_ctx) for _ in range(chunks)]
    return logits, tokens


def test_two_point_distributions_have_their_closed_form() -> None:
    p, q = 0.8, 0.3
    ref = [np.log(np.array([[p, 1 - p]], dtype=np.float32))] * 2
    cand = [np.log(np.array([[q, 1 - q]], dtype=np.float32))] * 2
    tokens = [np.array([0, 1, 0])] * 2  # the target of the one scored position is token 0
    d = divergence(ref, cand, tokens)
    # float32 logits carry eps 6e-8 of a value near 1: 2e-7 absolute covers both sides
    assert d.mean_kld == pytest.approx(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)), abs=2e-7)
    assert d.rms_dp == pytest.approx(p - q, abs=2e-7)
    assert d.ppl_ratio == pytest.approx(p / q, rel=1e-6)
    assert d.reference_entropy == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), abs=2e-7)
    assert d.top1 == 0.0


def test_identical_streams_have_divergence_zero() -> None:
    logits, tokens = stream()
    d = divergence(logits, logits, tokens)
    assert abs(d.mean_kld) < 1e-14  # a few eps64 times logits of order 10
    assert d.top1 == 1.0
    assert d.rms_dp == 0.0
    assert d.ppl_ratio == 1.0


def test_adding_a_constant_to_logits_changes_nothing() -> None:
    logits, tokens = stream()
    other, _ = stream(seed=1)
    moved = [x.astype(np.float64) + 64 for x in other]  # a power of two keeps float32's grid for most values
    a, b = divergence(logits, other, tokens), divergence(logits, [m.astype(np.float32) for m in moved], tokens)
    assert a.mean_kld == pytest.approx(b.mean_kld, rel=1e-5)  # 64 costs float32 6 bits: 64 * 2^-24 = 4e-6 a logit


def test_values_agree_with_a_plain_numpy_computation() -> None:
    logits, tokens = stream(scale=6.0)
    other, _ = stream(scale=6.0, seed=3)

    def log_softmax(x):
        x = x.astype(np.float64)
        return x - x.max(1, keepdims=True) - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True))

    lp, lq = (np.concatenate([log_softmax(x) for x in y]) for y in (logits, other))
    kld = (np.exp(lp) * (lp - lq)).sum(1)
    cut = np.where(lp > -16, np.exp(lp) * (lp - lq), 0).sum(1)
    d = divergence(logits, other, tokens)
    assert d.mean_kld == pytest.approx(kld.mean(), rel=1e-12)
    assert d.mean_kld_llama_cpp == pytest.approx(cut.mean(), rel=1e-12)
    assert d.mean_kld_llama_cpp != d.mean_kld
    assert d.kld_percentiles["99"] == pytest.approx(np.percentile(kld, 99), rel=1e-12)
    assert sum(count for _, count in d.histogram) == d.tokens
    assert sum(count for _, _, count in d.kld_by_confidence) == d.tokens


def test_a_shift_by_one_position_is_worse() -> None:
    logits, tokens = stream()
    near = [x + RNG.normal(size=x.shape).astype(np.float32) * 0.05 for x in logits]
    right = divergence(logits, near, tokens).mean_kld
    for by in (-1, 1):
        shifted = divergence(logits, [np.roll(x, by, axis=0) for x in near], tokens).mean_kld
        assert shifted > 100 * right


def test_the_scored_targets_are_the_next_tokens() -> None:
    n_ctx, vocab = 16, 20
    tokens = np.arange(n_ctx)
    logits = np.zeros((7, vocab), dtype=np.float32)
    logits[np.arange(7), tokens[9:16]] = 30.0  # position 8 predicts token 9, ..., position 14 predicts token 15
    d = divergence([logits], [logits], [tokens])
    assert d.ppl_reference == pytest.approx(1.0, abs=1e-9)
    assert d.kld_by_position[0][0] == 8


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_a_non_finite_logit_is_counted_and_averaged_nowhere(bad: float, side: str) -> None:
    logits, tokens = stream()
    broken = [x.copy() for x in logits]
    broken[1][3, 7] = bad
    pair = (broken, logits) if side == "reference" else (logits, broken)
    d = divergence(*pair, tokens)
    assert d.non_finite == 1
    assert d.tokens == 4 * 15 - 1
    assert math.isfinite(d.mean_kld)


def test_nothing_finite_leaves_no_tokens() -> None:
    logits, tokens = stream()
    d = divergence(logits, [np.full_like(x, np.nan) for x in logits], tokens)
    assert (d.tokens, d.non_finite) == (0, 60)


def test_intervals_depend_on_the_seed_only() -> None:
    logits, tokens = stream(chunks=12)
    other, _ = stream(chunks=12, seed=1)
    a, b = (divergence(logits, other, tokens, seed="digest") for _ in range(2))
    c = divergence(logits, other, tokens, seed="another")
    assert a == b
    assert a.mean_kld_interval != c.mean_kld_interval
    assert a.mean_kld_interval[0] < a.mean_kld < a.mean_kld_interval[1]


def test_intervals_treat_a_chunk_as_one_observation() -> None:
    """Tokens that share their chunk's level: the interval must be as wide as the chunks' spread says."""
    rng = np.random.default_rng(5)
    logits, tokens = stream(chunks=12)
    noise = [
        x + rng.normal(size=x.shape).astype(np.float32) * level for x, level in zip(logits, [0.1, 1.0] * 6, strict=True)
    ]
    d = divergence(logits, noise, tokens)
    width = d.mean_kld_interval[1] - d.mean_kld_interval[0]
    assert width > 0.5 * d.mean_kld  # means of 0.005 and 0.5 alternate: 2 * 2.2 * 0.25 / sqrt(12) = 0.3 of 0.25


def test_different_vocabularies_are_refused_with_both_sizes() -> None:
    logits, tokens = stream()
    with pytest.raises(InputError, match=r"49 logits.*50"):
        divergence(logits, [x[:, :49] for x in logits], tokens)
    with pytest.raises(InputError, match="nothing to compare"):
        divergence([], [], [])
