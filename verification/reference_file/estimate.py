"""The KL divergence between stored rows and a candidate: an exact lower bound and an unbiased estimate.

With p the reference, q the candidate, T the stored top tokens, P and Q the masses of all other tokens:
    lower  = sum_{v in T} p_v log(p_v / q_v) + P log(P / Q)
    KLD    = lower + P D,   D = sum_{v not in T} p'_v log(p'_v / q'_v) >= 0,   p' = p / P, q' = q / Q
so `lower` never exceeds KLD (the log-sum inequality; Cover and Thomas 2006, theorem 2.7.1). D is a mean over p', and
the stored samples are draws from p': with rho_s = log(p'_s / q'_s) and x_s = q'_s / p'_s - 1, whose mean under p' is 0,
    estimate = lower + P mean_s(rho_s + c x_s)
is unbiased for every c that does not depend on these samples. c = 0 adds P mean(log p - log q) to the exact part.
Near p = q, rho = -x + x^2/2: c = 1 removes the noise to first order. c is fitted for each chunk on the samples of all
other chunks, c = -Cov(rho, x) / Var(x) within positions, weighted by P^2, limited to 0 .. 1.
Source of the control variate: Owen, Monte Carlo theory, methods and examples, section 8.9.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from verification.gate.report import Divergence
from verification.logit_parity.kl import LLAMA_CPP_CUT, Cluster, DivergenceAccumulator
from verification.reference_file.format import Rows

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Reader = Callable[[npt.NDArray[np.integer]], Floats]
_BLOCK_ELEMENTS = 1 << 21  # elements of a (rows, V) block: 16 MiB of float64
_LARGEST = 300.0  # exponent: e^300 squared is still a double; such a sample only makes c 0


@dataclass(frozen=True)
class Compared:
    """A candidate's rows compared with stored rows; each array has one entry a position, in nats."""

    lower: Floats  # (T,)
    mass: Floats  # (T,) P
    rho: Floats  # (T, S)
    x: Floats  # (T, S)
    lower_cut: Floats  # (T,) the terms of the lower bound that llama.cpp counts, without the tail
    cut: Floats  # (T,) the tail's samples that llama.cpp counts: P mean((log p - log q) [log p > -16])
    same_top: npt.NDArray[np.bool_]  # (T,)
    nll_ref: Floats  # (T,)
    nll_cand: Floats  # (T,)
    entropy: Floats  # (T,) entropy of the reference
    confidence: Floats  # (T,) the reference's largest probability
    finite: npt.NDArray[np.bool_]  # (T,) whether the candidate's row is finite; if not, the other arrays hold NaN


def compare(rows: Rows, logits_TV: Logits, targets_T: Ids) -> Compared:
    """Compare a candidate's logits (T, V) with stored rows; `targets_T` are the next tokens."""
    step = max(1, _BLOCK_ELEMENTS // logits_TV.shape[1])
    parts = [
        _block(rows[start : start + step], logits_TV[start : start + step], targets_T[start : start + step])
        for start in range(0, len(rows), step)
    ]
    return Compared(*(np.concatenate(column) for column in zip(*(vars(part).values() for part in parts), strict=True)))


def _block(rows: Rows, logits_TV: Logits, targets_T: Ids) -> Compared:
    log_p, log_mass = distribution(rows)  # (T, K), (T,)
    log_q, log_q_rest, at = candidate_view(rows, logits_TV)
    p, mass = np.exp(log_p), np.exp(log_mass)
    with np.errstate(all="ignore"):  # a non-finite row gives NaN, and `finite` is False
        has_tail = mass > 0
        rest = np.where(has_tail, log_mass - log_q_rest, 0.0)  # log(P / Q)
        terms = p * (log_p - log_q)
        lower = terms.sum(axis=1) + mass * rest
        own = np.where(has_tail[:, None], at(rows.tail_ids), 0.0)
        ratio = np.where(has_tail[:, None], rows.tail_log_p.astype(np.float64) - own, 0.0)  # log p - log q
        rho = ratio - rest[:, None]
        x = np.expm1(np.minimum(-rho, _LARGEST))
        counted = ratio * (rows.tail_log_p > LLAMA_CPP_CUT)
        entropy = -(p * log_p).sum(axis=1) - np.where(has_tail, mass * (log_mass - rows.tail_entropy), 0.0)
        return Compared(
            lower,
            mass,
            rho,
            x,
            (terms * (log_p > LLAMA_CPP_CUT)).sum(axis=1),
            mass * counted.mean(axis=1),
            np.argmax(logits_TV, axis=1) == rows.top_ids[:, 0],
            -rows.target.astype(np.float64),
            -at(targets_T[:, None])[:, 0],
            entropy,
            p[:, 0],
            np.asarray(np.isfinite(logits_TV).all(axis=1)),
        )


def distribution(rows: Rows) -> tuple[Floats, Floats]:
    """(T, K) log p of the top tokens, scaled so that their sum is 1 - P, and (T,) log P.

    The codes round each log p by up to half a step d (d = 1.5e-4 nats if the last top token has e^-20), so the stored
    sum differs from one by at most d. After the scaling, the stored rows are within d^2 of the reference, and the KLD
    from them is within d times the mean |log p - log q| of the KLD from the reference.
    """
    log_p, log_mass = rows.top_log_p, rows.tail_mass.astype(np.float64)
    peak = log_p.max(axis=1)
    total = peak + np.log(np.exp(log_p - peak[:, None]).sum(axis=1))
    held = np.log(np.maximum(-np.expm1(log_mass), 1e-300))
    return log_p + (held - total)[:, None], log_mass


def candidate_view(rows: Rows, logits_TV: Logits) -> tuple[Floats, Floats, Reader]:
    """(T, K) log q of the stored top tokens, (T,) log Q of all others, and a function: ids (T, n) -> log q."""
    logits = torch.from_numpy(np.ascontiguousarray(logits_TV)).double()
    whole = torch.logsumexp(logits, dim=1)
    top = torch.from_numpy(rows.top_ids.astype(np.int64))
    log_q = (logits.gather(1, top) - whole[:, None]).numpy()

    def at(ids: npt.NDArray[np.integer]) -> Floats:
        found = logits.gather(1, torch.from_numpy(ids.astype(np.int64))) - whole[:, None]
        return np.asarray(found.numpy())

    tail = logits.scatter(1, top, -math.inf)
    return log_q, (torch.logsumexp(tail, dim=1) - whole).numpy(), at


def lower_bound(rows: Rows, logits_TV: Logits) -> float:
    """Mean exact lower bound of a few rows; NaN if a logit is not finite."""
    log_p, log_mass = distribution(rows)
    log_q, log_rest, _ = candidate_view(rows, logits_TV)
    with np.errstate(all="ignore"):
        rest = np.where(np.exp(log_mass) > 0, np.exp(log_mass) * (log_mass - log_rest), 0.0)
        return float(((np.exp(log_p) * (log_p - log_q)).sum(axis=1) + rest).mean())


@dataclass
class Chunk:
    """The comparison of one cluster of positions."""

    compared: Compared
    first: int  # position of its first row


@dataclass
class FileDivergence:
    """One comparison with stored rows, chunk after chunk."""

    candidate: str
    reference: str
    n_ctx: int
    vocab: int
    seed: str
    chunks: list[Chunk] = field(default_factory=list)

    def add(self, compared: Compared, *, first: int) -> None:
        """Add one cluster: positions that are not independent of each other."""
        self.chunks.append(Chunk(compared, first))

    def means(self) -> Means:
        """The mean KLD of all added rows, without an interval; non-finite rows are left out."""
        estimates = self._estimates()
        finite = np.concatenate([chunk.compared.finite for chunk in self.chunks])
        count = max(int(finite.sum()), 1)
        sums = [
            float(np.concatenate(parts)[finite].sum())
            for parts in (
                [kld for kld, _ in estimates],
                [chunk.compared.lower for chunk in self.chunks],
                [variance for _, variance in estimates],
            )
        ]
        return Means(sums[0] / count, sums[1] / count, math.sqrt(sums[2]) / count)

    def result(self) -> Divergence:
        """The statistics of all added rows; `mean_kld` is the unbiased estimate with an interval over whole chunks."""
        total = DivergenceAccumulator(
            reference=self.reference, candidate=self.candidate, n_ctx=self.n_ctx, vocab=self.vocab, seed=self.seed
        )
        pairs = zip(self.chunks, self._estimates(), strict=True)
        total.extend([_cluster(chunk, kld, self.n_ctx) for chunk, (kld, _) in pairs])
        return total.result()

    def _estimates(self) -> list[tuple[Floats, Floats]]:
        factors = _factors([chunk.compared for chunk in self.chunks])
        return [_estimate(chunk.compared, c) for chunk, c in zip(self.chunks, factors, strict=True)]


@dataclass(frozen=True)
class Means:
    """The mean KLD of a comparison with stored rows, in nats."""

    estimate: float  # unbiased
    lower_bound: float  # exact
    sampling_error: float  # standard error of the estimate from the drawn tail tokens only


def _factors(chunks: list[Compared]) -> list[float]:
    """c of each chunk, fitted on all other chunks."""
    moments = []
    for one in chunks:
        weight = np.where(one.finite, one.mass, 0.0)[:, None] ** 2
        rho, x = (np.where(one.finite[:, None], v - v.mean(axis=1, keepdims=True), 0.0) for v in (one.rho, one.x))
        moments.append([float((weight * rho * x).sum()), float((weight * x * x).sum())])
    total = np.sum(moments, axis=0)
    found = []
    for own in moments:
        covariance, variance = total - own
        usable = variance > 0 and math.isfinite(covariance) and math.isfinite(variance)
        found.append(min(max(-covariance / variance, 0.0), 1.0) if usable else 0.0)
    return found


def _estimate(one: Compared, c: float) -> tuple[Floats, Floats]:
    """(T,) estimates and (T,) variances of their sampling error."""
    tail = one.rho + c * one.x if c else one.rho
    samples = tail.shape[1]
    return one.lower + one.mass * tail.mean(axis=1), one.mass**2 * tail.var(axis=1, ddof=1) / samples


def _cluster(chunk: Chunk, kld_T: Floats, n_ctx: int) -> Cluster:
    """One chunk's sums, as in `logit_parity.kl` for full rows."""
    one, good = chunk.compared, chunk.compared.finite
    into = Cluster(np.zeros(7), np.zeros((2, n_ctx)))
    into.non_finite = int((~good).sum())
    into.keep(
        kld=kld_T[good],
        kld_cut=(one.lower_cut + one.cut)[good],
        same_top=one.same_top[good],
        nll_ref=one.nll_ref[good],
        nll_cand=one.nll_cand[good],
        entropy=one.entropy[good],
        confidence=one.confidence[good],
        positions=(chunk.first + np.arange(len(good)))[good],
    )
    return into
