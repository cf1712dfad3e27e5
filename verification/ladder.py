"""`verify`: the whole ladder from the trained adapter to the shipped files, measured once and decided by the policy.

The reference computes each chunk once in fp32 and every file is compared on it before the next chunk, so memory holds
one chunk. Cheap legs come first. What was measured and what was decided stay apart: legs are filled with values here,
`policy.decide` sets every status. Ctrl-C leaves a report of what was done, with verdict incomplete.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from so8t_core.errors import InputError
from so8t_core.files import explain_os_errors
from verification.corpus import Corpus, read_corpus
from verification.gguf_file import GGUFFile, read_gguf
from verification.legs_bake import bake_legs, base_control, dtype_name, saved_rounding
from verification.legs_file import Candidate, contract_checks, weight_checks
from verification.legs_logits import base_damage_of, files_leg, measure
from verification.legs_quantise import quantise_checks
from verification.llama_engine import LlamaModel
from verification.logits import load_hf
from verification.oracle import Oracle
from verification.policy import LEG_TITLES, Policy, decide, load_policy
from verification.provenance import artefacts, imatrix_artefact, versions
from verification.schema import AnswerRecord, Check, Divergence, Leg, LegName, Report, TensorRow, TrainingRecord
from verification.tensors import Checkpoint

Progress = Callable[[str, int, int], None]  # stage, done, total

_COMPARED: dict[LegName, str] = {
    "bake": "base + adapter vs baked weights, both fp32",
    "dtype": "baked in fp32 vs the saved checkpoint",
    "convert": "saved checkpoint (fp32) vs float GGUF",
    "quantise": "the reference re-quantised here vs the file's bytes",
    "quality": "saved checkpoint (fp32) vs quantised GGUF",
    "contract": "tokenizer, template, metadata and tensors vs the reference",
    "controls": "comparisons that must fail",
}


@dataclass
class _Run:
    """What has been measured so far."""

    checks: dict[LegName, list[Check]] = field(default_factory=dict)
    divergences: list[Divergence] = field(default_factory=list)
    base_divergences: list[Divergence] = field(default_factory=list)
    tensors: list[TensorRow] = field(default_factory=list)
    durations: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    planned: list[LegName] = field(default_factory=list)
    tokens_sha256: str = ""

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
    converter: str | Path | None = None,
    imatrix: str | Path | None = None,
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
        out: directory for report.json, .html, .md, report.intoto.json and junit.xml; None writes nothing.
        corpus: text or JSONL to score; None is the built-in text.
        imatrix: the importance matrix that the quantised candidates were made with, GGUF or legacy form.
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
        inputs += imatrix_artefact(imatrix)
        settings = _Settings(
            reference, Path(base) if base else None, Path(adapter) if adapter else None, rules, corpus, chunks, n_ctx,
            threads, base_damage, Oracle(work, converter=converter, threads=threads, imatrix=imatrix), inputs[0].sha256,
        )  # fmt: skip
        try:
            _measure_all(settings, files, run, tell)
        except KeyboardInterrupt:
            interrupted = True
            run.notes.append("Interrupted: only the legs shown were measured.")
            for leg in run.planned:
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
            tensors=run.tensors,
            policy=rules.model_dump(mode="json"),
            tokens_sha256=run.tokens_sha256,
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
        for name in ("report.json", "report.html", "report.md", "junit.xml", "report.intoto.json"):
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
    oracle: Oracle
    digest: str  # of the reference


def _measure_all(s: _Settings, files: list[Candidate], run: _Run, tell: Progress) -> None:
    run.planned = ["contract", "convert"]
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
        for number, candidate in enumerate(files):
            tell("files", number, len(files))
            twin = s.oracle.twin(candidate.file, s.reference, s.digest)
            run.add("contract", contract_checks(candidate, twin.file, checkpoint, tokenizer, s.reference))
            weights = weight_checks(candidate, twin.file, checkpoint)
            run.add("contract", weights.contract)
            run.add("convert", weights.convert)
            run.add("quantise", quantise_checks(candidate, twin))
            run.tensors += weights.rows
    run.planned = [leg for leg in run.planned if leg not in ("contract", "quantise")]
    text = read_corpus(s.corpus, tokenizer, n_ctx=s.n_ctx, chunks=s.chunks, bos=bos)
    run.tokens_sha256 = text.sha256
    model_ref = load_hf(s.reference)
    baked = _before_saving(s, text, model_ref, checkpoint, run, tell)
    with run.timed("logits"):
        measured = measure(
            model_ref,
            {c.label: c.file.path for c in files},
            text,
            baked=baked,
            threads=s.threads,
            tell=tell,
            reference="saved checkpoint",
        )
    if measured.saved is not None:
        run.add("dtype", _dtype_checks(measured.saved, checkpoint))
        run.divergences.append(measured.saved)
    for candidate in files:
        d = measured.files[candidate.label]
        run.divergences.append(d)
        run.add("convert" if candidate.file.is_float else "quality", files_leg(candidate, d))
    run.planned = []
    del model_ref, baked
    if s.base_damage and s.base is not None:
        with run.timed("base damage"):
            try:
                run.base_divergences = base_damage_of(s.base, files, s.oracle, text, threads=s.threads, tell=tell)
            except InputError as error:  # information only: what was decided stands without it
                run.notes.append(f"The base's own quantisation damage was not measured: {error}")


def _before_saving(
    s: _Settings, text: Corpus, reference: Any, checkpoint: Checkpoint, run: _Run, tell: Progress
) -> Any | None:
    """Legs `bake` and `controls`, and the weights' part of `dtype`; returns the fp32 bake when there is one."""
    if s.base is None:
        return None
    with run.timed("bake"):
        tell("bake", 0, 1)
        if s.adapter is None:
            run.add("controls", base_control(s.base, reference, text.chunks))
            return None
        result = bake_legs(s.base, s.adapter, text.chunks, max_abs_logit=s.policy.bake.max_abs_logit)
        run.add("bake", result.bake)
        run.add("controls", result.controls)
        worst, where = saved_rounding(result.baked, checkpoint)
        run.add(
            "dtype",
            [
                Check(
                    name="dtype.rounding",
                    title="Worst saved weight, in roundings of its type",
                    status="not evaluated",
                    value=worst,
                    detail=where,
                )
            ],
        )
        run.planned = [leg for leg in run.planned if leg not in ("bake", "controls")]
        return result.baked


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
