"""`so8t run`: base, data, train, bake, convert, answers, verify as one resumable run.

Each step declares its settings, its inputs and its outputs; it runs when one of them has changed and is skipped
otherwise (see `manifest`). A step writes under temporary names and renames its files at the end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from pipeline.base_model import DEMO_NOTE, prepare_base
from pipeline.config import DEMO_MODEL, RunConfig
from pipeline.manifest import StepRecord, load_manifest, locked, save_manifest, versions
from pipeline.progress import Reporter, StageProgress
from pipeline.run.refuse import refuse_early
from so8t_core.errors import InputError
from so8t_core.files import atomic_dir, sha256_path, sweep, write_text
from verification.engines import distributed
from verification.engines.quantise import type_number
from verification.engines.threads import torch_threads
from verification.gate.policy import Policy, load_policy, make_policy
from verification.gate.report import AnswerRecord, Report, TrainingRecord

STEPS = ("base", "data", "train", "bake", "convert", "answers", "verify")
TOGETHER = ("train", "verify")  # all processes of a launch work on these steps; the first process does the others alone


@dataclass(frozen=True)
class Step:
    """One step: its settings, inputs and outputs, and the function that does its work."""

    settings: Callable[[RunConfig], dict[str, Any]]
    inputs: Callable[[Run], dict[str, Path]]  # label: path
    outputs: tuple[str, ...]  # relative to the run directory
    work: Callable[[Run], None]


class Run:
    """A run directory with its configuration and its paths."""

    def __init__(self, config: RunConfig, reporter: Reporter) -> None:
        self.config, self.reporter = config, reporter
        self.dir = Path(config.run_dir)
        self.data, self.adapter, self.baked = self.dir / "data", self.dir / "adapter", self.dir / "baked"
        self.gguf, self.report, self.work = self.dir / "gguf", self.dir / "report", self.dir / "work"
        self.base_dir = Path()  # set by the base step

    def execute(
        self, *, first: str | None = None, until: str | None = None, force: tuple[str, ...] = ()
    ) -> Report | None:
        """Run the steps that are not up to date, from `first` to `until`; returns the report when verify was reached.

        In a launch of several processes the first process decides and writes, and calls the others to the steps of
        `TOGETHER`; all return the same.

        Args:
            first: run this step and all later steps again, even if they are up to date.
            until: stop after this step.
            force: run these steps again.

        Raises:
            InputError: an unknown step, a missing input, or the error of a step.
        """
        check_steps(first, until, force)
        last = STEPS.index(until) if until else len(STEPS) - 1
        check_early(self.config, last)
        again = set(force) | (set(STEPS[STEPS.index(first) :]) if first else set())
        with torch_threads(self.config.threads):
            return self._execute(last, again)

    def _execute(self, last: int, again: set[str]) -> Report | None:
        if not distributed.is_first():
            return self._follow()
        with locked(self.dir):
            self._refuse_foreign()
            for folder in (self.dir, self.work, self.work / "oracle"):
                sweep(folder)
            resolved = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
            write_text(self.dir / "config.resolved.yaml", resolved)
            self.base_dir = prepare_base(self.config.model.base, self.dir / "base")
            if "train" not in load_manifest(self.dir).steps:
                reached = STEPS[: last + 1]
                refuse_early(self.config, self.base_dir, trains="train" in reached, converts="convert" in reached)
            for number, name in enumerate(STEPS[1 : last + 1], start=1):
                self._one(name, number, last, forced=name in again)
        report = self._stored_report() if last == len(STEPS) - 1 else None
        distributed.from_first(lambda: None)  # nothing more to do for the others
        return distributed.from_first(lambda: report)

    def _refuse_foreign(self) -> None:
        """Refuse a new run that would replace a directory of no run, as with `run_dir: .` beside a user's data."""
        if (self.dir / "config.resolved.yaml").exists():
            return
        for path in (self.data, self.adapter, self.baked, self.gguf):
            if path.is_dir() and any(path.iterdir()):
                raise InputError(f"{path} is of no run in {self.dir}, and would be replaced; choose another run_dir")

    def _follow(self) -> Report | None:
        """In every process but the first: do this process's share of the steps that the first process calls."""
        while (call := distributed.from_first(lambda: None)) is not None:
            name, self.base_dir = call
            WORK[name].work(self)
        report: Report | None = distributed.from_first(lambda: None)
        return report

    def _one(self, name: str, number: int, last: int, *, forced: bool) -> None:
        step = WORK[name]
        manifest = load_manifest(self.dir)
        settings = step.settings(self.config)
        inputs = {}
        for label, path in step.inputs(self).items():
            if not path.exists():
                raise InputError(f"step {name} needs {path}, which does not exist; run the steps before it first")
            inputs[label] = sha256_path(path)
        reason = "forced" if forced else manifest.why_stale(name, settings, inputs, self.dir)
        if reason is None:
            self.reporter.note(f"[{number}/{last}] {name}: up to date")
            return
        self.reporter.note(f"[{number}/{last}] {name}" + ("" if reason == "not done yet" else f": {reason}"))
        started = time.monotonic()
        if name in TOGETHER:
            distributed.from_first(lambda: (name, self.base_dir))
        step.work(self)
        manifest.steps[name] = StepRecord(
            key=settings,
            inputs=inputs,
            outputs={relative: sha256_path(self.dir / relative) for relative in step.outputs},
            seconds=round(time.monotonic() - started, 3),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            seed=self.config.seed,
            versions=versions(),
        )
        save_manifest(manifest, self.dir)

    def _stored_report(self) -> Report:
        from verification.gate.decide import decide
        from verification.show.write import load_report

        return decide(load_report(self.report / "report.json"))  # its values count, not its stored verdict


def _data(run: Run) -> None:
    from pipeline.data.build import build_dataset
    from pipeline.data.inputs import expected_rows
    from pipeline.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(run.base_dir)
    expected = expected_rows(run.config.data)
    with atomic_dir(run.data) as temporary, run.reporter.task("data rows", expected) as advance:
        build_dataset(run.config.data, tokenizer, temporary, run.config.seed, lambda n: advance(n))


def _train(run: Run) -> None:
    from pipeline.train.fit import train

    train(run.config, run.base_dir, run.data, run.adapter, run.work / "checkpoints", run.reporter)


def _bake(run: Run) -> None:
    from pipeline.release.stop_set import complete_stop_set
    from pipeline.tokenizer import load_tokenizer
    from so8t_core import bake_checkpoint

    dtype = getattr(torch, run.config.model.dtype) if run.config.model.dtype else None
    with run.reporter.task("baking, MB", 1) as advance:
        done = 0.0

        def progress(now: int, total: int) -> None:
            nonlocal done
            advance((now / max(total, 1)) - done, info=f"{now / 1e6:.0f} of {total / 1e6:.0f} MB")
            done = now / max(total, 1)

        bake_checkpoint(run.base_dir, run.adapter, run.baked, dtype=dtype, progress=progress)
    complete_stop_set(run.baked, load_tokenizer(run.baked))


def _convert(run: Run) -> None:
    from pipeline.release.gguf_files import convert_model

    convert_model(run.config, run.base_dir, run.baked, run.gguf, run.reporter)


def _answers(run: Run) -> None:
    from pipeline.data.jsonl import read_jsonl
    from pipeline.release.answers import compare_answers
    from pipeline.tokenizer import load_tokenizer
    from verification.engines.reconversion import Oracle

    settings = run.config.answers
    target = run.work / "answers.json"
    rows = [row for row in read_jsonl(run.data / "heldout.jsonl") if row.get("answer")][: settings.prompts]
    if not rows:
        write_text(target, "null\n")
        return
    after = [path for path in run.gguf.glob("*.gguf") if path.stem.endswith(f"-{settings.type.upper()}")]
    if not after:
        raise InputError(f"answers.type = {settings.type!r} is not among convert.types {run.config.convert.types}")
    oracle = Oracle(run.work / "oracle", converter=run.config.convert.converter, threads=run.config.threads)
    digest = sha256_path(run.base_dir)
    before = oracle.of_type(oracle.converted(run.base_dir, digest), settings.type.upper(), run.base_dir, digest)
    with run.reporter.task("answers before/after", 2 * len(rows)) as advance:
        record = compare_answers(
            rows,
            load_tokenizer(run.baked),
            before,
            after[0],
            before_name=f"{run.config.model.base} as {settings.type.upper()}",
            max_new_tokens=settings.max_new_tokens,
            parallel=settings.parallel,
            threads=run.config.threads,
            advance=lambda n: advance(n),
        )
    write_text(target, record.model_dump_json(indent=1) + "\n")


def _verify(run: Run) -> None:
    from pipeline.release.gguf_files import gguf_files, released_n_ctx
    from verification import verify
    from verification.logit_parity.text import DEFAULT_CORPUS

    settings = run.config.verify
    record = json.loads((run.work / "answers.json").read_text(encoding="utf-8"))
    with StageProgress(run.reporter) as progress:
        verify(
            run.baked,
            gguf_files(run.gguf),
            base=run.base_dir,
            adapter=run.adapter,
            policy=_policy(settings.policy),
            out=run.report,
            corpus=settings.corpus or [run.data / "heldout.jsonl", DEFAULT_CORPUS],
            chunks=settings.chunks,
            n_ctx=settings.n_ctx,
            threads=run.config.threads,
            base_damage=settings.base_damage,
            cells=settings.cells,
            ship_n_ctx=released_n_ctx(run.config, run.base_dir),
            converter=run.config.convert.converter,
            progress=progress,
            work_dir=run.work / "oracle",
            training=TrainingRecord.model_validate_json((run.adapter / "training.json").read_text(encoding="utf-8")),
            answers=AnswerRecord.model_validate(record) if record else None,
            notes=[DEMO_NOTE] if run.config.model.base == DEMO_MODEL else [],
            quantization=None if run.config.train.quantization == "none" else run.config.train.quantization,
        )
        if distributed.is_first():
            _write_reference(run, progress)


def _write_reference(run: Run, progress: StageProgress) -> None:
    """Write the release's reference file on the built-in text, so that it publishes no row of the data."""
    from pipeline.release.gguf_files import released_n_ctx
    from verification.commands.provenance import versions as versions_of_parts
    from verification.reference_file.make import write_reference

    settings = run.config.verify
    write_reference(
        run.baked,
        run.report / "reference.so8t",
        chunks=settings.chunks,
        n_ctx=settings.n_ctx,
        ship_n_ctx=released_n_ctx(run.config, run.base_dir),
        threads=run.config.threads,
        converter=run.config.convert.converter,
        work_dir=run.work / "oracle",
        versions=versions_of_parts(run.config.convert.converter),
        tell=progress,
    )


def check_steps(first: str | None, until: str | None, force: tuple[str, ...]) -> None:
    """Refuse a step that does not exist.

    Raises:
        InputError: an unknown step; the message lists all steps.
    """
    for name in (first, until, *force):
        if name is not None and name not in STEPS:
            raise InputError(f"unknown step {name!r}; the steps are {', '.join(STEPS)}")


def check_early(config: RunConfig, last: int) -> None:
    """Check the settings of the late steps before the long steps start.

    Raises:
        InputError: an unknown file type, answers from a type that is not made, an unreadable policy or corpus.
    """
    if last >= STEPS.index("convert"):
        kinds = [kind.upper() for kind in config.convert.types]
        for kind in kinds:
            type_number(kind)
        if config.answers.prompts and config.answers.type.upper() not in kinds:
            raise InputError(f"answers.type = {config.answers.type!r} is not among convert.types {kinds}")
    if last >= STEPS.index("verify"):
        _policy(config.verify.policy)
        if config.verify.corpus is not None and not Path(config.verify.corpus).is_file():
            raise InputError(f"verify.corpus = {config.verify.corpus!r} is not a file; leave it out for the default")


def _policy(given: str | dict[str, Any] | None) -> Policy:
    return make_policy(given, source="verify.policy") if isinstance(given, dict) else load_policy(given)


def _section(*names: str) -> Callable[[RunConfig], dict[str, Any]]:
    """The named sections of the configuration, as plain data, and the seed."""

    def pick(config: RunConfig) -> dict[str, Any]:
        full = config.model_dump(mode="json")
        return {name: full[name] for name in (*names, "seed")}

    return pick


def _data_inputs(run: Run) -> dict[str, Path]:
    from pipeline.data.inputs import data_inputs

    parts = ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja")  # rows are checked against all of them
    found = {name: run.base_dir / name for name in parts if (run.base_dir / name).is_file()}
    return {**found, **data_inputs(run.config.data)}


def _verify_inputs(run: Run) -> dict[str, Path]:
    found = {"base": run.base_dir, "data": run.data, "adapter": run.adapter, "baked": run.baked, "gguf": run.gguf}
    found["answers"] = run.work / "answers.json"
    settings = run.config.verify
    for label, path in (("policy", settings.policy), ("corpus", settings.corpus)):
        if isinstance(path, str):
            found[label] = Path(path)
    return found


WORK: dict[str, Step] = {
    "data": Step(_section("data"), _data_inputs, ("data",), _data),
    "train": Step(_section("train"), lambda run: {"base": run.base_dir, "data": run.data}, ("adapter",), _train),
    "bake": Step(_section("model"), lambda run: {"base": run.base_dir, "adapter": run.adapter}, ("baked",), _bake),
    "convert": Step(_section("convert"), lambda run: {"baked": run.baked}, ("gguf",), _convert),
    "answers": Step(
        _section("answers"),
        lambda run: {"base": run.base_dir, "data": run.data, "gguf": run.gguf},
        ("work/answers.json",),
        _answers,
    ),
    "verify": Step(_section("verify"), _verify_inputs, ("report/report.json", "report/reference.so8t"), _verify),
}
