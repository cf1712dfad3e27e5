"""`so8t verify --reference FILE.so8t`: the stages of a verification against a reference file, without the weights.

The report, its checks, the policy and the exit codes are the same as in every verification. The checks that need the
weights are not required; a note in the report lists them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from so8t_core.errors import InputError
from verification.commands.request import VerifyRequest
from verification.commands.stage import Run, Stage
from verification.engines import distributed
from verification.engines.sandbox import require_loadable
from verification.gate.decide import NEED_WEIGHTS, OF_EVERY_CELL, OF_EVERY_FILE
from verification.gate.report import Check
from verification.gguf.candidate import Candidate
from verification.logit_parity.engine_noise import noise_checks, noise_floor
from verification.logit_parity.run_modes import Passage
from verification.logit_parity.text import Corpus
from verification.logit_parity.text_checks import alignment_check, evidence_checks
from verification.reference_file.contract import contract_of
from verification.reference_file.format import ReferenceFile, read
from verification.reference_file.measure import CORPUS, divergence_leg, measure, mode_checks

FITTED = (
    "The KLD is an unbiased estimate: exact over the most likely tokens, sampled beyond them. Who knows this reference "
    "file could fit a GGUF file to its samples; the exact lower bound and the contract would still hold it."
)


def is_reference_file(request: VerifyRequest) -> bool:
    """Whether a verification is asked for against a reference file."""
    return Path(request.reference).is_file()


def file_stages(run: Run) -> list[Stage]:
    """The stages of a run against a reference file.

    Raises:
        InputError: the reference file is refused, or an option was given that is of use with the weights only.
    """
    _refuse_what_needs_weights(run.request)
    reference = read(run.request.reference)
    floats = [candidate.label for candidate in run.candidates if candidate.file.is_float]
    wanted = ("evidence.repeat", *(["evidence.noise_floor"] if floats else []))
    found = [Stage("inputs", partial(_inputs, reference), yields=("files", "text"))]
    for candidate in run.candidates:
        checks = (*OF_EVERY_FILE, "contract.tensor_statistics")
        work = partial(_file, reference, candidate)
        found.append(Stage("files", work, needs=("files",), checks=checks, subject=candidate.label))
    for candidate in run.candidates:
        leg = "convert" if candidate.file.is_float else "quality"
        values = (f"{leg}.mean_kld", f"{leg}.top1", f"{leg}.non_finite", *OF_EVERY_CELL, "evidence.alignment")
        work = partial(_logits, reference, candidate)
        needs = ("files", "text")
        found.append(Stage(f"logits {candidate.label}", work, needs=needs, checks=values, subject=candidate.label))
    texts = ("evidence.positions", "evidence.chunks", "evidence.entropy", "evidence.entropy_share")
    return [
        *found,
        Stage("noise floor", partial(_repeat, reference), needs=("files",), checks=wanted, informs=True),
        Stage("evidence", _evidence, needs=("files",), checks=texts),
    ]


def _refuse_what_needs_weights(request: VerifyRequest) -> None:
    given = {
        "--base": request.base,
        "--adapter": request.adapter,
        "--imatrix": request.imatrix,
        "--corpus": request.corpus,
    }
    if found := [name for name, value in given.items() if value is not None]:
        raise InputError(
            f"{found[0]} is of use with the weights only, but --reference {request.reference} is a reference file; "
            "give --reference HF_DIR, or leave it out"
        )
    if distributed.count() > 1:
        raise InputError("a reference file is measured by one process; start so8t without a launcher")


def _inputs(reference: ReferenceFile, run: Run) -> None:
    header = reference.header
    for candidate in run.candidates:
        tokens = len(candidate.file.metadata.get("tokenizer.ggml.tokens", []))
        if tokens != header.vocab:
            raise InputError(
                f"{candidate.file.path} has a vocabulary of {tokens} tokens, the reference {header.name} has "
                f"{header.vocab}: this is not a conversion of that reference"
            )
        require_loadable(candidate.file.path)
    run.files = list(run.candidates)
    chunks = tuple(reference.passage(place.passage) for place in header.groups[CORPUS])
    run.text = Corpus((), chunks, header.text_sha256)
    run.tokens_sha256 = header.text_sha256
    run.notes += [
        f"Held against a reference file of {header.name} (checkpoint sha256 {header.sha256[:12]}), without its "
        f"weights. Not checked, because they need the weights: {', '.join(NEED_WEIGHTS)}, and the legs bake, dtype and "
        "controls.",
        FITTED,
    ]


def _file(reference: ReferenceFile, candidate: Candidate, run: Run) -> None:
    run.tell("files", run.candidates.index(candidate), len(run.candidates))
    checks, rows = contract_of(candidate, reference)
    run.add("contract", checks)
    run.tensors += rows


def _logits(reference: ReferenceFile, candidate: Candidate, run: Run) -> None:
    label = candidate.label
    found = measure(
        candidate,
        reference,
        seed=run.seed(label),
        threads=run.threads,
        tell=lambda done, total: run.tell(label, done, total),
    )
    run.divergences.append(found.divergence)
    run.add("convert" if candidate.file.is_float else "quality", divergence_leg(candidate, found))
    run.cells += found.modes
    run.add("cells", mode_checks(found, reference))
    run.add("evidence", [alignment_check(found.alignment, label)])


def _repeat(reference: ReferenceFile, run: Run) -> None:
    """Repeat one file: a float file gives the noise floor and the repetition, a quantised file the repetition only."""
    file = next((f for f in run.files if f.file.is_float and f.file.file_type != "BF16"), None)
    file = file or next((f for f in run.files if f.file.is_float), run.files[0])
    places = reference.header.groups.get("plain") or reference.header.groups[CORPUS]
    passages = [Passage(reference.passage(place.passage), place.first) for place in places]
    run.noise = noise_floor(
        file.label,
        file.file.path,
        passages,
        threads=run.threads,
        tell=lambda done, total: run.tell("noise floor", done, total),
    )
    checks: list[Check] = noise_checks(run.noise)
    run.add("evidence", checks if file.file.is_float else [c for c in checks if c.name == "evidence.repeat"])


def _evidence(run: Run) -> None:
    run.add("evidence", evidence_checks(run.divergences[0]))
