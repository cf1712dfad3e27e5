"""Every field of a divergence against a plain computation in numpy, over blocks, chunks of two sizes and lost rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from so8t_core.errors import InputError
from verification import divergence
from verification.logit_parity import kl
from verification.logit_parity.intervals import mean_interval, resampled, share_interval
from verification.logit_parity.kl import DivergenceAccumulator, mean_kld

VOCAB = 40
ROWS = (33, 47, 47)  # a chunk's scored positions
FIRST = (30, 16, 16)
N_CTX = 64


def softmax(x: np.ndarray) -> np.ndarray:
    """log-probabilities, float64"""
    x = x.astype(np.float64)
    return x - x.max(1, keepdims=True) - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True))


def made(seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Reference, candidate, targets: spreads from flat to peaked, so that all confidences and divergences occur."""
    rng = np.random.default_rng(seed)
    ref, cand, targets = [], [], []
    for rows in ROWS:
        spread = rng.uniform(0.2, 12, size=(rows, 1))
        a = rng.normal(size=(rows, VOCAB)) * spread
        b = a + rng.normal(size=(rows, VOCAB)) * 10.0 ** rng.uniform(-6, 0.7, size=(rows, 1))
        ref.append(a.astype(np.float32))
        cand.append(b.astype(np.float32))
        targets.append(rng.integers(0, VOCAB, rows))
    return ref, cand, targets


def accumulate(ref: list[np.ndarray], cand: list[np.ndarray], targets: list[np.ndarray], *, seed: str = "seed") -> Any:
    total = DivergenceAccumulator(reference="the reference", candidate="Q8_0", n_ctx=N_CTX, vocab=VOCAB, seed=seed)
    for a, b, t, first in zip(ref, cand, targets, FIRST, strict=True):
        total.begin_chunk()
        total.add(a, b, t, first_position=first)
    return total.result()


@pytest.mark.parametrize("block", [1, VOCAB * 5, VOCAB * 100])
def test_every_field_is_what_its_definition_says(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kl, "_BLOCK_ELEMENTS", block)  # rows a block: 1, 5, 100
    ref, cand, targets = made()
    ref[1][4, 3], cand[2][0, 0] = np.nan, np.inf
    cand[0][2] = cand[0][2, 0]  # flat: the first of equals is the most likely
    d = accumulate(ref, cand, targets)

    keep = [np.isfinite(a).all(1) & np.isfinite(b).all(1) for a, b in zip(ref, cand, strict=True)]
    lp, lq = ([softmax(x[k]) for x, k in zip(side, keep, strict=True)] for side in (ref, cand))
    p = [np.exp(x) for x in lp]
    kld = [(w * (x - y)).sum(1) for w, x, y in zip(p, lp, lq, strict=True)]
    cut = [np.where(x > -16, w * (x - y), 0).sum(1) for w, x, y in zip(p, lp, lq, strict=True)]
    hit = [t[k] for t, k in zip(targets, keep, strict=True)]
    nll = [[-x[np.arange(len(t)), t] for x, t in zip(side, hit, strict=True)] for side in (lp, lq)]
    same = [(x.argmax(1) == y.argmax(1)).astype(float) for x, y in zip(lp, lq, strict=True)]
    flat = np.concatenate(kld)
    counts = np.array([len(x) for x in kld], dtype=float)
    drawn = resampled(3, "seed")

    def close(value: float) -> Any:
        return pytest.approx(value, rel=1e-9, abs=1e-13)  # float64 sums over 127 rows of 40 terms of size 10

    assert (d.reference, d.candidate, d.n_ctx, d.vocab) == ("the reference", "Q8_0", N_CTX, VOCAB)
    assert (d.tokens, d.chunks, d.non_finite) == (sum(ROWS) - 2, 3, 2)
    assert d.mean_kld == close(flat.mean())
    assert d.max_kld == close(flat.max())
    assert d.mean_kld_llama_cpp == close(np.concatenate(cut).mean())
    assert d.mean_kld_llama_cpp != d.mean_kld
    assert d.kld_percentiles == {
        name: close(np.percentile(flat, float(name))) for name in ("50", "90", "95", "99", "99.9")
    }
    assert d.top1 == close(np.concatenate(same).mean())
    assert 0 < d.top1 < 1
    dp = np.exp(-np.concatenate(nll[1])) - np.exp(-np.concatenate(nll[0]))
    assert d.rms_dp == close(math.sqrt((dp**2).mean()))
    ppl = [math.exp(np.concatenate(side).mean()) for side in nll]
    assert (d.ppl_reference, d.ppl_candidate, d.ppl_ratio) == (close(ppl[0]), close(ppl[1]), close(ppl[1] / ppl[0]))
    entropy = np.concatenate([-(w * x).sum(1) for w, x in zip(p, lp, strict=True)])
    assert d.reference_entropy == close(entropy.mean())

    sums = np.array([x.sum() for x in kld])
    wanted = mean_interval(sums, counts, drawn, extremes=(flat.min(), flat.max()))
    assert d.mean_kld_interval == (close(wanted[0]), close(wanted[1]))
    hits = share_interval(np.array([x.sum() for x in same]), counts, drawn)
    assert d.top1_interval == (close(hits[0]), close(hits[1]))
    ratio = [b - a for a, b in zip(*nll, strict=True)]
    low, high = mean_interval(np.array([x.sum() for x in ratio]), counts, drawn, extremes=(0, 0))
    assert d.ppl_ratio_interval == (close(math.exp(low)), close(math.exp(high)))

    position = np.concatenate([np.arange(f, f + len(k))[k] for f, k in zip(FIRST, keep, strict=True)])
    first, last = int(position.min()), int(position.max())
    width = math.ceil((last - first + 1) / 16)
    assert width > 1
    buckets = [(s, (position >= s) & (position < s + width)) for s in range(first, last + 1, width)]
    assert d.kld_by_position == [(s, close(flat[inside].mean())) for s, inside in buckets]
    confidence = np.concatenate([w.max(1) for w in p])
    tenth = np.minimum((confidence * 10).astype(int), 9)
    assert d.kld_by_confidence == [
        (t / 10, close(flat[tenth == t].mean()), int((tenth == t).sum())) for t in range(10) if (tenth == t).any()
    ]
    steps = np.floor((np.log10(np.maximum(flat, 1e-12)) + 12) / 0.5).astype(int)
    assert d.histogram == [(-12 + 0.5 * s, int((steps == s).sum())) for s in sorted(set(steps.tolist()))]


def test_what_is_handed_over_is_forgotten_and_adds_up_elsewhere() -> None:
    ref, cand, targets = made()
    whole = DivergenceAccumulator(reference="the reference", candidate="Q8_0", n_ctx=N_CTX, vocab=VOCAB, seed="seed")
    part = DivergenceAccumulator(reference="the reference", candidate="Q8_0", n_ctx=N_CTX, vocab=VOCAB, seed="seed")
    for a, b, t, first in zip(ref, cand, targets, FIRST, strict=True):
        part.begin_chunk()
        part.add(a, b, t, first_position=first)
        whole.extend(part.take())
        assert part.take() == []
    assert whole.result() == accumulate(ref, cand, targets)


@pytest.mark.parametrize("starts", [(0, 20), (20, 0)])
def test_a_single_chunk_has_its_extremes_in_place_of_intervals(starts: tuple[int, int]) -> None:
    ref, cand, targets = made()
    total = DivergenceAccumulator(reference="r", candidate="c", n_ctx=N_CTX, vocab=VOCAB)
    total.begin_chunk()
    for start in starts:  # two calls are one chunk
        rows = slice(start, start + 20)
        total.add(ref[1][rows], cand[1][rows], targets[1][rows], first_position=FIRST[1] + start)
    d = total.result()
    lp, lq = softmax(ref[1][:40]), softmax(cand[1][:40])
    kld = (np.exp(lp) * (lp - lq)).sum(1)
    each, hit = np.arange(40), targets[1][:40]
    ratio = lp[each, hit] - lq[each, hit]
    assert d.chunks == 1
    assert d.mean_kld_interval == (pytest.approx(kld.min(), rel=1e-9), pytest.approx(kld.max(), rel=1e-9))
    assert d.ppl_ratio_interval == (
        pytest.approx(math.exp(ratio.min()), rel=1e-9),
        pytest.approx(math.exp(ratio.max()), rel=1e-9),
    )
    assert [start for start, _ in d.kld_by_position] == list(range(16, 56, 3))  # 40 positions in 16 buckets: 3 each


@pytest.mark.parametrize(("rows", "width"), [(16, 1), (17, 2), (32, 2), (33, 3), (34, 3), (48, 3), (49, 4)])
def test_positions_fall_into_sixteen_buckets_at_most(rows: int, width: int) -> None:
    logits = [np.random.default_rng(0).normal(size=(rows, 5)).astype(np.float32)]
    d = divergence(logits, logits, [np.zeros(60, dtype=np.int64)])
    assert [start for start, _ in d.kld_by_position] == list(range(59 - rows, 59, width))


def test_positions_without_a_finite_row_leave_their_bucket_out() -> None:
    logits = [np.random.default_rng(0).normal(size=(20, VOCAB)).astype(np.float32)]
    broken = [logits[0].copy()]
    broken[0][4:8] = np.nan
    d = divergence(logits, broken, [np.zeros(41, dtype=np.int64)])
    assert [start for start, _ in d.kld_by_position] == [20, 22, 28, 30, 32, 34, 36, 38]  # width ceil(20 / 16) = 2


def test_the_extremes_of_the_histogram_hold_what_lies_beyond() -> None:
    row = np.zeros((1, 2), dtype=np.float32)
    far = np.array([[0, 1e4]], dtype=np.float32)
    d = divergence([row, row], [row, far], [np.zeros(3, dtype=np.int64)] * 2)
    assert d.histogram == [(-12.0, 1), (2.0, 1)]
    assert d.kld_by_confidence == [(0.5, pytest.approx((0 + 5e3) / 2, rel=1e-3), 2)]
    certain = np.array([[0, 1e4]], dtype=np.float32)
    assert divergence([certain], [certain], [np.ones(3, dtype=np.int64)]).kld_by_confidence == [(0.9, 0.0, 1)]


def test_a_perplexity_beyond_all_numbers_stays_a_number() -> None:
    ref = np.array([[0, 0]], dtype=np.float32)
    far = np.array([[0, 1e6]], dtype=np.float32)
    d = divergence([ref], [far], [np.zeros(3, dtype=np.int64)])
    assert d.ppl_candidate == d.ppl_ratio == d.ppl_ratio_interval[1] == math.exp(700)


def test_log_probabilities_at_the_cut_are_dropped_as_llama_cpp_drops_them() -> None:
    """log p <= -16 is left out, however much the candidate gives it."""
    for below, inside in ((15.875, True), (16.125, False)):
        ref = np.array([[0, -below]], dtype=np.float32)
        cand = np.array([[0, 10]], dtype=np.float32)
        d = divergence([ref], [cand], [np.zeros(3, dtype=np.int64)])
        p = math.exp(-below) / (1 + math.exp(-below))
        missing = p * (math.log(p) - (10 - math.log(1 + math.exp(10))))
        rounding = 2 * 10 * np.finfo(np.float64).eps  # two sums that end in a term of 10 nats, each rounded once
        assert d.mean_kld - d.mean_kld_llama_cpp == pytest.approx(0 if inside else missing, abs=rounding)


def test_nothing_finite_leaves_zeros_and_says_how_many_rows_were_lost() -> None:
    ref, _, targets = made()
    d = accumulate(ref, [np.full_like(x, np.nan) for x in ref], targets)
    assert d.model_dump() == {
        "reference": "the reference",
        "candidate": "Q8_0",
        "tokens": 0,
        "chunks": 3,
        "n_ctx": N_CTX,
        "vocab": VOCAB,
        "mean_kld": 0.0,
        "mean_kld_interval": (0.0, 0.0),
        "mean_kld_llama_cpp": 0.0,
        "max_kld": 0.0,
        "kld_percentiles": {},
        "top1": 0.0,
        "top1_interval": (0.0, 0.0),
        "rms_dp": 0.0,
        "ppl_reference": 0.0,
        "ppl_candidate": 0.0,
        "ppl_ratio": 0.0,
        "ppl_ratio_interval": (0.0, 0.0),
        "reference_entropy": 0.0,
        "kld_by_position": [],
        "kld_by_confidence": [],
        "histogram": [],
        "non_finite": sum(ROWS),
    }


def test_infinite_logits_of_both_signs_in_one_row_are_one_lost_row() -> None:
    ref, cand, targets = made()
    cand[0][1, 0], cand[0][1, 1] = np.inf, -np.inf
    ref[0][1, 0] = np.inf  # inf - inf is NaN, inf + -inf as well
    assert accumulate(ref, cand, targets).non_finite == 1


def test_rows_that_do_not_fit_are_refused_in_words() -> None:
    ref, cand, targets = made()
    total = DivergenceAccumulator(reference="r", candidate="Q8_0", n_ctx=N_CTX, vocab=VOCAB)
    total.begin_chunk()
    other = "different vocabularies cannot be compared"
    for a, b, message in (
        (ref[0], cand[0][:, :-1], f"Q8_0 has 39 logits a token, the reference has 40: {other}"),
        (ref[0][:, :-1], cand[0][:, :-1], f"Q8_0 has 39 logits a token, the reference has 39: {other}"),
        (ref[0], cand[0][:-1], "Q8_0 has 32 scored positions where the reference has 33"),
        (ref[0][:-1], cand[0][:-1], "Q8_0 has 32 scored positions where the reference has 32"),
    ):
        with pytest.raises(InputError) as error:
            total.add(a, b, targets[0], first_position=0)
        assert str(error.value) == message
    with pytest.raises(InputError) as error:
        divergence([], [], [])
    assert str(error.value) == "nothing to compare: no chunk of tokens was given"
    with pytest.raises(ValueError, match="shorter"):
        divergence(ref, cand[:2], [np.zeros(67, dtype=np.int64)] * 3)
    for rows, first, second in ((33, 33, 33), (33, 34, 35)):  # a row without its target; a chunk longer than the first
        with pytest.raises(InputError) as error:
            divergence([ref[0]] * 2, [cand[0]] * 2, [np.zeros(first, dtype=np.int64), np.zeros(second, dtype=np.int64)])
        assert str(error.value) == (
            f"a chunk of {second} tokens with {rows} rows of logits: a chunk has more tokens than rows, "
            f"and no chunk may be longer than the first, {first} tokens"
        )


def test_the_stream_takes_names_length_and_targets_from_its_chunks() -> None:
    ref, cand, targets = made()
    tokens = [np.concatenate([np.zeros(N_CTX - len(t), dtype=np.int64), t]) for t in targets]
    d = divergence(ref, cand, tokens, reference="the reference", candidate="Q8_0", seed="seed")
    assert tuple(N_CTX - 1 - len(t) for t in targets) == FIRST
    assert d == accumulate(ref, cand, targets)
    plain = divergence(ref, cand, tokens)
    assert plain == divergence(ref, cand, tokens, seed="")
    assert (plain.reference, plain.candidate) == ("reference", "candidate")


def test_the_mean_of_a_few_rows_is_the_plain_mean_and_nan_is_not_hidden() -> None:
    ref, cand, _ = made()
    lp, lq = softmax(ref[0]), softmax(cand[0])
    assert type(mean_kld(ref[0], cand[0])) is float
    assert mean_kld(ref[0], cand[0]) == pytest.approx((np.exp(lp) * (lp - lq)).sum(1).mean(), rel=1e-9)
    assert mean_kld(ref[0][::2], cand[0][::2]) == pytest.approx((np.exp(lp) * (lp - lq)).sum(1)[::2].mean(), rel=1e-9)
    cand[0][5, 5] = np.nan
    assert math.isnan(mean_kld(ref[0], cand[0]))


def test_a_chunk_alone_among_lost_ones_has_its_extremes_for_an_interval() -> None:
    ref, cand, targets = made()
    ref[0][:], cand[2][:] = np.nan, np.inf
    d = accumulate(ref, cand, targets)
    lp, lq = softmax(ref[1]), softmax(cand[1])
    each = np.arange(len(targets[1]))
    ratio = lp[each, targets[1]] - lq[each, targets[1]]
    assert d.ppl_ratio_interval == pytest.approx((math.exp(ratio.min()), math.exp(ratio.max())), rel=1e-9)
    assert d.mean_kld_interval[1] == pytest.approx(d.max_kld)


def test_no_seed_is_the_empty_one() -> None:
    several = [made(seed) for seed in range(4)]
    ref, cand, targets = ([chunk for one in several for chunk in one[side]] for side in range(3))
    tokens = [np.concatenate([np.zeros(N_CTX - len(t), dtype=np.int64), t]) for t in targets]
    wanted = divergence(ref, cand, tokens, seed="").mean_kld_interval
    assert divergence(ref, cand, tokens).mean_kld_interval == wanted
    assert divergence(ref, cand, tokens, seed="XX").mean_kld_interval != wanted
    total = DivergenceAccumulator(reference="a", candidate="b", n_ctx=N_CTX, vocab=VOCAB)
    for a, b, t in zip(ref, cand, targets, strict=True):
        total.begin_chunk()
        total.add(a, b, t, first_position=0)
    assert total.result().mean_kld_interval == wanted


def test_the_numbers_of_a_divergence_are_pythons_own() -> None:
    d = accumulate(*made())
    for value in (d.max_kld, d.mean_kld, d.ppl_ratio_interval[0], d.kld_percentiles["50"], d.kld_by_position[0][1]):
        assert type(value) is float
    for value in (d.non_finite, d.kld_by_position[0][0], d.kld_by_confidence[0][2], d.histogram[0][1]):
        assert type(value) is int
