"""`verify`: every comparison from the trained adapter to the shipped files, measured once and decided by the policy.

Cheap stages come first. Then the reference computes its logits once, stores them on disk, and is released. Then the
bake runs, then each file: one model or one file is in memory at any time. `stages` only measures; `gate.decide` sets
every status. Ctrl-C at any moment leaves a report of the finished measurements, with the verdict incomplete.
"""

from __future__ import annotations

import contextlib
import inspect
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import ParamSpec

from so8t_core.errors import InputError
from so8t_core.files import write_text
from verification.commands.interruption import Interruption
from verification.commands.provenance import artefacts, changed_artefacts, imatrix_artefact, versions
from verification.commands.reference_file import file_stages, is_reference_file
from verification.commands.repository import KEPT, candidates_of, forget, is_repository, resumable
from verification.commands.request import VerifyRequest
from verification.commands.stage import Run, carry_out
from verification.commands.stages import comparable_base, stages
from verification.engines import distributed
from verification.engines.llama_model import usable_cores
from verification.engines.reconversion import Oracle
from verification.engines.threads import torch_threads
from verification.gate.decide import LEG_TITLES, decide
from verification.gate.policy import Policy, load_policy
from verification.gate.report import Artefact, Check, Leg, LegName, Report
from verification.gate.stored import clear_report
from verification.gguf.candidate import Candidate
from verification.gguf.reader import GGUFFile

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


def verify_request(request: VerifyRequest) -> Report:
    """Verify GGUF files against the Hugging Face checkpoint they were made from.

    Every process of a launch calls this function. The processes share the passages, the first one writes the report,
    and all of them return it.

    Raises:
        InputError: an input that cannot be used; nothing is decided then.
        KeyboardInterrupt: after the report of the finished measurements has been written.
    """
    out = None if request.out is None else Path(request.out)
    if out is not None and distributed.is_first():
        clear_report(out)
    policy = request.policy if isinstance(request.policy, Policy) else load_policy(request.policy)
    request.check()
    found = candidates_of(request.candidates)
    candidates = _label(found.files)
    kept = out / KEPT if out is not None and is_repository(request) and distributed.count() == 1 else None
    threads, start = request.threads, time.monotonic()
    if distributed.count() > 1:
        threads = threads or distributed.threads_each(usable_cores())
    with contextlib.ExitStack() as stack:
        given = request.work_dir
        work = Path(given) if given else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="so8t-")))
        stack.enter_context(torch_threads(threads))
        run = Run(
            request,
            policy,
            distributed.from_first(lambda: _inputs(request, candidates)),
            candidates,
            Oracle(work, converter=request.converter, threads=threads, imatrix=request.imatrix),
            work,
            threads,
            request.progress or (lambda stage, done, total: None),
            base=None if request.base is None else Path(request.base),
            notes=[*request.notes, *found.notes],
        )
        if is_reference_file(request):
            wanted = file_stages(run)
        else:
            comparable_base(run)
            wanted = stages(run)
        if kept is not None:
            wanted = resumable(wanted, run, kept)
        with Interruption() as interruption:
            try:
                carry_out(wanted, run)
                _unchanged(run)
                interruption.held = True
            except KeyboardInterrupt:
                interruption.held = interruption.asked = True
            run.durations["total"] = time.monotonic() - start
            report = _finished(run, interruption, out if distributed.is_first() else None)
            if interruption.asked:
                raise KeyboardInterrupt
            if kept is not None:
                forget(kept)
    return distributed.from_first(lambda: report)


def _finished(run: Run, interruption: Interruption, out: Path | None) -> Report:
    """The decided report, written into `out`; never a pass if the run was asked to end, even during the writing."""
    interrupted = False
    while True:
        if interruption.asked and not interrupted:
            _interrupt(run)
            interrupted = True
        report = decide(_report(run), run.policy)
        if out is not None:
            from verification.show.model_card_table import model_card_table
            from verification.show.write import write_report

            write_report(report, out)
            if is_repository(run.request):
                write_text(out / "model_card.md", model_card_table(report))
        if interrupted or not interruption.asked:
            return report


def _interrupt(run: Run) -> None:
    """Mark the report as interrupted, even if only the last checks or the writing were interrupted."""
    part = "only the legs shown were measured" if run.left else "everything was measured, but not all of it checked"
    run.notes.append(f"Interrupted: {part}.")
    cut: list[LegName] = ["evidence"]
    for leg in dict.fromkeys([*(leg for stage in run.left for leg in stage.legs), *cut]):
        run.add(leg, [_interrupted(leg)])


P = ParamSpec("P")


def _with_parameters_of(request: Callable[P, VerifyRequest]) -> Callable[P, Report]:
    """`verify_request` with the fields of `VerifyRequest` as its arguments, so that they are listed in one place."""

    def verify(*arguments: P.args, **options: P.kwargs) -> Report:
        return verify_request(request(*arguments, **options))

    fields = inspect.signature(VerifyRequest).parameters.values()
    verify.__signature__ = inspect.Signature(list(fields), return_annotation="Report")  # type: ignore[attr-defined]
    parameters = str(inspect.getdoc(VerifyRequest)).partition("Args:")[2]
    verify.__doc__ = f"{inspect.getdoc(verify_request)}\n\nArgs:{parameters}"
    return verify


verify = _with_parameters_of(VerifyRequest)
"""Verify GGUF files against the checkpoint they were made from; the arguments are the fields of `VerifyRequest`."""


def _inputs(request: VerifyRequest, candidates: Sequence[Candidate]) -> list[Artefact]:
    """Every input bound to its bytes, the reference first."""
    found = artefacts(
        Path(request.reference),
        candidates,
        base=request.base,
        adapter=request.adapter,
        corpus=request.corpus,
        policy=request.policy,
    )
    return [*found, *imatrix_artefact(request.imatrix)]


def _report(run: Run) -> Report:
    """The measurements as a report, before anything is decided."""
    legs = [
        Leg(name=name, title=LEG_TITLES[name], compared=_COMPARED[name], status="not evaluated", checks=found)
        for name in LEG_TITLES
        if (found := run.checks.get(name))
    ]
    return Report(
        verdict="incomplete",
        summary="",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        artefacts=run.inputs,
        legs=legs,
        divergences=run.divergences,
        base_divergences=run.base_divergences,
        cells=run.cells,
        noise=run.noise,
        tensors=run.tensors,
        trained_function=run.trained,
        policy=run.policy.model_dump(mode="json"),
        tokens_sha256=run.tokens_sha256,
        versions=versions(run.request.converter),
        durations={stage: round(seconds, 3) for stage, seconds in run.durations.items()},
        notes=run.notes,
        training=run.request.training,
        answers=run.request.answers,
    )


def _unchanged(run: Run) -> None:
    """Check that no input changed between the tensor comparison and llama.cpp's reading, minutes later.

    Raises:
        InputError: an input was replaced, changed or deleted meanwhile.
    """
    changed, absent = distributed.from_first(lambda: changed_artefacts(run.inputs))
    if changed or absent:
        raise InputError(
            f"{(changed + absent)[0]} {'changed' if changed else 'went away'} while it was being verified: the numbers "
            "belong to no one file. Verify again when nothing writes there."
        )


def _interrupted(leg: LegName) -> Check:
    return Check(name=f"{leg}.interrupted", title="Leg finished", status="not evaluated", detail="interrupted")


def _label(files: list[GGUFFile]) -> list[Candidate]:
    """Short unique labels: the file type, followed by the file's name where two files have the same type."""
    types = [file.file_type for file in files]
    labels = [t if types.count(t) == 1 else f"{t} ({file.path.name})" for t, file in zip(types, files, strict=True)]
    if len({file.path.resolve() for file in files}) < len(files):
        raise InputError(f"the same candidate was given twice: {', '.join(labels)}")
    if len(set(labels)) < len(labels):
        raise InputError(f"two candidates have the same type and file name: {', '.join(labels)}; rename one of them")
    return [Candidate(label, file) for label, file in zip(labels, files, strict=True)]
