"""`verify`: the whole ladder from the trained adapter to the shipped files, measured once and decided by the policy.

Cheap legs come first. Then the reference computes its logits once, onto disk, and is released; after it the bake, after
that every file in its turn: one model or one file is in memory at any time. What was measured and what was decided stay
apart: legs are filled with values here, `policy.decide` sets every status. Ctrl-C leaves a report of what was done,
with verdict incomplete.
"""

from __future__ import annotations

import contextlib
import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from so8t_core.errors import InputError
from so8t_core.files import explain_os_errors
from verification.cells import Level, Plan, plan_cells
from verification.checks import plain_check
from verification.corpus import Corpus, read_corpus
from verification.evidence import alignment_check, evidence_checks
from verification.gguf_file import GGUFFile, read_gguf
from verification.legs_bake import bake_leg, base_control, dtype_name, saved_rounding, transposed_control
from verification.legs_file import Candidate, contract_checks, weight_checks
from verification.legs_logits import (
    Reference,
    base_damage_of,
    cell_checks,
    distinct,
    files_leg,
    measure_file,
    passages_of,
    run_reference,
    saved_against_baked,
)
from verification.llama_engine import LlamaModel
from verification.logits import load_hf
from verification.noise import noise_checks, noise_floor
from verification.oracle import Oracle
from verification.policy import LEG_TITLES, Policy, decide, load_policy
from verification.provenance import artefacts, versions
from verification.schema import (
    AnswerRecord,
    CellResult,
    Check,
    Divergence,
    Leg,
    LegName,
    NoiseRow,
    Report,
    TensorRow,
    TrainingRecord,
)
from verification.tensors import Checkpoint
from verification.tokens import render_chats

Progress = Callable[[str, int, int], None]  # stage, done, total

_COMPARED: dict[LegName, str] = {
    "bake": "base + adapter vs baked weights, both fp32",
    "dtype": "baked in fp32 vs the saved checkpoint",
    "convert": "saved checkpoint (fp32) vs float GGUF",
    "quantise": "the reference re-quantised here vs the file's bytes",
    "quality": "saved checkpoint (fp32) vs quantised GGUF",
    "contract": "tokenizer, template, metadata and tensors vs the reference",
    "controls": "comparisons that must fail",
    "evidence": "the text, the evaluator and the engine themselves",
    "cells": "ways of running the file, each against the reference on the same tokens",
}


@dataclass
class _Run:
    """What has been measured so far."""

    checks: dict[LegName, list[Check]] = field(default_factory=dict)
    divergences: list[Divergence] = field(default_factory=list)
    base_divergences: list[Divergence] = field(default_factory=list)
    cells: list[CellResult] = field(default_factory=list)
    noise: list[NoiseRow] = field(default_factory=list)
    tensors: list[TensorRow] = field(default_factory=list)
    durations: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    planned: list[LegName] = field(default_factory=list)

    def add(self, leg: LegName, checks: Sequence[Check]) -> None:
        self.checks.setdefault(leg, []).extend(checks)

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.durations[stage] = self.durations.get(stage, 0.0) + time.monotonic() - start


def verify(
    reference: str | Path,
    candidates: Sequence[str | Path],
    *,
    base: str | Path | None = None,
    adapter: str | Path | None = None,
    policy: Policy | str | Path | None = None,
    out: str | Path | None = None,
    corpus: str | Path | Sequence[str | Path] | None = None,
    chunks: int = 12,
    n_ctx: int = 512,
    threads: int | None = None,
    base_damage: bool = True,
    cells: Level = "quick",
    ship_n_ctx: int | None = None,
    converter: str | Path | None = None,
    progress: Progress | None = None,
    work_dir: str | Path | None = None,
    training: TrainingRecord | None = None,
    answers: AnswerRecord | None = None,
    notes: Sequence[str] = (),
) -> Report:
    """Verify GGUF files against the Hugging Face checkpoint they were made from.

    Args:
        reference: the saved (baked) checkpoint's directory.
        candidates: GGUF files; float files fill the leg `convert`, quantised ones `quantise` and `quality`.
        base, adapter: what the reference was baked from; both together add the legs `bake`, `dtype`, `controls`.
        policy: a policy, a file, or None for the default.
        out: directory for report.json, .html, .md and junit.xml; None writes nothing.
        corpus: text or JSONL to score; None is the built-in text.
        cells: "quick" for every run, "full" adds the long texts; see `cells`.
        ship_n_ctx: the context the files are shipped for; None takes at most 4096 and never more than the original
            length of a stretched RoPE.
        base_damage: also measure what the same quantisation does to the base (information, never decided on).
        work_dir: keeps the oracle's files between runs, named by the reference's digest; None uses a temporary one.

    Raises:
        InputError: an input that cannot be used; nothing is decided then.
        KeyboardInterrupt: after the report of what was done has been written.
    """
    if out is not None:
        _clear(Path(out))
    rules = policy if isinstance(policy, Policy) else load_policy(policy)
    reference, files = Path(reference), _label([read_gguf(path) for path in candidates])
    if not files:
        raise InputError("no candidate file was given; name at least one GGUF file")
    if chunks < 2 or n_ctx < 64:
        raise InputError(f"chunks = {chunks} and n_ctx = {n_ctx} score too little to decide on; at least 2 and 64")
    if adapter is not None and base is None:
        raise InputError("an adapter was given without its base; give both or neither")
    if cells not in ("quick", "full"):
        raise InputError(f"cells = {cells!r} is unknown; quick or full")
    if ship_n_ctx is not None and ship_n_ctx < 64:
        raise InputError(f"ship_n_ctx = {ship_n_ctx} is too short for the cells; at least 64")
    tell: Progress = progress or (lambda stage, done, total: None)
    run = _Run(notes=list(notes))
    start = time.monotonic()
    before = torch.get_num_threads()
    interrupted = False
    report: Report | None = None
    with contextlib.ExitStack() as stack:
        work = Path(work_dir) if work_dir else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="so8t-")))
        stack.callback(torch.set_num_threads, before)
        torch.set_num_threads(threads or before)
        inputs = artefacts(reference, files, base=base, adapter=adapter, corpus=corpus, policy=policy)
        settings = _Settings(
            reference, Path(base) if base else None, Path(adapter) if adapter else None, rules, corpus, chunks, n_ctx,
            threads, base_damage, cells, ship_n_ctx, Oracle(work, converter=converter, threads=threads),
            inputs[0].sha256, {a.label: a.sha256 for a in inputs if a.role == "candidate"},
            " ".join(a.sha256 for a in inputs if a.role == "corpus"), work,
        )  # fmt: skip
        try:
            _measure_all(settings, files, run, tell)
        except KeyboardInterrupt:
            interrupted = True
            run.notes.append("Interrupted: only the legs shown were measured.")
            cut: list[LegName] = ["evidence"]  # whatever was cut off, even mere information: it is no whole run
            for leg in dict.fromkeys([*run.planned, *cut]):
                run.add(leg, [_interrupted(leg)])
        run.durations["total"] = time.monotonic() - start
        report = Report(
            verdict="incomplete",
            summary="",
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            artefacts=inputs,
            legs=[
                Leg(name=name, title=LEG_TITLES[name], compared=_COMPARED[name], status="not evaluated", checks=found)
                for name in LEG_TITLES
                if (found := run.checks.get(name))
            ],
            divergences=run.divergences,
            base_divergences=run.base_divergences,
            cells=run.cells,
            noise=run.noise,
            tensors=run.tensors,
            policy=rules.model_dump(mode="json"),
            versions=versions(),
            durations={stage: round(seconds, 3) for stage, seconds in run.durations.items()},
            notes=run.notes,
            training=training,
            answers=answers,
        )
        report = decide(report, rules)
        if out is not None:
            from verification.report import write_report

            write_report(report, Path(out))
    if interrupted:
        raise KeyboardInterrupt
    return report


def _clear(out: Path) -> None:
    """Take away an earlier report, so that a verification that cannot run never leaves another one's pass behind.

    A place that cannot hold the report is found here too, before the measuring and not after it.
    """
    with explain_os_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
        for name in ("report.json", "report.html", "report.md", "junit.xml"):
            (out / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class _Settings:
    reference: Path
    base: Path | None
    adapter: Path | None
    policy: Policy
    corpus: str | Path | Sequence[str | Path] | None
    chunks: int
    n_ctx: int
    threads: int | None
    base_damage: bool
    cells: Level
    ship_n_ctx: int | None
    oracle: Oracle
    digest: str  # of the reference
    file_digests: dict[str, str]  # by label
    corpus_digest: str
    work: Path

    def seed(self, label: str, text: Corpus) -> str:
        """What fixes the bootstrap: the digests of reference, candidate, corpus and token ids."""
        return f"{self.digest} {self.file_digests.get(label, label)} {self.corpus_digest} {text.sha256}"


def _measure_all(s: _Settings, files: list[Candidate], run: _Run, tell: Progress) -> None:
    run.planned = ["contract", "convert", "evidence", "cells"]
    run.planned += ["quantise", "quality"] if any(not c.file.is_float for c in files) else []
    run.planned += ["bake", "dtype", "controls"] if s.base and s.adapter else []
    checkpoint, tokenizer = Checkpoint(s.reference), load_tokenizer(s.reference)
    _same_vocabulary(checkpoint, files)
    with run.timed("oracle"):
        tell("oracle", 0, 1)
        source = s.oracle.converted(s.reference, s.digest)
    if not any(c.file.is_float for c in files):
        files = [Candidate("F16 (oracle)", read_gguf(source)), *files]
        run.notes.append("No float file was given: the verifier's own F16 conversion stands in the leg `convert`.")
    with LlamaModel(source, vocab_only=True) as model:
        bos = model.bos if model.add_bos else None
    with run.timed("files"):
        _files(s, files, source, checkpoint, tokenizer, run, tell)
    text = read_corpus(s.corpus, tokenizer, n_ctx=s.n_ctx, chunks=s.chunks, bos=bos)
    plan = _plan(s, text, checkpoint, tokenizer)
    chunks = passages_of(text.chunks)
    with run.timed("reference"):
        wanted = distinct([chunks, *plan.passages.values()])
        reference = run_reference(load_hf(s.reference), wanted, s.work, name="saved checkpoint", tell=tell)
        gc.collect()  # a model's modules refer to each other: without this it would stay beside the next one
    with reference.spool:
        _before_saving(s, text, reference, checkpoint, run, tell)
        for candidate in files:
            with run.timed(f"logits {candidate.label}"):
                _measure(s, candidate, text, plan, reference, run, tell)
        first = next(c for c in files if c.file.is_float)
        with run.timed("noise floor"):
            run.noise = noise_floor(
                first.label, first.file.path, plan.passages["plain"], threads=s.threads,
                tell=lambda done, total: tell("noise floor", done, total),
            )  # fmt: skip
            run.add("evidence", noise_checks(run.noise))
    run.add("evidence", evidence_checks(next(d for d in run.divergences if d.candidate == first.label)))
    run.planned = []
    if s.base_damage and s.base is not None:
        with run.timed("base damage"):
            try:
                run.base_divergences = base_damage_of(
                    s.base, files, s.oracle, text, s.work, seed=text.sha256, threads=s.threads, tell=tell
                )
            except InputError as error:  # information only: what was decided stands without it
                run.notes.append(f"The base's own quantisation damage was not measured: {error}")


def _files(
    s: _Settings, files: list[Candidate], source: Path, checkpoint: Checkpoint, tokenizer: Any, run: _Run,
    tell: Progress,
) -> None:  # fmt: skip
    """What needs no inference: legs `contract` and `quantise`, and the weights' part of `convert`."""
    for number, candidate in enumerate(files):
        tell("files", number, len(files))
        twin = read_gguf(s.oracle.of_type(source, candidate.file.file_type, s.reference, s.digest))
        run.add("contract", contract_checks(candidate, twin, checkpoint, tokenizer, s.reference))
        weights = weight_checks(candidate, twin, checkpoint)
        run.add("contract", weights.contract)
        run.add("convert", weights.convert)
        run.add("quantise", weights.quantise)
        run.tensors += weights.rows
    run.planned = [leg for leg in run.planned if leg not in ("contract", "quantise")]


def _plan(s: _Settings, text: Corpus, checkpoint: Checkpoint, tokenizer: Any) -> Plan:
    chats = [tokenizer(chat, add_special_tokens=False, verbose=False)["input_ids"] for chat in render_chats(tokenizer)]
    return plan_cells(
        s.cells, text.chunks, checkpoint.config, bos=tokenizer.bos_token_id, n_ctx=s.ship_n_ctx,
        chats=[np.asarray(ids, dtype=np.int64) for ids in chats],
    )  # fmt: skip


def _measure(
    s: _Settings, candidate: Candidate, text: Corpus, plan: Plan, reference: Reference, run: _Run, tell: Progress
) -> None:
    """One file's turn: legs `convert` or `quality`, `cells`, and its alignment."""
    label = candidate.label
    found = measure_file(
        label, candidate.file.path, text, reference, plan=plan, seed=s.seed(label, text), threads=s.threads, tell=tell
    )
    run.divergences.append(found.divergence)
    run.add("convert" if candidate.file.is_float else "quality", files_leg(candidate, found.divergence))
    run.cells += found.cells
    run.add("cells", cell_checks(found.cells, plan))
    run.add("evidence", [alignment_check(found.alignment, label)])


def _before_saving(
    s: _Settings, text: Corpus, reference: Reference, checkpoint: Checkpoint, run: _Run, tell: Progress
) -> None:
    """Legs `bake`, `dtype` and `controls`, as far as base and adapter were given."""
    if s.base is None:
        return
    first = passages_of(text.chunks)[0]
    with run.timed("bake"):
        tell("bake", 0, 1)
        if s.adapter is None:
            own = reference.read(first, 0, first.rows)
            run.add("controls", [base_control(s.base, own, first.tokens)])
            return
        bound = s.policy.bake.max_abs_logit
        result = bake_leg(s.base, s.adapter, text.chunks, max_abs_logit=bound)
        run.add("bake", result.bake)
        run.add("controls", result.controls)
        worst, where = saved_rounding(result.baked, checkpoint)
        run.add(
            "dtype",
            [plain_check("dtype.rounding", "Worst saved weight, in roundings of its type", worst, detail=where)],
        )
    with run.timed("saved precision"):
        saved = saved_against_baked(result.baked, text, reference, seed=s.seed("saved", text), tell=tell)
        run.add("dtype", _dtype_checks(saved, checkpoint))
        run.divergences.append(saved)
    gated = result.gated
    del result
    gc.collect()
    with run.timed("bake"):
        run.add("controls", [transposed_control(s.base, s.adapter, first.tokens, gated, max_abs_logit=bound)])
    gc.collect()
    run.planned = [leg for leg in run.planned if leg not in ("bake", "dtype", "controls")]


def _dtype_checks(d: Divergence, checkpoint: Checkpoint) -> list[Check]:
    kind = dtype_name(checkpoint)
    kld = Check(
        name=f"dtype.mean_kld.{kind}",
        title=f"Mean KL divergence of saving in {kind}",
        status="not evaluated",
        value=d.mean_kld if d.tokens else None,
        interval=d.mean_kld_interval if d.tokens else None,
        unit="nats",
        detail=f"{d.tokens} positions in {d.chunks} chunks",
    )
    finite = Check(
        name="dtype.non_finite",
        title="Positions with NaN or Inf",
        status="not evaluated",
        value=d.non_finite,
        bound=0,
        relation="<=",
    )
    return [kld, finite]


def _interrupted(leg: LegName) -> Check:
    return Check(name=f"{leg}.interrupted", title="Leg finished", status="not evaluated", detail="interrupted")


def _label(files: list[GGUFFile]) -> list[Candidate]:
    """Short unique names: the file type, with the file's name behind it where two share one."""
    types = [file.file_type for file in files]
    labels = [t if types.count(t) == 1 else f"{t} ({file.path.name})" for t, file in zip(types, files, strict=True)]
    if len({file.path.resolve() for file in files}) < len(files):
        raise InputError(f"the same candidate was given twice: {', '.join(labels)}")
    if len(set(labels)) < len(labels):
        raise InputError(f"two candidates have the same type and file name: {', '.join(labels)}; rename one of them")
    return [Candidate(label, file) for label, file in zip(labels, files, strict=True)]


def _same_vocabulary(checkpoint: Checkpoint, files: list[Candidate]) -> None:
    wanted = checkpoint.config.get("vocab_size")
    for candidate in files:
        found = len(candidate.file.metadata.get("tokenizer.ggml.tokens", []))
        if wanted is not None and found != wanted:
            raise InputError(
                f"{candidate.file.path} has a vocabulary of {found} tokens, the reference {checkpoint.directory} has "
                f"{wanted}: this is not a conversion of that reference"
            )


def load_tokenizer(directory: Path) -> Any:
    """The reference's own tokenizer.

    Raises:
        InputError: transformers cannot load it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"no usable tokenizer in {directory}: {' '.join(str(error).split())[:200]}") from None
