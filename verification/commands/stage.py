"""One stage of a verification, and the execution of a list of stages.

A stage names the products it needs and the products it yields (attributes of `Run`), and the checks without which it is
incomplete. A deciding stage that fails ends the verification. A stage that only informs may fail in any way: the report
then says what was not evaluated and why. A product is released after the last stage that needs it, so that one model
is in memory at a time.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from so8t_core.errors import InputError
from verification.commands.request import Progress, VerifyRequest
from verification.engines import distributed
from verification.engines.reconversion import FloatFiles, Oracle
from verification.gate.check import not_evaluated
from verification.gate.decide import LEG_TITLES
from verification.gate.policy import Policy
from verification.gate.report import (
    Artefact,
    CellResult,
    Check,
    Divergence,
    LegName,
    NoiseRow,
    TensorRow,
    TrainedFunction,
)
from verification.gguf.candidate import Candidate
from verification.logit_parity.compare import CorpusResult, Reference
from verification.logit_parity.kl import Array, Floats
from verification.logit_parity.run_modes import Plan
from verification.logit_parity.text import Corpus
from verification.reference.checkpoint import Checkpoint
from verification.weight_parity.layer_output_error import OpenTensor


@dataclass
class Run:
    """One verification: the request, the products that stages pass to each other, and the measurements."""

    request: VerifyRequest
    policy: Policy
    inputs: list[Artefact]  # every input bound to its bytes, the reference first
    candidates: list[Candidate]
    oracle: Oracle
    work: Path
    threads: int | None
    tell: Progress
    base: Path | None = None  # also None if its logits cannot be compared with the reference's

    # products: made by the stage that yields them, released after the last stage that needs them
    checkpoint: Checkpoint = field(init=False)
    tokenizer: Any = field(init=False)
    conversions: FloatFiles = field(init=False)  # the verifier's own float files of the reference
    files: list[Candidate] = field(init=False)  # candidates, and the oracle's file if no candidate is a float file
    bos: int | None = field(init=False)
    text: Corpus = field(init=False)
    plan: Plan = field(init=False)
    reference: Reference = field(init=False)
    baked: Any = field(init=False)  # base + adapter, baked in fp32
    gated: Array = field(init=False)  # (T, V) logits of base + adapter on the first chunk
    baked_logits: list[Array] = field(init=False)  # (T, V) logits of the baked model on the first chunks

    # parts of the report
    checks: dict[LegName, list[Check]] = field(default_factory=dict)
    divergences: list[Divergence] = field(default_factory=list)
    base_divergences: list[Divergence] = field(default_factory=list)
    cells: list[CellResult] = field(default_factory=list)
    noise: list[NoiseRow] = field(default_factory=list)
    tensors: list[TensorRow] = field(default_factory=list)
    durations: dict[str, float] = field(default_factory=dict)  # seconds by stage
    notes: list[str] = field(default_factory=list)
    trained: TrainedFunction | None = None
    tokens_sha256: str = ""
    open: dict[str, dict[str, OpenTensor]] = field(default_factory=dict)  # by candidate: decided by layer outputs
    chunk_klds: dict[str, Floats] = field(default_factory=dict)  # by candidate: (chunks, 2), sums of KLDs and positions
    corpus: dict[str, CorpusResult] = field(default_factory=dict)  # by candidate: measured before that file's stage
    left: list[Stage] = field(default_factory=list)  # stages that are not finished

    @property
    def adapter(self) -> Path | None:
        return None if self.request.adapter is None else Path(self.request.adapter)

    @property
    def digest(self) -> str:
        """sha256 of the reference."""
        return self.inputs[0].sha256

    def seed(self, label: str) -> str:
        """The seed of the bootstrap: the digests of reference, candidate, corpus and token ids."""
        file = next((a.sha256 for a in self.inputs if a.role == "candidate" and a.label == label), label)
        corpus = " ".join(a.sha256 for a in self.inputs if a.role == "corpus")
        return f"{self.digest} {file} {corpus} {self.text.sha256}"

    def add(self, leg: LegName, checks: Sequence[Check]) -> None:
        """Keep the checks that a stage measured for a leg."""
        self.checks.setdefault(leg, []).extend(checks)

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the seconds of a stage."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.durations[stage] = self.durations.get(stage, 0.0) + time.monotonic() - start

    def has(self, product: str) -> bool:
        """Whether a product was made and not released yet."""
        return product in vars(self)

    def release(self, products: Sequence[str]) -> None:
        """Release products: delete the reference's logits from the disk, free the memory of a model."""
        for name in filter(self.has, products):
            if name == "reference":
                self.reference.spool.close()
            delattr(self, name)


@dataclass(frozen=True)
class Stage:
    """One stage of a verification."""

    name: str  # "reference", "logits Q8_0"; the report lists its seconds under this name
    work: Callable[[Run], None]
    needs: tuple[str, ...] = ()  # products of earlier stages
    yields: tuple[str, ...] = ()  # products of this stage
    checks: tuple[str, ...] = ()  # checks without which the stage is incomplete
    subject: str = ""  # the candidate that is checked
    informs: bool = False  # whether a report without this stage is complete

    @property
    def legs(self) -> list[LegName]:
        """Legs that the stage's checks belong to."""
        found = {name.split(".")[0] for name in self.checks}
        return [leg for leg in LEG_TITLES if leg in found]


def carry_out(stages: Sequence[Stage], run: Run) -> None:
    """Run the stages in their order; `run.left` lists the stages that are not finished.

    Raises:
        InputError: a deciding stage cannot use an input.
        Exception: any other error in a deciding stage.
        KeyboardInterrupt: between or inside stages; `run` holds the results of the finished stages.
    """
    check_order(stages)
    run.left = list(stages)
    try:
        for number, stage in enumerate(stages):
            _carry_out(stage, run)
            run.left = list(stages[number + 1 :])
            wanted = {name for later in run.left for name in later.needs}
            made = [name for earlier in stages[: number + 1] for name in earlier.yields]
            run.release([name for name in made if name not in wanted])
            gc.collect()  # a model's modules refer to each other: without this two models would be in memory
    finally:
        run.release([name for stage in stages for name in stage.yields])


def check_order(stages: Sequence[Stage]) -> None:
    """Check that each product is made before it is needed, and that no deciding stage needs one that only informs."""
    made: dict[str, Stage] = {}
    for stage in stages:
        for name in stage.needs:
            assert name in made, f"{stage.name} needs {name}, which no earlier stage yields"
            assert stage.informs or not made[name].informs, f"{stage.name} decides on what {made[name].name} informs of"
        made |= dict.fromkeys(stage.yields, stage)


def _carry_out(stage: Stage, run: Run) -> None:
    with run.timed(stage.name):
        try:
            if missing := [name for name in stage.needs if not run.has(name)]:  # an informing stage failed
                raise InputError(f"{missing[0]} was not made")
            stage.work(run)
        except Exception as error:
            # With several processes, the others would wait for ever for this process's part of the stage, unless every
            # process meets the same error. Only an InputError is known to come in every process.
            if not stage.informs or (distributed.count() > 1 and not isinstance(error, InputError)):
                raise
            why = not_evaluated(stage.name, error)
            run.notes.append(why)
            present = {(check.name, check.subject) for found in run.checks.values() for check in found}
            for name in stage.checks:
                if (name, stage.subject) not in present:
                    leg = next(leg for leg in stage.legs if name.startswith(f"{leg}."))
                    run.add(leg, [missing_check(name, why, subject=stage.subject)])


def missing_check(name: str, why: str, *, subject: str = "") -> Check:
    """A check that could not be made."""
    return Check(name=name, title=f"Stage that measures {name}", subject=subject, status="not evaluated", detail=why)
