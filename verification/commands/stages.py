"""The stages of a verification in their order: checks without inference first, then one model or file at a time.

`stages` lists them for one run. A stage measures; the gate decides (`gate.decide`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from so8t_core.errors import InputError
from verification.commands.paired_outcome import paired_stage
from verification.commands.stage import Run, Stage
from verification.contract import chat
from verification.contract.checks import contract_checks
from verification.engines import distributed
from verification.engines.huggingface import float32_bytes, free_memory, open_reference
from verification.engines.llama_model import LlamaModel
from verification.engines.sandbox import require_loadable
from verification.engines.streamed import StreamedModel
from verification.gate.check import plain_check, zero_check
from verification.gate.decide import OF_EVERY_CELL, OF_EVERY_FILE
from verification.gate.report import Check, Divergence
from verification.gguf.candidate import Candidate
from verification.gguf.reader import read_gguf
from verification.logit_parity.bake import bake_leg, base_control, dtype_name, saved_rounding, transposed_control
from verification.logit_parity.compare import (
    Subject,
    base_damage_of,
    cell_checks,
    distinct,
    files_leg,
    measure_corpus,
    measure_file,
    passages_of,
    run_reference,
    saved_against,
)
from verification.logit_parity.engine_noise import noise_checks, noise_floor
from verification.logit_parity.quantised_base import trained_function
from verification.logit_parity.run_modes import plan_cells
from verification.logit_parity.text import read_corpus
from verification.logit_parity.text_checks import alignment_check, evidence_checks
from verification.reference.checkpoint import Checkpoint, read_config
from verification.reference.tokenizer import load_tokenizer
from verification.weight_parity.checks import output_checks, weight_checks
from verification.weight_parity.compare import Sources, rotations
from verification.weight_parity.layer_output_error import output_errors

T = TypeVar("T")
ORACLE_LABEL = "F16 (oracle)"  # the verifier's own conversion, where no float file was given
TOGETHER = 4  # files that are open at once where each reading computes the logits again
OPEN = ("quantise.output_error",)  # the check of tensors that their weights alone do not decide


def stages(run: Run) -> list[Stage]:
    """The stages of this run."""
    labels = {candidate.label: candidate.file.is_float for candidate in run.candidates}
    if not any(labels.values()):
        labels = {ORACLE_LABEL: True, **labels}
    found = [
        Stage("inputs", _inputs, yields=("checkpoint", "tokenizer")),
        Stage("oracle", _oracle, needs=("checkpoint",), yields=("conversions", "files", "bos")),
    ]
    found += [_file_stage(label, is_float=is_float) for label, is_float in labels.items()]
    found += [
        Stage("text", _text, needs=("checkpoint", "tokenizer", "bos"), yields=("text", "plan")),
        *([] if all(labels.values()) else [Stage("layer outputs", _layer_outputs, needs=("text",), checks=OPEN)]),
        Stage("reference", _reference, needs=("text", "plan"), yields=("reference",)),
    ]
    found += _bake_stages(run)
    found += [_logit_stage(label, is_float=is_float) for label, is_float in labels.items()]
    found += [paired_stage(label) for label, is_float in labels.items() if not is_float]
    found += [
        Stage(
            "noise floor",
            _noise_floor,
            needs=("files", "plan"),
            checks=("evidence.repeat", "evidence.noise_floor"),
            informs=True,
        ),
        Stage(
            "evidence",
            _evidence,
            needs=("files",),
            checks=("evidence.positions", "evidence.chunks", "evidence.entropy", "evidence.entropy_share"),
        ),
    ]
    if run.request.base_damage and run.base is not None:
        found.append(Stage("base damage", _base_damage, needs=("files", "text"), informs=True))
    return found


def _file_stage(label: str, *, is_float: bool) -> Stage:
    values = ("convert.rounding",) if is_float else ("quantise.tensors_differ", "quantise.unexplained")
    needs = ("checkpoint", "tokenizer", "conversions", "files")
    return Stage("files", partial(_file, label), needs=needs, checks=(*OF_EVERY_FILE, *values), subject=label)


def _logit_stage(label: str, *, is_float: bool) -> Stage:
    leg = "convert" if is_float else "quality"
    cells = () if label == ORACLE_LABEL else OF_EVERY_CELL
    values = (f"{leg}.mean_kld", f"{leg}.top1", f"{leg}.non_finite", *cells, "evidence.alignment")
    needs = ("files", "text", "plan", "reference")
    return Stage(f"logits {label}", partial(_logits, label), needs=needs, checks=values, subject=label)


def _bake_stages(run: Run) -> list[Stage]:
    """The stages from the trained adapter to the saved checkpoint, if a base and an adapter were given."""
    if run.base is None:
        return []
    if run.adapter is None:
        control = ("controls.differs_from_base",)
        return [Stage("bake", _base_control, needs=("text", "reference"), checks=control)]
    found = [
        Stage(
            "bake",
            _bake,
            needs=("checkpoint", "text"),
            yields=("baked", "gated", "baked_logits"),
            checks=("bake.max_abs_logit", "bake.top1_disagreements", "controls.differs_from_base", "dtype.rounding"),
        ),
        Stage(
            "saved precision",
            _saved_precision,
            needs=("baked", "baked_logits", "checkpoint", "text", "reference"),
            checks=("dtype.mean_kld", "dtype.non_finite"),
        ),
        Stage("transposed control", _transposed, needs=("gated", "text"), checks=("controls.transposed",)),
    ]
    if run.request.quantization is not None:
        found.append(Stage("trained function", _trained_function, needs=("text", "reference"), informs=True))
    return found


def _inputs(run: Run) -> None:
    run.checkpoint = Checkpoint(run.request.reference)
    run.tokenizer = load_tokenizer(run.checkpoint.directory)
    run.notes += [f"Reference: {note}." for note in run.checkpoint.notes]
    same_vocabulary(run.checkpoint, run.candidates)
    for candidate in run.candidates if distributed.is_first() else []:
        require_loadable(candidate.file.path)


def _oracle(run: Run) -> None:
    run.tell("oracle", 0, 1)
    source = distributed.from_first(lambda: run.oracle.converted(run.checkpoint.directory, run.digest))
    if not source.is_file():
        raise InputError(f"{source}, which process 0 made, is not here: set TMPDIR to a disk that all machines share")
    run.conversions, run.files = run.oracle.conversions(run.checkpoint.directory, run.digest), list(run.candidates)
    if not any(candidate.file.is_float for candidate in run.candidates):
        run.files.insert(0, Candidate(ORACLE_LABEL, read_gguf(source)))
        run.notes.append("No float file was given: the verifier's own F16 conversion stands in the leg `convert`.")
    with LlamaModel(source, vocab_only=True) as model:
        run.bos = model.bos if model.add_bos else None


def _file(label: str, run: Run) -> None:
    """The checks without inference: tokenizer, template, metadata, and every tensor's values and bytes."""
    if not distributed.is_first():
        return
    number, candidate = _numbered(label, run)
    run.tell("files", number, len(run.files))
    reference = run.checkpoint.directory
    turned = rotations(run.adapter) if run.adapter else {}
    sources = Sources(run.checkpoint, Checkpoint(run.base) if run.base else None, turned)
    oracle = _given(run.conversions.file(candidate.file.file_type if candidate.file.is_float else "F16"))
    run.add("contract", contract_checks(candidate, oracle, run.checkpoint, run.tokenizer, reference))
    weights = weight_checks(candidate, run.conversions, sources, importance=run.oracle.imatrix)
    run.add("contract", weights.contract)
    run.add("convert", weights.convert)
    run.add("quantise", weights.quantise)
    run.tensors += weights.rows
    run.notes += weights.notes
    if weights.open:
        run.open[label] = weights.open


def _text(run: Run) -> None:
    asked = run.request
    run.text = read_corpus(asked.corpus, run.tokenizer, n_ctx=asked.n_ctx, chunks=asked.chunks, bos=run.bos)
    run.tokens_sha256 = run.text.sha256
    rendered = chat.fixtures(run.tokenizer)
    ids = [run.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in rendered]
    run.plan = plan_cells(
        asked.cells,
        run.text.chunks,
        run.checkpoint.config,
        bos=run.tokenizer.bos_token_id,
        n_ctx=asked.ship_n_ctx,
        long_context=asked.long_context,
        chats=[np.asarray(chat_ids, dtype=np.int64) for chat_ids in ids],
    )


def _layer_outputs(run: Run) -> None:
    """Compare layer outputs on one passage, for tensors that their weights do not decide; first process only."""
    if run.open:
        run.tell("layer outputs", 0, 1)
        model = open_reference(run.request.reference, stream=run.request.stream)
        for label, tensors in run.open.items():
            run.add("quantise", output_checks(label, tensors, output_errors(model, run.text.chunks[0], tensors)))


def _reference(run: Run) -> None:
    wanted = distinct([passages_of(run.text.chunks), *run.plan.passages.values()])
    asked = run.request
    model = open_reference(asked.reference, stream=asked.stream, keep=run.work if asked.work_dir else None)
    if isinstance(model, StreamedModel):
        need, free = (size / 1e9 for size in (float32_bytes(asked.reference), free_memory()))
        because = "as was asked for" if asked.stream else f"{free:.1f} GB are free"
        run.notes.append(
            f"The reference was streamed, one decoder layer in memory at a time: its weights take {need:.1f} GB in "
            f"float32, {because}."
        )
    run.reference = run_reference(model, wanted, run.work, name="saved checkpoint", tell=run.tell)


def _base_control(run: Run) -> None:
    run.tell("bake", 0, 1)
    if run.base is not None and distributed.is_first():  # the first process has the first passage
        first = passages_of(run.text.chunks)[0]
        own = run.reference.read(first, 0, first.rows)
        run.add("controls", [base_control(run.base, own, first.tokens, stream=run.request.stream)])


def _given(what: T | None) -> T:
    """A value that is never None, because the stage that uses it is listed only where the value was given."""
    if what is None:
        raise RuntimeError("a stage was started without what puts it into the list")
    return what


def _bake(run: Run) -> None:
    base, adapter = _given(run.base), _given(run.adapter)
    run.tell("bake", 0, 1)
    bound, stream = run.policy.bake.max_abs_logit, run.request.stream
    result = bake_leg(base, adapter, run.text.chunks, max_abs_logit=bound, work=run.work, stream=stream)
    run.baked, run.gated, run.baked_logits = result.baked, result.gated, result.own
    run.add("bake", result.bake)
    run.add("controls", result.controls)
    worst, where = saved_rounding(result.baked, run.checkpoint)
    run.add(
        "dtype", [plain_check("dtype.rounding", "Worst saved weight, in roundings of its type", worst, detail=where)]
    )


def _saved_precision(run: Run) -> None:
    name, stage = "baked fp32", "saved precision"
    seed = run.seed("saved")
    known = run.baked_logits
    saved = saved_against(
        run.baked, run.text, run.reference, name=name, seed=seed, tell=run.tell, stage=stage, known=known
    )
    run.add("dtype", _dtype_checks(saved, run.checkpoint))
    run.divergences.append(saved)


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


def _transposed(run: Run) -> None:
    base, adapter = _given(run.base), _given(run.adapter)
    if distributed.is_first():
        bound, first = run.policy.bake.max_abs_logit, run.text.chunks[0]
        where: dict[str, Any] = {"work": run.work, "stream": run.request.stream}
        check = transposed_control(base, adapter, first, run.gated, max_abs_logit=bound, **where)
        run.add("controls", [check])


def _trained_function(run: Run) -> None:
    run.trained = trained_function(
        _given(run.base),
        _given(run.adapter),
        _given(run.request.quantization),
        run.text,
        run.reference,
        seed=run.seed("trained"),
        tell=run.tell,
    )


def _logits(label: str, run: Run) -> None:
    """Measure one file on the corpus, then in every cell; the oracle's file, which nobody ships, on the corpus only."""
    _, candidate = _numbered(label, run)
    if run.reference.spool.recomputes and label not in run.corpus:
        _together(label, run)
    found = measure_file(
        label,
        candidate.file.path,
        run.text,
        run.reference,
        plan=None if label == ORACLE_LABEL else run.plan,
        seed=run.seed(label),
        threads=run.threads,
        tell=run.tell,
        corpus=run.corpus.pop(label, None),
    )
    run.divergences.append(found.divergence)
    run.chunk_klds[label] = found.chunk_klds
    run.add("convert" if candidate.file.is_float else "quality", files_leg(candidate, found.divergence))
    run.cells += found.cells
    run.add("cells", cell_checks(found.cells, run.plan))
    run.add("evidence", [alignment_check(found.alignment, label)])


def _together(label: str, run: Run) -> None:
    """Measure this file and the next ones on the corpus together: each chunk's logits are computed once for all."""
    waiting = [s.subject for s in run.left if s.name == f"logits {s.subject}" and "reference" in s.needs]
    files = [next(file for file in run.files if file.label == name) for name in waiting[:TOGETHER]]
    subjects = [Subject(file.label, file.file.path, run.seed(file.label)) for file in files]
    chunks = len(run.text.chunks)
    run.corpus |= measure_corpus(
        subjects, run.text, run.reference, threads=run.threads, tell=lambda place: run.tell(label, place, chunks)
    )


def _noise_floor(run: Run) -> None:
    file = _floor_file(run.files)
    run.noise = distributed.from_first(
        lambda: noise_floor(
            file.label,
            file.file.path,
            run.plan.passages["plain"],
            threads=run.threads,
            tell=lambda done, total: run.tell("noise floor", done, total),
        )
    )
    run.add("evidence", noise_checks(run.noise))


def _evidence(run: Run) -> None:
    label = _floor_file(run.files).label
    run.add("evidence", evidence_checks(next(d for d in run.divergences if d.candidate == label)))


def _base_damage(run: Run) -> None:
    run.base_divergences = base_damage_of(
        _given(run.base),
        run.files,
        run.oracle,
        run.text,
        run.work,
        seed=run.text.sha256,
        threads=run.threads,
        tell=run.tell,
        stream=run.request.stream,
    )


def _numbered(label: str, run: Run) -> tuple[int, Candidate]:
    return next((number, file) for number, file in enumerate(run.files) if file.label == label)


def _floor_file(files: Sequence[Candidate]) -> Candidate:
    """The float file that measures the noise floor and the evidence of the text.

    bfloat16 kernels round the activations too, so a file of another float type is preferred.
    """
    return min((file for file in files if file.file.is_float), key=lambda file: file.file.file_type == "BF16")


def comparable_base(run: Run) -> None:
    """Drop a base with another vocabulary: its logits cannot be compared with the reference's.

    Raises:
        InputError: an adapter was given too: an adapter never changes the vocabulary.
    """
    if run.base is None:
        return
    reference = run.request.reference
    base, own = (read_config(directory).get("vocab_size") for directory in (run.base, Checkpoint(reference).directory))
    if base == own:
        return
    differs = f"{run.base} has a vocabulary of {base} tokens, the reference {reference} has {own}"
    if run.adapter is not None:
        raise InputError(f"{differs}: the reference is no bake of that base")
    run.notes.append(f"The base was not compared with: {differs}.")
    run.base = None


def same_vocabulary(checkpoint: Checkpoint, files: Sequence[Candidate]) -> None:
    """Stop before any measurement if sizes of vocabularies differ.

    Raises:
        InputError: a file is not a conversion of this reference.
    """
    wanted = checkpoint.config.get("vocab_size")
    for candidate in files:
        found = len(candidate.file.metadata.get("tokenizer.ggml.tokens", []))
        if wanted is not None and found != wanted:
            raise InputError(
                f"{candidate.file.path} has a vocabulary of {found} tokens, the reference {checkpoint.directory} has "
                f"{wanted}: this is not a conversion of that reference"
            )
