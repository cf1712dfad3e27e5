"""The estimate by stored rows against the KLD over the whole vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
from reference_samples import logits_like_a_models

from verification.logit_parity.kl import divergence
from verification.reference_file.estimate import FileDivergence, Means, compare, lower_bound
from verification.reference_file.rows import compressed

VOCAB, ROWS, CHUNKS, DRAWS = 600, 16, 6, 30


def full_and_stored(
    noise: float, *, seed: int = 0, draws: int = 1, top: int = 64, samples: int = 8, shift: int = 0
) -> tuple[float, list[Means]]:
    """The KLD over the whole vocabulary, and the means of each of `draws` reference files of the same rows."""
    generator = np.random.default_rng(seed)
    reference = [logits_like_a_models(generator, ROWS, VOCAB) for _ in range(CHUNKS)]
    candidate = [row + (noise * generator.standard_normal(row.shape)).astype(np.float32) for row in reference]
    candidate = [np.roll(row, shift, axis=1) for row in candidate]
    tokens = [generator.integers(0, VOCAB, 2 * ROWS + 1) for _ in range(CHUNKS)]
    whole = divergence(reference, candidate, tokens).mean_kld
    results = []
    for number in range(draws):
        sampler = np.random.default_rng(1000 + number)
        total = FileDivergence("candidate", "reference", 2 * ROWS + 1, VOCAB, "")
        for ref, cand, ids in zip(reference, candidate, tokens, strict=True):
            targets = ids[-ROWS:]
            rows = compressed(ref, targets, top=top, samples=samples, generator=sampler)
            total.add(compare(rows, cand, targets), first=ROWS)
        results.append(total.means())
    return whole, results


@pytest.mark.parametrize("noise", [0.003, 0.3, 2.0])
def test_the_estimate_is_unbiased_and_its_sampling_error_is_what_it_says(noise: float) -> None:
    """Over independent draws the mean estimate is the full KLD, and the estimates spread by the stated error."""
    whole, results = full_and_stored(noise, draws=DRAWS)
    estimates = np.array([result.estimate for result in results])
    stated = float(np.sqrt(np.mean([result.sampling_error**2 for result in results])))
    rounding = 2e-3 * whole + 1e-8  # of the stored codes, see `distribution`
    assert abs(estimates.mean() - whole) < 4 * estimates.std(ddof=1) / np.sqrt(DRAWS) + rounding
    assert 0.6 < estimates.std(ddof=1) / stated < 1.5  # of 30 draws the spread is known to 13 %


@pytest.mark.parametrize(("noise", "shift"), [(0.003, 0), (0.3, 0), (2.0, 0), (0.3, 1)])
def test_the_lower_bound_holds_and_ends_at_the_whole_vocabulary(noise: float, shift: int) -> None:
    whole, (result,) = full_and_stored(noise, shift=shift)
    assert 0 < result.lower_bound < whole
    same, (exact,) = full_and_stored(noise, shift=shift, top=VOCAB)
    # the codes' rounding times the mean |log p - log q|, see `distribution`
    assert exact.lower_bound == pytest.approx(same, rel=1e-3, abs=3e-4 * noise)
    assert exact.estimate == pytest.approx(exact.lower_bound, rel=1e-12)
    assert exact.sampling_error == 0


def test_the_control_variate_removes_the_noise_of_a_near_equal_file() -> None:
    """The error of P mean(log p - log q) alone is of first order in the difference; with it, of second order."""
    whole, (result,) = full_and_stored(0.003)
    assert result.sampling_error < 0.05 * whole
    assert result.estimate == pytest.approx(whole, rel=0.05)


def test_no_sample_takes_part_in_its_own_factor() -> None:
    """The factor of a chunk comes from the other chunks: of a single chunk it is 0, the plain mean."""
    generator = np.random.default_rng(3)
    ref = logits_like_a_models(generator, ROWS, VOCAB)
    cand = ref + (0.3 * generator.standard_normal(ref.shape)).astype(np.float32)
    targets = generator.integers(0, VOCAB, ROWS)
    rows = compressed(ref, targets, top=64, samples=8, generator=generator)
    one = compare(rows, cand, targets)
    total = FileDivergence("c", "r", 2 * ROWS + 1, VOCAB, "")
    total.add(one, first=ROWS)
    plain = one.lower + one.mass * one.rho.mean(axis=1)
    assert total.means().estimate == pytest.approx(float(plain.mean()), rel=1e-12)


def test_statistics_that_need_no_tail_equal_those_of_full_rows() -> None:
    generator = np.random.default_rng(5)
    ref = [logits_like_a_models(generator, ROWS, VOCAB) for _ in range(CHUNKS)]
    cand = [row + (0.3 * generator.standard_normal(row.shape)).astype(np.float32) for row in ref]
    tokens = [generator.integers(0, VOCAB, 2 * ROWS + 1) for _ in range(CHUNKS)]
    full = divergence(ref, cand, tokens)
    total = FileDivergence("candidate", "reference", 2 * ROWS + 1, VOCAB, "")
    for a, b, ids in zip(ref, cand, tokens, strict=True):
        rows = compressed(a, ids[-ROWS:], top=64, samples=8, generator=generator)
        total.add(compare(rows, b, ids[-ROWS:]), first=ROWS)
    stored = total.result()
    assert (stored.tokens, stored.chunks, stored.top1) == (full.tokens, full.chunks, full.top1)
    for name in ("ppl_ratio", "ppl_reference", "ppl_candidate", "reference_entropy", "rms_dp"):
        assert getattr(stored, name) == pytest.approx(getattr(full, name), rel=1e-3), name


def test_a_row_that_is_not_finite_is_counted_and_left_out() -> None:
    generator = np.random.default_rng(6)
    ref = logits_like_a_models(generator, ROWS, VOCAB)
    cand = ref.copy()
    cand[3, 7] = np.nan
    targets = generator.integers(0, VOCAB, ROWS)
    rows = compressed(ref, targets, top=64, samples=8, generator=generator)
    total = FileDivergence("c", "r", 2 * ROWS + 1, VOCAB, "")
    total.add(compare(rows, cand, targets), first=ROWS)
    found = total.result()
    assert (found.tokens, found.non_finite) == (ROWS - 1, 1)
    assert abs(found.mean_kld) < 1e-7
    assert np.isnan(lower_bound(rows, cand))
