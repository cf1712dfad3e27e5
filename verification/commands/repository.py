"""A folder of GGUF files as the candidates of one verification, and the continuation of a run that was stopped.

Every file of a language model is a candidate; a set of shards is one candidate. Projectors, LoRAs and other kinds are
recognised by their keys and tensors, never by their names; the report has one line for each. The results of each stage
of one file are kept under `measured/` until the report is complete. A run that continues measures only the missing
results, and runs the reference only if one of them needs it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from so8t_core.errors import InputError
from so8t_core.files import write_text
from verification.commands.request import VerifyRequest
from verification.commands.stage import Run, Stage
from verification.gate.report import SCHEMA_VERSION, Leg, LegName, Report
from verification.gguf.kind import kind_of, require_logits
from verification.gguf.reader import GGUFFile, read_gguf
from verification.show.write import load_report, to_json

KEPT = "measured"


@dataclass(frozen=True)
class Found:
    """The files among the given candidates."""

    files: list[GGUFFile] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # one line for each file that is not a language model


def is_repository(request: VerifyRequest) -> bool:
    """Whether a folder was given as a candidate."""
    return any(Path(path).is_dir() for path in request.candidates)


def candidates_of(paths: Sequence[str | Path]) -> Found:
    """The files in a list of GGUF files and folders; folders are searched with all their subfolders.

    Raises:
        InputError: a file that is not a readable GGUF or not a language model, or a folder without a language model.
    """
    found = Found()
    for path in map(Path, paths):
        if not path.is_dir():
            file = read_gguf(path)
            require_logits(file)
            if not (file.parts and any(file.path == other.path for other in found.files)):  # another shard of the set
                found.files.append(file)
            continue
        before = len(found.files)
        read: set[Path] = set()
        for one in sorted(path.rglob("*.gguf")):
            if one not in read:
                file = read_gguf(one)
                read.update(shard.path for shard in file.shards)
                _sort(file, one.relative_to(path), found)
        if len(found.files) == before:
            raise InputError(f"{path} holds no GGUF file of a model; give a folder with .gguf files, or the files")
    return found


def _sort(file: GGUFFile, shown: Path, found: Found) -> None:
    kind = kind_of(file)
    if kind.has_logits:
        found.files.append(file)
    else:
        found.notes.append(f"{shown} is {kind.noun}, which has no logits to compare: it was not judged.")


def resumable(stages: Sequence[Stage], run: Run, folder: Path) -> list[Stage]:
    """The same stages; the results of a stage of one file are stored in `folder`, or read from there if they exist."""
    kept = [_kept(stage, run, folder) if stage.subject else stage for stage in stages]
    wanted: set[str] = set()
    needed = []
    for stage in reversed(kept):  # drop a stage whose products no stage needs any more (the reference)
        if not stage.yields or wanted.intersection(stage.yields) or stage.checks:
            needed.append(stage)
            wanted.update(stage.needs)
    return needed[::-1]


def _kept(stage: Stage, run: Run, folder: Path) -> Stage:
    path = folder / f"{_key(stage, run)}.json"
    if path.is_file():
        return replace(stage, work=partial(_restore, path), needs=())
    return replace(stage, work=partial(_measure, stage, path))


def _key(stage: Stage, run: Run) -> str:
    """Everything that a stage's result depends on."""
    asked = run.request
    settings = [asked.chunks, asked.n_ctx, asked.cells, asked.ship_n_ctx, asked.long_context, run.threads]
    inputs = [(a.role, a.sha256) for a in run.inputs if a.role not in ("candidate", "policy")]
    own = [a.sha256 for a in run.inputs if a.role == "candidate" and a.label == stage.subject]
    text = json.dumps([SCHEMA_VERSION, stage.name, stage.subject, settings, inputs, own])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _measure(stage: Stage, path: Path, run: Run) -> None:
    counts = {name: len(found) for name, found in run.checks.items()}
    lists = ("divergences", "cells", "tensors", "notes")
    before = {name: len(getattr(run, name)) for name in lists}
    stage.work(run)
    if stage.subject in run.open:  # the stage of layer outputs needs tensors that no report holds
        return
    checks = {name: found[counts.get(name, 0) :] for name, found in run.checks.items()}
    report = Report(
        verdict="incomplete",
        summary=f"{stage.name} of {stage.subject}",
        created="",
        artefacts=[],
        legs=[
            Leg(name=name, title="", compared="", status="not evaluated", checks=made)
            for name, made in checks.items()
            if made
        ],
        policy={},
        versions={},
        durations={},
        **{name: getattr(run, name)[before[name] :] for name in lists},
    )
    write_text(path, to_json(report))


def _restore(path: Path, run: Run) -> None:
    report = load_report(path)
    for leg in report.legs:
        name: LegName = leg.name
        run.add(name, leg.checks)
    run.divergences += report.divergences
    run.cells += report.cells
    run.tensors += report.tensors
    run.notes += report.notes


def forget(folder: Path) -> None:
    """Delete the kept results; called when the report is complete."""
    shutil.rmtree(folder, ignore_errors=True)
