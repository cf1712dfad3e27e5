"""The legs in their order, measured: cheap ones first, one model or one file in memory at any time.

`Settings` is what was asked for, `Run` what has been measured so far; `measure_all` fills the one by the other and can
be cut off anywhere: what it finished stands in `Run`, what is left in `Run.planned`. Nothing is decided here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from so8t_core.errors import InputError
from so8t_core.quantised import Quantization
from verification.contract import chat
from verification.contract.checks import contract_checks
from verification.engines import distributed
from verification.engines.huggingface import load_hf
from verification.engines.llama_model import LlamaModel
from verification.engines.reconversion import Oracle
from verification.engines.sandbox import require_loadable
from verification.gate.check import plain_check, zero_check
from verification.gate.policy import Policy
from verification.gate.report import CellResult, Check, Divergence, LegName, NoiseRow, TensorRow, TrainedFunction
from verification.gguf.candidate import Candidate
from verification.gguf.reader import read_gguf
from verification.logit_parity.bake import bake_leg, base_control, dtype_name, saved_rounding, transposed_control
from verification.logit_parity.compare import (
    Reference,
    base_damage_of,
    cell_checks,
    distinct,
    files_leg,
    measure_file,
    passages_of,
    run_reference,
    saved_against,
)
from verification.logit_parity.engine_noise import noise_checks, noise_floor
from verification.logit_parity.quantised_base import trained_function
from verification.logit_parity.run_modes import Level, Plan, plan_cells
from verification.logit_parity.text import Corpus, read_corpus
from verification.logit_parity.text_checks import alignment_check, evidence_checks
from verification.reference.checkpoint import Checkpoint, read_config
from verification.reference.tokenizer import load_tokenizer
from verification.weight_parity.checks import output_check, weight_checks
from verification.weight_parity.compare import Sources, rotations
from verification.weight_parity.output import OpenTensor, output_ratios

Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass
class Run:
    """What has been measured so far, and the legs that are not finished."""

    checks: dict[LegName, list[Check]] = field(default_factory=dict)
    divergences: list[Divergence] = field(default_factory=list)
    base_divergences: list[Divergence] = field(default_factory=list)
    cells: list[CellResult] = field(default_factory=list)
    noise: list[NoiseRow] = field(default_factory=list)
    tensors: list[TensorRow] = field(default_factory=list)
    durations: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    planned: list[LegName] = field(default_factory=list)
    open: dict[str, dict[str, OpenTensor]] = field(default_factory=dict)  # by candidate: its layers' outputs decide
    trained: TrainedFunction | None = None
    tokens_sha256: str = ""

    def add(self, leg: LegName, checks: Sequence[Check]) -> None:
        """Keep what a leg measured."""
        self.checks.setdefault(leg, []).extend(checks)

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the seconds of a stage."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.durations[stage] = self.durations.get(stage, 0.0) + time.monotonic() - start


@dataclass(frozen=True)
class Settings:
    """What was asked for, and the digests that the measured values are bound to."""

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
    quantization: Quantization | None  # of the base in training

    def seed(self, label: str, text: Corpus) -> str:
        """What fixes the bootstrap: the digests of reference, candidate, corpus and token ids."""
        return f"{self.digest} {self.file_digests.get(label, label)} {self.corpus_digest} {text.sha256}"


def measure_all(s: Settings, files: list[Candidate], run: Run, tell: Progress) -> None:
    """Fill `run`.

    Raises:
        InputError: an input that cannot be used.
        KeyboardInterrupt: between or inside legs; `run` holds what was finished.
    """
    run.planned = ["contract", "convert", "evidence", "cells"]
    run.planned += ["quantise", "quality"] if any(not c.file.is_float for c in files) else []
    run.planned += ["bake", "dtype", "controls"] if s.base and s.adapter else []
    checkpoint, tokenizer = Checkpoint(s.reference), load_tokenizer(s.reference)
    same_vocabulary(checkpoint, files)
    alike = _comparable_base(s, checkpoint, run)
    for candidate in files if distributed.is_first() else []:
        require_loadable(candidate.file.path)
    with run.timed("oracle"):
        tell("oracle", 0, 1)
        source = distributed.from_first(lambda: s.oracle.converted(s.reference, s.digest))
        if not source.is_file():
            raise InputError(
                f"{source}, which process 0 made, is not here: set TMPDIR to a disk that all machines share"
            )
    if not any(c.file.is_float for c in files):
        files = [Candidate("F16 (oracle)", read_gguf(source)), *files]
        run.notes.append("No float file was given: the verifier's own F16 conversion stands in the leg `convert`.")
    with LlamaModel(source, vocab_only=True) as model:
        bos = model.bos if model.add_bos else None
    if distributed.is_first():
        with run.timed("files"):
            _files(s, files, source, checkpoint, tokenizer, run, tell)
    text = read_corpus(s.corpus, tokenizer, n_ctx=s.n_ctx, chunks=s.chunks, bos=bos)
    run.tokens_sha256 = text.sha256
    _outputs(s, text, run, tell)
    plan = _plan(s, text, checkpoint, tokenizer)
    chunks = passages_of(text.chunks)
    with run.timed("reference"):
        wanted = distinct([chunks, *plan.passages.values()])
        reference = run_reference(load_hf(s.reference), wanted, s.work, name="saved checkpoint", tell=tell)
        gc.collect()  # a model's modules refer to each other: without this it would stay beside the next one
    with reference.spool:
        _before_saving(alike, text, reference, checkpoint, run, tell)
        for candidate in files:
            with run.timed(f"logits {candidate.label}"):
                _measure(s, candidate, text, plan, reference, run, tell)
        # bfloat16 kernels round the activations too: where there is another float file, the floor is that one's
        first = min((c for c in files if c.file.is_float), key=lambda c: c.file.file_type == "BF16")
        with run.timed("noise floor"):
            run.noise = distributed.from_first(
                lambda: noise_floor(
                    first.label, first.file.path, plan.passages["plain"], threads=s.threads,
                    tell=lambda done, total: tell("noise floor", done, total),
                )
            )  # fmt: skip
            run.add("evidence", noise_checks(run.noise))
    run.add("evidence", evidence_checks(next(d for d in run.divergences if d.candidate == first.label)))
    run.planned = []
    if s.base_damage and alike.base is not None:
        with run.timed("base damage"):
            try:
                run.base_divergences = base_damage_of(
                    alike.base, files, s.oracle, text, s.work, seed=text.sha256, threads=s.threads, tell=tell
                )
            except InputError as error:  # information only: what was decided stands without it
                run.notes.append(f"The base's own quantisation damage was not measured: {error}")


def _comparable_base(s: Settings, checkpoint: Checkpoint, run: Run) -> Settings:
    """Without a base of another vocabulary, whose logits cannot be set beside the reference's.

    Raises:
        InputError: with an adapter, which never changes the vocabulary.
    """
    if s.base is None:
        return s
    base, own = (config.get("vocab_size") for config in (read_config(s.base), checkpoint.config))
    if base == own:
        return s
    differs = f"{s.base} has a vocabulary of {base} tokens, the reference {checkpoint.directory} has {own}"
    if s.adapter is not None:
        raise InputError(f"{differs}: the reference is no bake of that base")
    run.notes.append(f"The base was not compared with: {differs}.")
    return dataclasses.replace(s, base=None)


def _files(
    s: Settings, files: list[Candidate], source: Path, checkpoint: Checkpoint, tokenizer: Any, run: Run,
    tell: Progress,
) -> None:  # fmt: skip
    """What needs no inference: legs `contract` and `quantise`, and the weights' part of `convert`."""
    turned = rotations(s.adapter) if s.adapter else {}
    sources = Sources(checkpoint, Checkpoint(s.base) if s.base else None, turned)
    conversions = s.oracle.conversions(s.reference, s.digest)
    for number, candidate in enumerate(files):
        tell("files", number, len(files))
        oracle = conversions.file(candidate.file.file_type if candidate.file.is_float else "F16")
        assert oracle is not None  # every float type can be converted to
        run.add("contract", contract_checks(candidate, oracle, checkpoint, tokenizer, s.reference))
        weights = weight_checks(candidate, conversions, sources, importance=s.oracle.imatrix)
        run.add("contract", weights.contract)
        run.add("convert", weights.convert)
        run.add("quantise", weights.quantise)
        run.tensors += weights.rows
        run.notes += weights.notes
        if weights.open:
            run.open[candidate.label] = weights.open
    done = ("contract",) if run.open else ("contract", "quantise")
    run.planned = [leg for leg in run.planned if leg not in done]


def _outputs(s: Settings, text: Corpus, run: Run, tell: Progress) -> None:
    """The outputs of layers whose weights alone cannot be judged, on one passage; first process only, as `_files`."""
    if not run.open:
        return
    with run.timed("layer outputs"):
        tell("layer outputs", 0, 1)
        model = load_hf(s.reference)
        for label, tensors in run.open.items():
            run.add("quantise", [output_check(label, tensors, output_ratios(model, text.chunks[0], tensors))])
        del model
        gc.collect()
    run.planned = [leg for leg in run.planned if leg != "quantise"]


def _plan(s: Settings, text: Corpus, checkpoint: Checkpoint, tokenizer: Any) -> Plan:
    rendered = chat.fixtures(tokenizer)
    chats = [tokenizer(chat, add_special_tokens=False, verbose=False)["input_ids"] for chat in rendered]
    return plan_cells(
        s.cells, text.chunks, checkpoint.config, bos=tokenizer.bos_token_id, n_ctx=s.ship_n_ctx,
        chats=[np.asarray(ids, dtype=np.int64) for ids in chats],
    )  # fmt: skip


def _measure(
    s: Settings, candidate: Candidate, text: Corpus, plan: Plan, reference: Reference, run: Run, tell: Progress
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
    s: Settings, text: Corpus, reference: Reference, checkpoint: Checkpoint, run: Run, tell: Progress
) -> None:
    """Legs `bake`, `dtype` and `controls`, as far as base and adapter were given."""
    if s.base is None:
        return
    first = passages_of(text.chunks)[0]
    with run.timed("bake"):
        tell("bake", 0, 1)
        if s.adapter is None:
            if distributed.is_first():  # who has the first passage
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
        saved = saved_against(
            result.baked, text, reference, name="baked fp32", seed=s.seed("saved", text), tell=tell,
            stage="saved precision",
        )  # fmt: skip
        run.add("dtype", _dtype_checks(saved, checkpoint))
        run.divergences.append(saved)
    gated = result.gated
    del result
    gc.collect()
    if distributed.is_first():
        with run.timed("bake"):
            run.add("controls", [transposed_control(s.base, s.adapter, first.tokens, gated, max_abs_logit=bound)])
        gc.collect()
    if s.quantization is not None:
        with run.timed("trained function"):
            _trained(s, s.base, s.adapter, s.quantization, text, reference, run, tell)
        gc.collect()
    run.planned = [leg for leg in run.planned if leg not in ("bake", "dtype", "controls")]


def _trained(
    s: Settings, base: Path, adapter: Path, kind: Quantization, text: Corpus, reference: Reference, run: Run,
    tell: Progress,
) -> None:  # fmt: skip
    """What was trained beside what is shipped: information, so that what was decided stands without it."""
    try:
        run.trained = trained_function(base, adapter, kind, text, reference, seed=s.seed("trained", text), tell=tell)
    except InputError as error:
        run.notes.append(f"The function that was trained was not measured: {error}")


def _dtype_checks(d: Divergence, checkpoint: Checkpoint) -> list[Check]:
    kind = dtype_name(checkpoint)
    kld = plain_check(
        f"dtype.mean_kld.{kind}",
        f"Mean KL divergence of saving in {kind}",
        d.mean_kld if d.tokens else None,
        interval=d.mean_kld_interval if d.tokens else None,
        unit="nats",
        detail=f"{d.tokens} positions in {d.chunks} chunks",
    )
    return [kld, zero_check("dtype.non_finite", "Positions with NaN or Inf", d.non_finite)]


def same_vocabulary(checkpoint: Checkpoint, files: list[Candidate]) -> None:
    """Stop before any measuring where sizes of vocabularies differ.

    Raises:
        InputError: a file is no conversion of this reference.
    """
    wanted = checkpoint.config.get("vocab_size")
    for candidate in files:
        found = len(candidate.file.metadata.get("tokenizer.ggml.tokens", []))
        if wanted is not None and found != wanted:
            raise InputError(
                f"{candidate.file.path} has a vocabulary of {found} tokens, the reference {checkpoint.directory} has "
                f"{wanted}: this is not a conversion of that reference"
            )
