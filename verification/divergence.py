"""How far one stream of logits lies from another over the same tokens; pure float64 arithmetic, one chunk at a time.

KLD_t = sum_v p_ref (log p_ref - log p_cand) over the full support; beside it llama.cpp's value, which drops v with
log p_ref <= -16. Percentiles interpolate linearly at f(n-1); RMS dp = sqrt(mean (p_cand - p_ref)^2) of the corpus
token; PPL ratio = exp(mean(nll_cand - nll_ref)). Intervals resample whole chunks (tokens of a chunk are not
independent) with a seed taken from a digest, and use Hesterberg's expanded percentiles for few clusters.
Shapes: logits (T, V) of positions n_ctx-1-T .. n_ctx-2, tokens (n_ctx,). Source of the definitions: llama.cpp,
tools/perplexity/perplexity.cpp; expanded percentiles: Hesterberg, arXiv:1411.5279, section 5.3.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import torch

from so8t_core.errors import InputError
from verification.schema import Divergence

Array = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

LLAMA_CPP_CUT = -16.0  # nats; llama.cpp skips a token whose reference log-probability is not above this
BOOTSTRAP_ROUNDS = 2000
PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
_BLOCK_ELEMENTS = 1 << 22  # elements of a (rows, V) block: 32 MiB per float64 array, whatever the vocabulary
_POSITION_BUCKETS = 16
_HISTOGRAM_LOW, _HISTOGRAM_HIGH, _HISTOGRAM_STEP = -12.0, 2.0, 0.5  # log10 nats


@dataclass(frozen=True)
class ReferenceBlock:
    """What every candidate needs of some rows of the reference, computed once."""

    rows: slice  # rows of the chunk
    logits_TV: torch.Tensor  # float64
    lse_T: torch.Tensor  # log sum exp
    p_TV: torch.Tensor  # probabilities
    p_cut_TV: torch.Tensor  # the same, 0 where llama.cpp skips the token
    top_T: npt.NDArray[np.int64]
    confidence_T: torch.Tensor  # probability of the most likely token
    entropy_T: torch.Tensor  # nats
    target_T: torch.Tensor
    finite_T: torch.Tensor


def reference_blocks(logits_TV: Array, targets_T: Ids) -> Iterator[ReferenceBlock]:
    """Split a chunk's reference logits into blocks of bounded memory."""
    total, vocab = logits_TV.shape
    step = max(1, _BLOCK_ELEMENTS // vocab)
    for start in range(0, total, step):
        rows = slice(start, min(start + step, total))
        a = torch.from_numpy(np.ascontiguousarray(logits_TV[rows])).double()
        finite = torch.isfinite(a).all(dim=1)
        a = torch.where(finite[:, None], a, torch.zeros((), dtype=a.dtype))
        lse = torch.logsumexp(a, dim=1)
        log_p = a - lse[:, None]
        p = log_p.exp()
        yield ReferenceBlock(
            rows=rows,
            logits_TV=a,
            lse_T=lse,
            p_TV=p,
            p_cut_TV=torch.where(log_p > LLAMA_CPP_CUT, p, torch.zeros((), dtype=p.dtype)),
            top_T=np.argmax(logits_TV[rows], axis=1),  # the first of equals, as llama.cpp takes it
            confidence_T=p.amax(dim=1),
            entropy_T=-(p * log_p).sum(dim=1),
            target_T=torch.from_numpy(np.asarray(targets_T[rows], dtype=np.int64)),
            finite_T=finite,
        )


class DivergenceAccumulator:
    """Streams chunks of one candidate; keeps a few numbers per scored token and nothing of size V."""

    def __init__(self, *, reference: str, candidate: str, n_ctx: int, vocab: int, seed: str = "") -> None:
        self.reference, self.candidate, self.n_ctx, self.vocab, self.seed = reference, candidate, n_ctx, vocab, seed
        self._columns: list[npt.NDArray[np.float64]] = []  # (T, 8) per block: see _COLUMNS
        self._chunk_of: list[npt.NDArray[np.int64]] = []
        self._chunks = 0
        self.non_finite = 0

    _COLUMNS = ("kld", "kld_cut", "same_top", "dp", "nll_ref", "nll_cand", "confidence", "entropy", "position")

    def begin_chunk(self) -> None:
        """Count a chunk: its tokens form one cluster."""
        self._chunks += 1

    def add(self, block: ReferenceBlock, logits_TV: Array, *, first_position: int) -> None:
        """Compare one block of the reference with the same rows of the candidate's chunk, (T, V)."""
        if logits_TV.shape[1] != self.vocab:
            raise InputError(
                f"{self.candidate} has {logits_TV.shape[1]} logits a token, the reference has {self.vocab}: "
                "different vocabularies cannot be compared"
            )
        own = np.ascontiguousarray(logits_TV[block.rows])
        b = torch.from_numpy(own).double()
        good = block.finite_T & torch.isfinite(b).all(dim=1)
        self.non_finite += int((~good).sum())
        b = torch.where(good[:, None], b, torch.zeros((), dtype=b.dtype))
        lse = torch.logsumexp(b, dim=1)
        shift = lse - block.lse_T
        nll_ref = block.lse_T - block.logits_TV.gather(1, block.target_T[:, None])[:, 0]
        nll_cand = lse - b.gather(1, block.target_T[:, None])[:, 0]
        difference = block.logits_TV - b
        # sum p (a - b) - lse_a + lse_b: no second (T, V) log-softmax; the cancellation costs eps64 * |logit| ~ 1e-14
        kld = torch.linalg.vecdot(block.p_TV, difference) + shift
        kld_cut = torch.linalg.vecdot(block.p_cut_TV, difference) + shift * block.p_cut_TV.sum(dim=1)
        same_top = torch.from_numpy((np.argmax(own, axis=1) == block.top_T).astype(np.float64))
        position = torch.arange(block.rows.start, block.rows.stop, dtype=torch.float64) + first_position
        columns = torch.stack(
            [
                kld,
                kld_cut,
                same_top,
                (-nll_cand).exp() - (-nll_ref).exp(),
                nll_ref,
                nll_cand,
                block.confidence_T,
                block.entropy_T,
                position,
            ],
            dim=1,
        )[good]
        self._columns.append(columns.numpy())
        self._chunk_of.append(np.full(len(columns), self._chunks - 1, dtype=np.int64))

    def result(self) -> Divergence:
        """The statistics of everything added. Rows with a non-finite logit are counted, not averaged."""
        table = np.concatenate(self._columns) if self._columns else np.zeros((0, len(self._COLUMNS)))
        chunk_of = np.concatenate(self._chunk_of) if self._chunk_of else np.zeros(0, dtype=np.int64)
        if len(table) == 0:
            return self._empty()
        kld, kld_cut, same_top, dp, nll_ref, nll_cand, confidence, entropy, position = table.T
        counts = np.bincount(chunk_of, minlength=self._chunks).astype(np.float64)
        weights = _resampled_chunks(self._chunks, self.seed)  # (rounds, chunks)

        def interval(values: npt.NDArray[np.float64]) -> tuple[float, float]:
            return _clustered_interval(values, chunk_of, counts, weights)

        log_ratio = nll_cand - nll_ref
        low, high = interval(log_ratio)
        return Divergence(
            reference=self.reference,
            candidate=self.candidate,
            tokens=len(kld),
            chunks=self._chunks,
            n_ctx=self.n_ctx,
            vocab=self.vocab,
            mean_kld=float(kld.mean()),
            mean_kld_interval=interval(kld),
            mean_kld_llama_cpp=float(kld_cut.mean()),
            max_kld=float(kld.max()),
            kld_percentiles={f"{q:g}": float(np.percentile(kld, q)) for q in PERCENTILES},
            top1=float(same_top.mean()),
            top1_interval=interval(same_top),
            rms_dp=float(math.sqrt(float((dp * dp).mean()))),
            ppl_reference=_exp(float(nll_ref.mean())),
            ppl_candidate=_exp(float(nll_cand.mean())),
            ppl_ratio=_exp(float(log_ratio.mean())),
            ppl_ratio_interval=(_exp(low), _exp(high)),
            reference_entropy=float(entropy.mean()),
            kld_by_position=_by_position(position, kld),
            kld_by_confidence=_by_confidence(confidence, kld),
            histogram=_histogram(kld),
            non_finite=self.non_finite,
        )

    def _empty(self) -> Divergence:
        """Nothing finite to average: zero tokens and zeros, on which no check may pass; `non_finite` says why."""
        nothing = (0.0, 0.0)
        return Divergence(
            reference=self.reference, candidate=self.candidate, tokens=0, chunks=self._chunks, n_ctx=self.n_ctx,
            vocab=self.vocab, mean_kld=0.0, mean_kld_interval=nothing, mean_kld_llama_cpp=0.0, max_kld=0.0,
            kld_percentiles={}, top1=0.0, top1_interval=nothing, rms_dp=0.0, ppl_reference=0.0, ppl_candidate=0.0,
            ppl_ratio=0.0, ppl_ratio_interval=nothing, reference_entropy=0.0, kld_by_position=[], kld_by_confidence=[],
            histogram=[], non_finite=self.non_finite,
        )  # fmt: skip


def divergence(
    reference_chunks: Iterable[Array],
    candidate_chunks: Iterable[Array],
    token_chunks: Iterable[Ids],
    *,
    reference: str = "reference",
    candidate: str = "candidate",
    seed: str = "",
) -> Divergence:
    """Compare two streams of logits chunk by chunk; memory holds one chunk of each.

    Args:
        reference_chunks, candidate_chunks: per chunk (T, V), the logits of positions n_ctx-1-T .. n_ctx-2.
        token_chunks: per chunk (n_ctx,), so that the last T tokens are the targets.
        seed: any text, usually a digest of the inputs; fixes the bootstrap.

    Raises:
        InputError: different vocabularies, different lengths, nothing to compare.
    """
    total: DivergenceAccumulator | None = None
    for ref, cand, tokens in zip(reference_chunks, candidate_chunks, token_chunks, strict=True):
        if total is None:
            total = DivergenceAccumulator(
                reference=reference, candidate=candidate, n_ctx=len(tokens), vocab=ref.shape[1], seed=seed
            )
        add_chunk(ref, {candidate: cand}, tokens, {candidate: total})
    if total is None:
        raise InputError("nothing to compare: no chunk of tokens was given")
    return total.result()


def add_chunk(ref: Array, candidates: dict[str, Array], tokens: Ids, into: dict[str, DivergenceAccumulator]) -> None:
    """Add one chunk for several candidates at once: the reference's share of the work is done a single time."""
    length = ref.shape[0]
    for label, own in candidates.items():
        if own.shape[0] != length:
            raise InputError(f"{label} has {own.shape[0]} scored positions where the reference has {length}")
        into[label].begin_chunk()
    for block in reference_blocks(ref, tokens[len(tokens) - length :]):
        for label, own in candidates.items():
            into[label].add(block, own, first_position=len(tokens) - 1 - length)


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))  # e^709 is the largest double; a perplexity beyond e^700 is only "broken"


def _resampled_chunks(chunks: int, seed: str) -> npt.NDArray[np.float64]:
    """(rounds, chunks): how often each chunk was drawn in each bootstrap round."""
    generator = np.random.default_rng(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big"))
    return generator.multinomial(chunks, np.full(chunks, 1.0 / chunks), size=BOOTSTRAP_ROUNDS).astype(np.float64)


def _clustered_interval(
    values: npt.NDArray[np.float64],
    chunk_of: npt.NDArray[np.int64],
    counts: npt.NDArray[np.float64],
    weights: npt.NDArray[np.float64],
) -> tuple[float, float]:
    """95 % interval of the mean when whole chunks are the independent units; one chunk gives no interval: (-inf, inf)
    cannot be stored, so the extremes of the single tokens stand in for it."""
    if len(counts) < 2:
        return float(values.min()), float(values.max())
    sums = np.bincount(chunk_of, weights=values, minlength=len(counts))
    drawn = weights @ counts
    means = (weights @ sums)[drawn > 0] / drawn[drawn > 0]
    tail = NormalDist().cdf(-math.sqrt(len(counts) / (len(counts) - 1)) * _t_quantile(len(counts) - 1))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _t_quantile(freedom: int) -> float:
    """0.975 quantile of Student's t by its expansion in 1/freedom (Abramowitz and Stegun 26.7.5): 1e-3 from 5 on."""
    z = NormalDist().inv_cdf(0.975)
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + g1 / freedom + g2 / freedom**2 + g3 / freedom**3


def _by_position(position: npt.NDArray[np.float64], kld: npt.NDArray[np.float64]) -> list[tuple[int, float]]:
    first, last = int(position.min()), int(position.max())
    width = max(1, math.ceil((last - first + 1) / _POSITION_BUCKETS))
    bucket = ((position - first) // width).astype(np.int64)
    return [(first + int(b) * width, float(kld[bucket == b].mean())) for b in np.unique(bucket)]


def _by_confidence(confidence: npt.NDArray[np.float64], kld: npt.NDArray[np.float64]) -> list[tuple[float, float, int]]:
    bucket = np.minimum((confidence * 10).astype(np.int64), 9)
    return [(int(b) / 10, float(kld[bucket == b].mean()), int((bucket == b).sum())) for b in np.unique(bucket)]


def _histogram(kld: npt.NDArray[np.float64]) -> list[tuple[float, int]]:
    log = np.clip(np.log10(np.maximum(kld, 10.0**_HISTOGRAM_LOW)), _HISTOGRAM_LOW, _HISTOGRAM_HIGH)
    bucket = np.floor((log - _HISTOGRAM_LOW) / _HISTOGRAM_STEP).astype(np.int64)
    counts = np.bincount(bucket)
    return [(_HISTOGRAM_LOW + i * _HISTOGRAM_STEP, int(n)) for i, n in enumerate(counts) if n]
