"""The statistics that `llama-perplexity --kl-divergence` prints, from a base file and a candidate's logits.

Every step has llama.cpp's precision (log-probabilities and percentiles float32, sums float64, exponentials rounded to
float32), so that the printed digits agree too. Errors are computed as in the tool: sqrt((E[x^2] - E[x]^2) / (n - 1)).
This formula takes tokens as independent and is 1.4 to 5 times too narrow; `kl` has clustered intervals. A compiler that
contracts a * b + c (arm64) may change the last digit.
Source of the definitions: llama.cpp, tools/perplexity/perplexity.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from so8t_core.errors import InputError
from verification.logit_parity.llama_cpp_file import Array, BaseFile, log_sum_exp

_CUT = np.float32(-16)  # nats; ids need a larger base log-probability to count
_FEWEST = 100  # scored tokens; with fewer, the tool prints no statistics
_KLD_PERCENTILES = (0.999, 0.99, 0.95, 0.9, None, 0.1, 0.05, 0.01, 0.001)  # None is the median
_DP_PERCENTILES = (0.999, 0.99, 0.95, 0.9, 0.75, None, 0.25, 0.1, 0.05, 0.01, 0.001)
_Block = tuple[Array, Array, npt.NDArray[np.float64], Array, npt.NDArray[np.bool_]]
_BLOCK_ELEMENTS = 1 << 18  # elements of a (rows, V) block, near a cache's size


@dataclass
class KldTotals:
    """Adds up chunks; keeps four float32 a scored token. `threads` change no bit, because each computes whole rows."""

    vocab: int
    threads: int = 1
    _nll: list[Array] = field(default_factory=list)
    _nll_base: list[Array] = field(default_factory=list)
    _kld: list[npt.NDArray[np.float64]] = field(default_factory=list)
    _dp: list[Array] = field(default_factory=list)
    _same: list[npt.NDArray[np.bool_]] = field(default_factory=list)

    def add(self, base_TV: Array, logits_TV: Array, targets_T: npt.NDArray[np.integer]) -> None:
        """Add one chunk.

        Args:
            base_TV: decoded log-probabilities of the base, float32.
            logits_TV: the candidate's logits of the same positions, float32.
            targets_T: the corpus token that each position predicts.

        Raises:
            InputError: another vocabulary, or a NaN or infinite logit (the tool would print inf or nan and exit 0).
        """
        if logits_TV.shape != base_TV.shape:
            raise InputError(f"the candidate's logits have shape {logits_TV.shape}, the base file's {base_TV.shape}")
        step = max(1, _BLOCK_ELEMENTS // self.vocab)

        def block(start: int) -> _Block:
            rows = slice(start, start + step)
            targets = np.asarray(targets_T[rows], dtype=np.int64)
            return _block(base_TV[rows], logits_TV[rows].astype(np.float32), targets)

        with ThreadPoolExecutor(self.threads) as pool:  # numpy releases the interpreter lock in its loops over a block
            for nll, nll_base, kld, dp, same in pool.map(block, range(0, len(base_TV), step)):
                self._nll.append(nll)
                self._nll_base.append(nll_base)
                self._kld.append(kld)
                self._dp.append(dp)
                self._same.append(same)

    def result(self) -> KldStatistics:
        """All statistics that the tool prints.

        Raises:
            InputError: fewer than 100 scored tokens; the tool prints nothing then.
        """
        count = sum(map(len, self._nll))
        if count < _FEWEST:
            raise InputError(f"{count} scored tokens are too few for statistics; at least {_FEWEST}: use more chunks")
        return _statistics(
            np.concatenate(self._nll),
            np.concatenate(self._nll_base),
            np.concatenate(self._kld),
            np.concatenate(self._dp),
            np.concatenate(self._same),
        )


@dataclass(frozen=True)
class KldStatistics:
    """(value, error) or value of each line, and the lines as the tool prints them."""

    tokens: int
    values: dict[str, tuple[float, float | None]]
    text: str


def statistics(base: BaseFile, logit_chunks: Iterable[Array], *, threads: int = 1) -> KldStatistics:
    """The tool's statistics of a candidate against a base file.

    Args:
        logit_chunks: (T, V) float32 for each chunk of `base.tokens`, in order.
        threads: number of threads that share a chunk's positions; the number changes no bit.

    Raises:
        InputError: see `KldTotals`; or the numbers of chunks differ.
    """
    totals, first, seen = KldTotals(base.vocab, threads), base.n_ctx // 2, 0
    for logits in logit_chunks:
        if seen == base.chunks:
            raise InputError(f"more chunks of logits came than the {base.chunks} of {base.path}")
        totals.add(base.log_probs(seen), logits, base.tokens[seen][first + 1 :])
        seen += 1
    if seen != base.chunks:
        raise InputError(f"{seen} chunks of logits came for the {base.chunks} of {base.path}")
    return totals.result()


def _block(base: Array, logits: Array, targets: npt.NDArray[np.int64]) -> _Block:
    """Negative log-likelihood of the candidate and of the base, KLD, difference of probability, same top: each (T,)."""
    if not np.isfinite(logits).all():
        raise InputError("the candidate gives a logit that is NaN or infinite; its divergence has no value")
    each = np.arange(len(base))
    first = logits.argmax(axis=1)
    top = logits[each, first]
    log_z = top + log_sum_exp(logits, top)
    nll, nll_base = log_z - logits[each, targets], -base[each, targets]
    kld = np.array([_divergence(*row) for row in zip(base, logits, log_z, strict=True)])
    return nll, nll_base, kld, _exp(-nll) - _exp(-nll_base), first == base.argmax(axis=1)


def _divergence(base_V: Array, logits_V: Array, log_z: np.float32) -> np.float64:
    """One position's KLD, over the ids above the cut, which are few."""
    kept = np.flatnonzero(base_V > _CUT)
    likely = base_V[kept]
    result: np.float64 = (_exp(likely) * ((likely - logits_V[kept]) + log_z)).sum(dtype=np.float64)
    return result


def _exp(x: Array) -> Array:
    """Correctly rounded float32 exponential; glibc's expf differs for one argument in a few hundred."""
    result: Array = np.exp(x.astype(np.float64)).astype(np.float32)
    return result


def _statistics(
    nll: Array, nll_base: Array, kld: npt.NDArray[np.float64], dp: Array, same: npt.NDArray[np.bool_]
) -> KldStatistics:
    n = len(nll)

    def mean(values: npt.NDArray[np.floating], squares: npt.NDArray[np.floating]) -> tuple[float, float]:
        average = float(values.sum(dtype=np.float64)) / n
        variance = float(squares.sum(dtype=np.float64)) / n - average * average
        return average, math.sqrt(variance / (n - 1)) if variance > 0 else 0.0

    log_q, log_b = mean(nll, nll * nll), mean(nll_base, nll_base * nll_base)
    joint = float((nll * nll_base).sum(dtype=np.float64)) / n
    covariance = (joint - log_q[0] * log_b[0]) / (n - 1)
    ppl_q, ppl_b = ((math.exp(value), math.exp(value) * error) for value, error in (log_q, log_b))
    ratio = log_q[0] - log_b[0]
    ratio_error = math.sqrt(max(log_q[1] ** 2 + log_b[1] ** 2 - 2.0 * covariance, 0.0))
    difference_error = math.sqrt(max(ppl_q[1] ** 2 + ppl_b[1] ** 2 - 2.0 * ppl_q[0] * ppl_b[0] * covariance, 0.0))
    spread = log_q[1] * log_b[1]
    kld32 = np.sort(kld.astype(np.float32))
    dp32 = np.sort(dp)
    dp_squared = (dp * dp).astype(np.float64)
    square = mean(dp_squared, dp_squared * dp_squared)
    rms = math.sqrt(square[0])
    top = float(same.sum()) / n

    values: dict[str, tuple[float, float | None]] = {
        "Mean PPL(Q)": ppl_q,
        "Mean PPL(base)": ppl_b,
        "Cor(ln(PPL(Q)), ln(PPL(base)))": (100 * covariance / spread if spread else math.nan, None),
        "Mean ln(PPL(Q)/PPL(base))": (ratio, ratio_error),
        "Mean PPL(Q)/PPL(base)": (math.exp(ratio), math.exp(ratio) * ratio_error),
        "Mean PPL(Q)-PPL(base)": (ppl_q[0] - ppl_b[0], difference_error),
        "Mean    KLD": mean(kld, kld * kld),
        "Maximum KLD": (float(kld32[-1]), None),
        **{_percentile_name(f, "KLD"): (_percentile(kld32, f), None) for f in _KLD_PERCENTILES},
        "Minimum KLD": (float(kld32[0]), None),
        "Mean    Δp": _percent(mean(dp, dp * dp)),
        "Maximum Δp": (100.0 * float(dp32[-1]), None),
        **{_percentile_name(f, "Δp"): (100.0 * _percentile(dp32, f), None) for f in _DP_PERCENTILES},
        "Minimum Δp": (100.0 * float(dp32[0]), None),
        "RMS Δp": _percent((rms, 0.5 / rms * square[1] if rms else 0.0)),
        "Same top p": _percent((top, math.sqrt(top * (1.0 - top) / (n - 1)))),
    }
    return KldStatistics(n, values, _text(values))


def _percent(pair: tuple[float, float]) -> tuple[float, float]:
    return 100.0 * pair[0], 100.0 * pair[1]


def _percentile_name(fraction: float | None, what: str) -> str:
    return f"Median  {what}" if fraction is None else f"{100 * fraction:4.1f}%   {what}"


def _percentile(ordered: Array, fraction: float | None) -> float:
    """Linear interpolation at f (n - 1) in float32; None is the median of two neighbours."""
    n = len(ordered)
    if fraction is None:
        middle = ordered[n // 2]
        return float(np.float32(0.5) * (middle + ordered[n // 2 - 1]) if n % 2 == 0 else middle)
    place = np.float32(fraction) * np.float32(n - 1)
    index = int(place)
    rest = place - np.float32(index)
    return float((np.float32(1) - rest) * ordered[index] + rest * ordered[min(index + 1, n - 1)])


def _text(values: dict[str, tuple[float, float | None]]) -> str:
    """The tool's lines with its field widths, one section after the other."""
    lines = []
    for name, (value, error) in values.items():
        if name == "Mean PPL(Q)":
            lines.append("====== Perplexity statistics ======")
        elif name == "Mean    KLD":
            lines += ["", "====== KL divergence statistics ======"]
        elif name == "Mean    Δp":
            lines += ["", "====== Token probability statistics ======"]
        if name.startswith("Cor("):
            lines.append(f"{name}: {value:6.2f}%")
        elif "PPL" in name:
            lines.append(f"{name:<30}: {value:10.6f} ± {error:10.6f}")
        elif "KLD" in name:
            lines.append(f"{name}: {value:10.6f}" + (f" ± {error:10.6f}" if error is not None else ""))
        elif error is None:
            lines.append(f"{name}: {value:6.3f}%")
        else:
            lines.append(f"{'RMS Δp    ' if name == 'RMS Δp' else name}: {value:6.3f} ± {error:5.3f} %")
    return "\n".join(lines) + "\n"
