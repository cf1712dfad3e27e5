"""One file's KLD on every domain, and the macro mean over domains with its interval.

All domains have the same number of chunks and positions, so the macro mean of the domains' means is the mean over all
positions, and one bootstrap over all chunks gives its interval.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from verification.engines.llama_logits import LlamaLogits
from verification.engines.llama_model import LlamaModel
from verification.gate.report import Divergence
from verification.logit_parity.compare import Reference, compare_rows, passages_of
from verification.logit_parity.kl import DivergenceAccumulator
from verification.logit_parity.text import Corpus


class Measured(BaseModel):
    """The measurement of one file on the ranking text."""

    model_config = ConfigDict(extra="forbid")

    kind: str
    bytes: int
    weight_error: float
    macro: Divergence  # over all domains
    domains: dict[str, float]  # mean KLD of each, nats


def measure(
    kind: str,
    path: Path,
    weight_error: float,
    texts: Mapping[str, Corpus],
    reference: Reference,
    *,
    threads: int | None,
    tell: Callable[[int, int], None],
) -> Measured:
    """Run a file over the ranking chunks of every domain."""
    n_ctx = len(next(iter(texts.values())).chunks[0])
    vocab = reference.spool.vocab

    def accumulator(seed: str) -> DivergenceAccumulator:
        return DivergenceAccumulator(reference=reference.name, candidate=kind, n_ctx=n_ctx, vocab=vocab, seed=seed)

    total, means = accumulator(f"choose {kind}"), dict[str, float]()
    with LlamaModel(path) as model, LlamaLogits(model, n_ctx=n_ctx, threads=threads) as engine:
        for number, (name, text) in enumerate(texts.items()):
            tell(number, len(texts))
            own = accumulator(name)
            for passage in passages_of(text.chunks):
                compare_rows(engine.rows(passage.tokens, first=passage.first), reference, passage, own)
            clusters = own.take()
            own.extend(clusters)
            total.extend(clusters)
            means[name] = own.result().mean_kld
    tell(len(texts), len(texts))
    return Measured(
        kind=kind, bytes=path.stat().st_size, weight_error=weight_error, macro=total.result(), domains=means
    )
