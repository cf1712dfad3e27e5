"""Choose the smallest file that keeps the limits on the ranking text, and prove the choice on other text.

    1. a file of every type is made from one F16 file; files are ranked by size and weight error (`ladder`)
    2. the files that are not dominated are measured on the ranking half of every domain; the checkpoint runs once
    3. the smallest file whose upper end of the macro mean KLD is within the limit is chosen; where only a size is
       given, the file with the smallest KLD
    4. `verify` proves the chosen file on the proving half, which ranked nothing; if it fails, the next file is tried

The output folder keeps all files and measurements under digests, so that a run that was stopped can go on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from pipeline.choose.domains import Domain, built_in, given
from pipeline.choose.ladder import TYPES, Rung, check_types, rung, undominated
from pipeline.choose.measure import Measured, measure
from so8t_core.errors import InputError
from so8t_core.files import sha256_path, write_text
from verification import verify
from verification.engines.huggingface import load_hf
from verification.engines.llama_model import LlamaModel
from verification.engines.reconversion import Oracle
from verification.engines.threads import torch_threads
from verification.gate.policy import Policy, load_policy, make_policy
from verification.gate.report import Report
from verification.gguf.reader import read_gguf
from verification.logit_parity.compare import passages_of, run_reference
from verification.logit_parity.text import Corpus, read_corpus
from verification.reference.checkpoint import Checkpoint
from verification.reference.tokenizer import load_tokenizer

TRIES = 3  # files that `verify` tries before the answer is that no file passes
Tell = Callable[[str, int, int], None]
Kept = TypeVar("Kept", Rung, Measured)


@dataclass(frozen=True)
class Limits:
    """The limits that a file must keep."""

    max_size: int | None = None  # bytes
    max_kld: float | None = None  # nats, macro mean
    policy: str | Path | None = None

    def kld_of(self, kind: str, policy: Policy) -> float | None:
        """The limit of a type's mean KLD; None where only the size is limited or the policy has no bound for it."""
        if self.max_kld is not None:
            return self.max_kld
        known = policy.quality.get(kind)
        return None if self.max_size is not None or known is None else known.mean_kld


@dataclass(frozen=True)
class Choice:
    """All measurements, and the file that was proven."""

    ladder: list[Rung]
    measured: list[Measured]  # from small to large
    chosen: str | None  # type of the proven file
    path: Path | None
    report: Report | None  # of the last file that `verify` tried
    tried: list[str]


def choose(
    directory: str | Path,
    out: str | Path,
    limits: Limits,
    *,
    types: Sequence[str] = TYPES,
    corpora: Mapping[str, Path] | None = None,
    chunks: int = 2,
    n_ctx: int = 256,
    threads: int | None = None,
    converter: str | Path | None = None,
    tell: Tell = lambda stage, done, total: None,
) -> Choice:
    """Choose a file type for a checkpoint.

    Args:
        out: folder for files, measurements and the report of the proof.
        chunks: number of chunks in each domain for the ranking; the proof has twice as many.
        corpora: the user's domains, which replace the built-in domains.

    Raises:
        InputError: no limit, an unknown type, a text that is too short, or a checkpoint that cannot be used.
    """
    kinds = check_types(types)
    if limits.max_size is None and limits.max_kld is None and limits.policy is None:
        raise InputError("choose needs a limit: --max-size, --max-kld or --policy")
    policy = load_policy(limits.policy)
    out, checkpoint = Path(out), Checkpoint(directory)
    for folder in (out / "files", out / "measured", out / "text"):
        folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(checkpoint.directory)
    digest = sha256_path(checkpoint.directory)
    domains = given(corpora) if corpora else built_in(chat=bool(tokenizer.chat_template))
    with torch_threads(threads):
        oracle = Oracle(out / "files", converter=converter, threads=threads)
        tell("converting", 0, 1)
        source = oracle.converted(checkpoint.directory, digest)
        rungs = _make(kinds, oracle, source, checkpoint, digest, out / "measured", tell)
        with LlamaModel(source, vocab_only=True) as model:
            bos = model.bos if model.add_bos else None
        ranking, proof = _texts(domains, out / "text", tokenizer, chunks=chunks, n_ctx=n_ctx, bos=bos)
        wanted = undominated(rungs, max_size=limits.max_size)
        key = hashlib.sha256(json.dumps([digest, *(text.sha256 for text in ranking.values())]).encode()).hexdigest()[
            :16
        ]
        measured = _measure(wanted, ranking, checkpoint, out, key, threads, tell)
    candidates = _candidates(measured, limits, policy)
    tried: list[str] = []
    report = None
    for one in candidates[:TRIES]:
        tried.append(one.kind)
        path = next(r.path for r in rungs if r.kind == one.kind)
        report = verify(
            checkpoint.directory,
            [path],
            policy=_policy(one.kind, limits, policy),
            out=out / "report",
            corpus=proof,
            chunks=2 * chunks * len(proof),
            n_ctx=n_ctx,
            threads=threads,
            converter=converter,
            work_dir=out / "files",
            progress=tell,
        )
        if report.verdict == "pass":
            return Choice(rungs, measured, one.kind, path, report, tried)
    return Choice(rungs, measured, None, None, report, tried)


def _make(
    kinds: Sequence[str],
    oracle: Oracle,
    source: Path,
    checkpoint: Checkpoint,
    digest: str,
    measured: Path,
    tell: Tell,
) -> list[Rung]:
    """Make each type's file and its weight error; an earlier error is read from the folder of the measurements."""
    origin, found = read_gguf(source), list[Rung]()
    for number, kind in enumerate(kinds):
        tell("quantising", number, len(kinds))
        path = oracle.of_type(source, kind, checkpoint.directory, digest)
        place = measured / f"{path.stem}-weights.json"
        one = _kept(place, Rung, path.stat().st_size)
        if one is None:
            one = rung(kind, path, origin)
            write_text(place, one.model_dump_json(indent=1) + "\n")
        found.append(one.model_copy(update={"path": path}))
    tell("quantising", len(kinds), len(kinds))
    return found


def _texts(
    domains: Sequence[Domain], folder: Path, tokenizer: Any, *, chunks: int, n_ctx: int, bos: int | None
) -> tuple[dict[str, Corpus], list[Path]]:
    """The ranking chunks of every domain, and the files of the proving halves; each text must be long enough."""
    ranking, proof = {}, []
    for number, domain in enumerate(domains):
        paths = [folder / f"{number}-{use}{domain.suffix}" for use in ("rank", "prove")]
        for path, text in zip(paths, domain.halves(), strict=True):
            write_text(path, text + "\n")
        ranking[domain.name] = read_corpus(paths[0], tokenizer, n_ctx=n_ctx, chunks=chunks, bos=bos)
        read_corpus(paths[1], tokenizer, n_ctx=n_ctx, chunks=2 * chunks, bos=bos)
        proof.append(paths[1])
    return ranking, proof


def _measure(
    rungs: Sequence[Rung],
    texts: Mapping[str, Corpus],
    checkpoint: Checkpoint,
    out: Path,
    key: str,
    threads: int | None,
    tell: Tell,
) -> list[Measured]:
    """Measure the files without a stored result; the checkpoint runs once, and only if a result is missing."""
    places = {r.kind: out / "measured" / f"{key}-{r.path.stem}.json" for r in rungs}
    kept = {r.kind: _kept(places[r.kind], Measured, r.bytes) for r in rungs}
    missing = [r for r in rungs if kept[r.kind] is None]
    if missing:
        passages = [passage for text in texts.values() for passage in passages_of(text.chunks)]
        reference = run_reference(load_hf(checkpoint.directory), passages, out, name="checkpoint", tell=tell)
        with reference.spool:
            for r in missing:
                stage = r.kind
                found = measure(
                    r.kind,
                    r.path,
                    r.weight_error,
                    texts,
                    reference,
                    threads=threads,
                    tell=lambda done, total, stage=stage: tell(stage, done, total),  # type: ignore[misc]
                )
                write_text(places[r.kind], found.model_dump_json(indent=1) + "\n")
                kept[r.kind] = found
    return [one for r in rungs if (one := kept[r.kind]) is not None]


def _kept(path: Path, kind: type[Kept], size: int) -> Kept | None:
    """A stored result for a file of exactly this size; None where it is absent or cannot be read."""
    try:
        found = kind.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError, ValueError):
        return None
    return found if found.bytes == size else None


def _candidates(measured: Sequence[Measured], limits: Limits, policy: Policy) -> list[Measured]:
    """The files that keep the limits, best first: by size, or by KLD where only a size is limited."""
    finite = [one for one in measured if one.macro.tokens and not one.macro.non_finite]
    bounds = {one.kind: limits.kld_of(one.kind, policy) for one in finite}
    if limits.max_kld is None and limits.max_size is not None and limits.policy is None:
        return sorted(finite, key=lambda one: one.macro.mean_kld)
    return [
        one for one in finite if (bound := bounds[one.kind]) is not None and one.macro.mean_kld_interval[1] <= bound
    ]


def _policy(kind: str, limits: Limits, policy: Policy) -> Policy:
    """The policy of the proof: the given policy, or with `max_kld` the same with that limit as the type's bound.

    With `max_kld`, or a type that the policy does not know, there is no bound on the top-1 share.
    """
    if limits.max_kld is None and kind in policy.quality:
        return policy
    raw = policy.model_dump(mode="json")
    bound = limits.max_kld if limits.max_kld is not None else 1e3
    raw["quality"] = {**raw["quality"], kind: {"mean_kld": bound, "top1": 0.0}}
    raw["cells"] = {kind: {"mean_kld": max(4 * bound, 0.05), "top1": 0.0}, **raw["cells"]}
    return make_policy(raw, source="--max-kld")
