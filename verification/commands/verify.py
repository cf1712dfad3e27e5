"""`verify`: the whole ladder from the trained adapter to the shipped files, measured once and decided by the policy.

Cheap legs come first. Then the reference computes its logits once, onto disk, and is released; after it the bake, after
that every file in its turn: one model or one file is in memory at any time. What was measured (`stages`) and what
was decided (`decision.decide` sets every status) stay apart. Ctrl-C leaves a report of what was done, with verdict
incomplete.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from so8t_core.errors import InputError
from so8t_core.quantised import Quantization
from so8t_core.threads import torch_threads
from verification.commands.provenance import artefacts, changed_artefacts, imatrix_artefact, versions
from verification.commands.stages import Progress, Run, Settings, measure_all
from verification.engines import distributed
from verification.engines.llama_model import usable_cores
from verification.engines.reconversion import Oracle
from verification.gate.decide import LEG_TITLES, decide
from verification.gate.policy import Policy, load_policy
from verification.gate.report import AnswerRecord, Check, Leg, LegName, Report, TrainingRecord
from verification.gate.stored import clear_report
from verification.gguf.candidate import Candidate
from verification.gguf.reader import GGUFFile, read_gguf
from verification.logit_parity.run_modes import Level

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
    imatrix: str | Path | None = None,
    progress: Progress | None = None,
    work_dir: str | Path | None = None,
    training: TrainingRecord | None = None,
    answers: AnswerRecord | None = None,
    notes: Sequence[str] = (),
    quantization: Quantization | None = None,
) -> Report:
    """Verify GGUF files against the Hugging Face checkpoint they were made from.

    Called by every process of a launch: they share the passages out, the first one writes; all get the report.

    Args:
        reference: the saved (baked) checkpoint's directory.
        candidates: GGUF files; float files fill the leg `convert`, quantised ones `quantise` and `quality`.
        base, adapter: what the reference was baked from; both together add the legs `bake`, `dtype`, `controls`.
        policy: a policy, a file, or None for the default.
        out: directory for report.json, .html, .md, report.intoto.json and junit.xml; None writes nothing.
        corpus: text or JSONL to score; None is the built-in text.
        imatrix: the importance matrix that the quantised candidates were made with, GGUF or legacy form.
        cells: "quick" for every run, "full" adds the long texts; see `cells`.
        ship_n_ctx: the context the files are shipped for; None takes at most 4096 and never more than the original
            length of a stretched RoPE.
        base_damage: also measure what the same quantisation does to the base (information, never decided on).
        quantization: how the base was quantised while the adapter was trained; adds, as information, how far what was
            trained lies from what is shipped.
        work_dir: keeps the oracle's files between runs, named by the reference's digest; None uses a temporary one.

    Raises:
        InputError: an input that cannot be used; nothing is decided then.
        KeyboardInterrupt: after the report of what was done has been written.
    """
    if out is not None and distributed.is_first():
        clear_report(Path(out))
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
    run = Run(notes=list(notes))
    start = time.monotonic()
    if distributed.count() > 1:
        threads = threads or distributed.threads_each(usable_cores())
    interrupted = False
    report: Report | None = None
    with contextlib.ExitStack() as stack:
        work = Path(work_dir) if work_dir else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="so8t-")))
        stack.enter_context(torch_threads(threads))
        inputs = distributed.from_first(
            lambda: [
                *artefacts(reference, files, base=base, adapter=adapter, corpus=corpus, policy=policy),
                *imatrix_artefact(imatrix),
            ]
        )
        settings = Settings(
            reference, Path(base) if base else None, Path(adapter) if adapter else None, rules, corpus, chunks, n_ctx,
            threads, base_damage, cells, ship_n_ctx,
            Oracle(work, converter=converter, threads=threads, imatrix=imatrix), inputs[0].sha256,
            {a.label: a.sha256 for a in inputs if a.role == "candidate"},
            " ".join(a.sha256 for a in inputs if a.role == "corpus"), work, quantization,
        )  # fmt: skip
        try:
            measure_all(settings, files, run, tell)
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
            trained_function=run.trained,
            policy=rules.model_dump(mode="json"),
            tokens_sha256=run.tokens_sha256,
            versions=versions(converter),
            durations={stage: round(seconds, 3) for stage, seconds in run.durations.items()},
            notes=run.notes,
            training=training,
            answers=answers,
        )
        if not interrupted:
            _unchanged(report)
        report = decide(report, rules)
        if out is not None and distributed.is_first():
            from verification.show.write import write_report

            write_report(report, Path(out))
    if interrupted:
        raise KeyboardInterrupt
    return distributed.from_first(lambda: report)


def _unchanged(report: Report) -> None:
    """What was read minutes apart, by tensor and by llama.cpp, was one and the same file all the time.

    Raises:
        InputError: an input was replaced, changed or taken away meanwhile.
    """
    changed, absent = distributed.from_first(lambda: changed_artefacts(report))
    if changed or absent:
        raise InputError(
            f"{(changed + absent)[0]} {'changed' if changed else 'went away'} while it was being verified: the numbers "
            "belong to no one file. Verify again when nothing writes there."
        )


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
