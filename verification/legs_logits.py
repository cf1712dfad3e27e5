"""The legs that need inference: every file on the same reference logits, chunk by chunk."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from so8t_core.errors import InputError
from so8t_core.files import sha256_path
from verification.checks import divergence_checks
from verification.corpus import Corpus
from verification.divergence import DivergenceAccumulator, add_chunk
from verification.legs_file import Candidate
from verification.logits import LlamaLogits, hf_chunk, load_hf
from verification.oracle import Oracle
from verification.schema import Check, Divergence

_SAVED = "saved checkpoint"


@dataclass(frozen=True)
class Measured:
    """Divergences of the files from the reference, and of the saved checkpoint from the fp32 bake."""

    files: dict[str, Divergence]
    saved: Divergence | None


def measure(
    model: Any,
    paths: Mapping[str, Path],
    text: Corpus,
    *,
    reference: str,
    baked: Any | None = None,
    threads: int | None = None,
    tell: Callable[[str, int, int], None] = lambda stage, done, total: None,
    stage: str = "logits",
) -> Measured:
    """Run the reference once a chunk and compare all files on it; all engines stay open, one chunk is in memory."""
    n_ctx = len(text.chunks[0])
    into: dict[str, DivergenceAccumulator] = {}
    saved: DivergenceAccumulator | None = None
    with contextlib.ExitStack() as stack:
        engines = {
            label: stack.enter_context(LlamaLogits(path, n_ctx=n_ctx, threads=threads)) for label, path in paths.items()
        }
        for number, tokens in enumerate(text.chunks):
            tell(stage, number, len(text.chunks))
            own = hf_chunk(model, tokens)
            if number == 0:
                into = {
                    label: DivergenceAccumulator(
                        reference=reference, candidate=label, n_ctx=n_ctx, vocab=own.shape[1], seed=text.sha256
                    )
                    for label in engines
                }
                for label, engine in engines.items():
                    if engine.vocab != own.shape[1]:
                        raise InputError(
                            f"{label} gives {engine.vocab} logits a token, the reference {own.shape[1]}: "
                            "different vocabularies cannot be compared"
                        )
            add_chunk(own, {label: engine.chunk(tokens) for label, engine in engines.items()}, tokens, into)
            if baked is not None:
                if saved is None:
                    saved = DivergenceAccumulator(
                        reference="baked fp32", candidate=_SAVED, n_ctx=n_ctx, vocab=own.shape[1], seed=text.sha256
                    )
                add_chunk(hf_chunk(baked, tokens), {_SAVED: own}, tokens, {_SAVED: saved})
        tell(stage, len(text.chunks), len(text.chunks))
    return Measured({label: total.result() for label, total in into.items()}, saved.result() if saved else None)


def files_leg(candidate: Candidate, d: Divergence) -> list[Check]:
    """Checks of `convert` (float files) or `quality` (quantised files)."""
    if not candidate.file.is_float:
        return divergence_checks("quality", d, subject=candidate.label)
    return [
        *divergence_checks("convert", d, subject=candidate.label),
        Check(
            name="convert.reference_entropy",
            title="Reference's mean entropy, below 0.9 ln V",
            subject=candidate.label,
            status="not evaluated",
            value=d.reference_entropy if d.tokens else None,
            bound=0.9 * math.log(d.vocab),  # a nearly uniform reference hides faults: no logit comparison counts then
            relation="<=",
            unit="nats",
        ),
    ]


def base_damage_of(
    base: Path,
    files: Sequence[Candidate],
    oracle: Oracle,
    text: Corpus,
    *,
    threads: int | None,
    tell: Callable[[str, int, int], None],
) -> list[Divergence]:
    """What the same quantisation does to the base model on the same text; information, never decided on."""
    digest = sha256_path(base)
    source = oracle.converted(base, digest)
    kinds = list(dict.fromkeys(c.file.file_type for c in files if not c.file.is_float))
    if not kinds:
        return []
    paths = {kind: oracle.of_type(source, kind, base, digest) for kind in kinds}
    result = measure(load_hf(base), paths, text, reference="base", threads=threads, tell=tell, stage="base damage")
    return list(result.files.values())
