"""The divergence between two streams of logits over the same tokens; in float64, a few rows at a time.

KLD_t = sum_v p_ref (log p_ref - log p_cand) over the full support; beside it llama.cpp's value, which drops v with
log p_ref <= -16. Percentiles interpolate linearly at f(n-1); RMS dp = sqrt(mean (p_cand - p_ref)^2) of the corpus
token; PPL ratio = exp(mean(nll_cand - nll_ref)). Intervals (`intervals`) are bootstrapped over whole chunks, seeded by
a digest.
Memory: sums per chunk and bucket, and eight bytes a scored token for the percentiles; nothing of size V is kept. The
data of a chunk do not depend on other chunks, so any process may measure a chunk, and the parts are joined in order.
Shapes: logits (T, V), targets (T,). Source of the definitions: llama.cpp, tools/perplexity/perplexity.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from so8t_core.errors import InputError
from verification.gate.report import Divergence
from verification.logit_parity.intervals import mean_interval, resampled, share_interval

Array = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

LLAMA_CPP_CUT = -16.0  # nats; llama.cpp skips a token whose reference log-probability is not above this
PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
_BLOCK_ELEMENTS = 1 << 19  # elements of a (rows, V) block: 4 MiB of float64, twice as fast as 32
_POSITION_BUCKETS = 16
_HISTOGRAM_LOW, _HISTOGRAM_HIGH, _HISTOGRAM_STEP = -12.0, 2.0, 0.5  # log10 nats
_HISTOGRAM_SIZE = round((_HISTOGRAM_HIGH - _HISTOGRAM_LOW) / _HISTOGRAM_STEP) + 1
_SUMS = ("kld", "kld_cut", "same_top", "dp2", "nll_ref", "nll_cand", "entropy")


@dataclass
class Cluster:
    """The sums of one chunk, whose tokens are not independent of each other."""

    sums: Floats  # (7,): see _SUMS
    position: Floats  # (2, n_ctx): sum of KLD, count
    confidence: Floats = field(default_factory=lambda: np.zeros((2, 10)))
    histogram: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(_HISTOGRAM_SIZE, dtype=np.int64))
    count: int = 0
    kld: list[Floats] = field(default_factory=list)
    log_ratio: tuple[float, float] = (math.inf, -math.inf)
    non_finite: int = 0

    def keep(
        self,
        *,
        kld: Floats,
        kld_cut: Floats,
        same_top: npt.NDArray[np.bool_],
        nll_ref: Floats,
        nll_cand: Floats,
        entropy: Floats,
        confidence: Floats,
        positions: Ids,
    ) -> None:
        """Add positions whose logits are finite, one entry each; `confidence` is the reference's largest p."""
        dp = np.exp(-nll_cand) - np.exp(-nll_ref)
        columns = (kld, kld_cut, same_top, dp * dp, nll_ref, nll_cand, entropy)
        self.sums += [column.sum() for column in columns]
        self.count += len(kld)
        self.kld.append(kld)
        if not len(kld):
            return
        low, high = self.log_ratio
        self.log_ratio = (min(low, (nll_cand - nll_ref).min()), max(high, (nll_cand - nll_ref).max()))
        _into(self.position, positions, kld)
        _into(self.confidence, np.minimum((confidence * 10).astype(np.int64), 9), kld)
        log = np.minimum(np.log10(np.maximum(kld, 10.0**_HISTOGRAM_LOW)), _HISTOGRAM_HIGH)
        bucket = ((log - _HISTOGRAM_LOW) / _HISTOGRAM_STEP).astype(np.int64)
        self.histogram += np.bincount(bucket, minlength=_HISTOGRAM_SIZE)


class DivergenceAccumulator:
    """Collects the rows of one comparison, chunk after chunk."""

    def __init__(self, *, reference: str, candidate: str, n_ctx: int, vocab: int, seed: str = "") -> None:
        self.reference, self.candidate, self.n_ctx, self.vocab, self.seed = reference, candidate, n_ctx, vocab, seed
        self._clusters: list[Cluster] = []
        self._scratch: torch.Tensor | None = None

    def begin_chunk(self) -> None:
        """Begin a new cluster: its tokens are not independent of each other."""
        self._clusters.append(Cluster(np.zeros(len(_SUMS)), np.zeros((2, self.n_ctx))))

    def take(self) -> list[Cluster]:
        """Return the added clusters and remove them here."""
        taken, self._clusters = self._clusters, []
        return taken

    def extend(self, clusters: Sequence[Cluster]) -> None:
        """Add clusters that `take` returned from another accumulator of the comparison, perhaps in another process."""
        self._clusters.extend(clusters)

    def add(self, ref_TV: Array, cand_TV: Array, targets_T: Ids, *, first_position: int) -> None:
        """Compare consecutive rows; `targets_T` are the next tokens, `first_position` the position of the first row.

        Raises:
            InputError: another vocabulary or another number of rows.
        """
        if cand_TV.shape[1] != ref_TV.shape[1] or ref_TV.shape[1] != self.vocab:
            raise InputError(
                f"{self.candidate} has {cand_TV.shape[1]} logits a token, the reference has {ref_TV.shape[1]}: "
                "different vocabularies cannot be compared"
            )
        if len(ref_TV) != len(cand_TV) or len(ref_TV) != len(targets_T):
            raise InputError(
                f"{self.candidate} has {len(cand_TV)} scored positions where the reference has {len(ref_TV)}"
            )
        step = max(1, _BLOCK_ELEMENTS // self.vocab)
        for start in range(0, len(ref_TV), step):
            rows = slice(start, start + step)
            self._add_block(ref_TV[rows], cand_TV[rows], targets_T[rows], first_position + start)

    def _add_block(self, ref: Array, cand: Array, targets: Ids, first_position: int) -> None:
        """Each row is shifted by its largest logit, so one exponential of each is enough:
        log p = a - log A and log q = b - log B with A = sum e^a, B = sum e^b, thus KLD = <p, a - b> + log(B / A).
        The cancellation in the last sum costs eps64 * |logit| ~ 1e-14.
        """
        a_TV, b_TV, p_TV = self._working(len(ref))
        target_T1 = torch.from_numpy(targets)[:, None]
        _shifted(cand, b_TV)
        torch.exp(b_TV, out=p_TV)
        log_b = p_TV.sum(dim=1).log_()
        nll_cand = (log_b - b_TV.gather(1, target_T1).squeeze(1)).numpy()
        _shifted(ref, a_TV)
        torch.exp(a_TV, out=p_TV)
        sum_a = p_TV.sum(dim=1)
        p_TV.div_(sum_a[:, None])
        log_a = sum_a.log()
        nll_ref = (log_a - a_TV.gather(1, target_T1).squeeze(1)).numpy()
        entropy = log_a - torch.linalg.vecdot(p_TV, a_TV)
        shift = log_b - log_a
        a_TV.sub_(b_TV)  # a - b from here on
        kld = torch.linalg.vecdot(p_TV, a_TV) + shift
        # a NaN or an infinity in a row makes its sums non-finite; finite logits give finite sums in float64
        good = (torch.isfinite(kld) & torch.isfinite(entropy)).numpy()
        confidence = sum_a.reciprocal().numpy()[good]  # the largest shifted logit is 0, and e^0 = 1
        torch.nn.functional.threshold(p_TV, math.exp(LLAMA_CPP_CUT), 0.0, inplace=True)
        kld_cut = (torch.linalg.vecdot(p_TV, a_TV) + shift * p_TV.sum(dim=1)).numpy()[good]
        same_top = (np.argmax(cand, axis=1) == np.argmax(ref, axis=1))[good]  # of equal logits the first
        into = self._clusters[-1]
        into.non_finite += int((~good).sum())
        into.keep(
            kld=kld.numpy()[good],
            kld_cut=kld_cut,
            same_top=same_top,
            nll_ref=nll_ref[good],
            nll_cand=nll_cand[good],
            entropy=entropy.numpy()[good],
            confidence=confidence,
            positions=np.arange(first_position, first_position + len(good))[good],
        )

    def _working(self, rows: int) -> torch.Tensor:
        """(3, rows, V) float64, the same memory every time: new pages would take as long as the arithmetic."""
        if self._scratch is None or self._scratch.shape[1] < rows:
            self._scratch = torch.empty((3, rows, self.vocab), dtype=torch.float64)
        return self._scratch[:, :rows]

    def chunk_klds(self) -> npt.NDArray[np.float64]:
        """Sum of the KLDs and number of positions of every cluster, (chunks, 2)."""
        return np.asarray([(cluster.sums[0], cluster.count) for cluster in self._clusters], dtype=np.float64)

    def result(self) -> Divergence:
        """The statistics of all added rows. Rows with a non-finite logit are counted, but not averaged."""
        counts = np.asarray([cluster.count for cluster in self._clusters], dtype=np.float64)
        total = counts.sum()
        non_finite = sum(cluster.non_finite for cluster in self._clusters)
        if total == 0:
            return self._empty(non_finite)
        sums = np.stack([cluster.sums for cluster in self._clusters])  # (chunks, 7)
        means = dict(zip(_SUMS, (sums.sum(axis=0) / total).tolist(), strict=True))
        kld = np.concatenate([part for cluster in self._clusters for part in cluster.kld])
        position = np.sum([cluster.position for cluster in self._clusters], axis=0)
        confidence = np.sum([cluster.confidence for cluster in self._clusters], axis=0)
        histogram = np.sum([cluster.histogram for cluster in self._clusters], axis=0)
        lows, highs = zip(*(cluster.log_ratio for cluster in self._clusters), strict=True)
        drawn = resampled(len(counts), self.seed)
        low, high = mean_interval(sums[:, 5] - sums[:, 4], counts, drawn, extremes=(min(lows), max(highs)))
        return Divergence(
            reference=self.reference,
            candidate=self.candidate,
            tokens=len(kld),
            chunks=len(counts),
            n_ctx=self.n_ctx,
            vocab=self.vocab,
            mean_kld=means["kld"],
            mean_kld_interval=mean_interval(sums[:, 0], counts, drawn, extremes=(kld.min(), kld.max())),
            mean_kld_llama_cpp=means["kld_cut"],
            max_kld=kld.max(),
            kld_percentiles={f"{q:g}": np.percentile(kld, q) for q in PERCENTILES},
            top1=means["same_top"],
            top1_interval=share_interval(sums[:, 2], counts, drawn),
            rms_dp=math.sqrt(means["dp2"]),
            ppl_reference=_exp(means["nll_ref"]),
            ppl_candidate=_exp(means["nll_cand"]),
            ppl_ratio=_exp(means["nll_cand"] - means["nll_ref"]),
            ppl_ratio_interval=(_exp(low), _exp(high)),
            reference_entropy=means["entropy"],
            kld_by_position=_by_position(position),
            kld_by_confidence=[(i / 10, s / n, n) for i, (s, n) in enumerate(confidence.T) if n],
            histogram=[(_HISTOGRAM_LOW + i * _HISTOGRAM_STEP, n) for i, n in enumerate(histogram) if n],
            non_finite=non_finite,
        )

    def _empty(self, non_finite: int) -> Divergence:
        """The result without a finite row: zero tokens and zeros, so that no check passes; `non_finite` says why."""
        nothing = (0.0, 0.0)
        return Divergence(
            reference=self.reference,
            candidate=self.candidate,
            tokens=0,
            chunks=len(self._clusters),
            n_ctx=self.n_ctx,
            vocab=self.vocab,
            mean_kld=0.0,
            mean_kld_interval=nothing,
            mean_kld_llama_cpp=0.0,
            max_kld=0.0,
            kld_percentiles={},
            top1=0.0,
            top1_interval=nothing,
            rms_dp=0.0,
            ppl_reference=0.0,
            ppl_candidate=0.0,
            ppl_ratio=0.0,
            ppl_ratio_interval=nothing,
            reference_entropy=0.0,
            kld_by_position=[],
            kld_by_confidence=[],
            histogram=[],
            non_finite=non_finite,
        )


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
        seed: any text, usually a digest of the inputs; makes the bootstrap repeatable.

    Raises:
        InputError: different vocabularies, different lengths, or nothing to compare.
    """
    total: DivergenceAccumulator | None = None
    for ref, cand, tokens in zip(reference_chunks, candidate_chunks, token_chunks, strict=True):
        if total is None:
            total = DivergenceAccumulator(
                reference=reference, candidate=candidate, n_ctx=len(tokens), vocab=ref.shape[1], seed=seed
            )
        if len(ref) >= len(tokens) or len(tokens) > total.n_ctx:
            raise InputError(
                f"a chunk of {len(tokens)} tokens with {len(ref)} rows of logits: a chunk has more tokens than rows, "
                f"and no chunk may be longer than the first, {total.n_ctx} tokens"
            )
        total.begin_chunk()
        total.add(ref, cand, tokens[len(tokens) - len(ref) :], first_position=len(tokens) - 1 - len(ref))
    if total is None:
        raise InputError("nothing to compare: no chunk of tokens was given")
    return total.result()


def mean_kld(ref_TV: Array, cand_TV: Array) -> float:
    """Mean KLD of a few rows; NaN if any logit is not finite."""
    a, b = torch.from_numpy(ref_TV).double(), torch.from_numpy(cand_TV).double()
    log_p = torch.log_softmax(a, dim=1)
    return float(torch.linalg.vecdot(log_p.exp(), log_p - torch.log_softmax(b, dim=1)).mean())


def _shifted(logits_TV: Array, into_TV: torch.Tensor) -> None:
    """Write the logits as float64, each row minus its largest."""
    given = torch.from_numpy(logits_TV)
    into_TV.copy_(given)
    into_TV.sub_(given.amax(dim=1, keepdim=True).double())


def _into(table: Floats, index: npt.NDArray[np.int64], kld: Floats) -> None:
    table[0] += np.bincount(index, weights=kld, minlength=table.shape[1])
    table[1] += np.bincount(index, minlength=table.shape[1])


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))  # e^709 is the largest double; a perplexity beyond e^700 only means "broken"


def _by_position(table: Floats) -> list[tuple[int, float]]:
    seen = np.flatnonzero(table[1])
    first, last = seen[0], seen[-1]
    width = math.ceil((last - first + 1) / _POSITION_BUCKETS)
    buckets = ((start, table[:, start : start + width].sum(axis=1)) for start in range(first, last + 1, width))
    return [(start, total / count) for start, (total, count) in buckets if count]
