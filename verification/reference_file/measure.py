"""Compares one candidate's logits with a reference file: on the corpus, then in every recorded run mode.

Only the candidate runs. The reference file gives the passages, the scored positions and the run modes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from so8t_core.errors import InputError
from verification.engines.llama_logits import LlamaLogits
from verification.engines.llama_model import LlamaModel
from verification.engines.positions import joined
from verification.gate.check import divergence_checks
from verification.gate.report import CellResult, Check, Divergence
from verification.gguf.candidate import Candidate
from verification.logit_parity.run_modes import BLOCK, CACHE_LIMIT, cache_bytes
from verification.logit_parity.text_checks import ALIGNED_ROWS
from verification.reference_file.estimate import FileDivergence, Means, compare, lower_bound
from verification.reference_file.format import ReferenceFile
from verification.reference_file.header import Mode, Place

CORPUS, MID = "corpus", "mid"
# error of a float file's mean KLD, whose bound is 5e-5; with a larger error the samples cannot decide
LARGEST_SAMPLING_ERROR = 1e-5
Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Measured:
    """The measurements of one candidate."""

    divergence: Divergence
    means: Means
    alignment: float | None  # lower bound with a shift by one position, divided by that without a shift
    modes: list[CellResult]
    mode_errors: dict[str, float] = field(default_factory=dict)  # standard errors of the modes' means from the draws


def measure(candidate: Candidate, reference: ReferenceFile, *, seed: str, threads: int | None, tell: Tell) -> Measured:
    """Run a file over all recorded passages; the file is open only here.

    Raises:
        InputError: the file has another vocabulary than the reference.
    """
    header, label = reference.header, candidate.label
    with LlamaModel(candidate.file.path) as model:
        if model.vocab_size != header.vocab:
            raise InputError(
                f"{label} gives {model.vocab_size} logits a token, the reference {header.vocab}: different "
                "vocabularies cannot be compared"
            )
        chunks = header.groups[CORPUS]
        steps = len(chunks) + len(header.modes)
        total, ratio = _total(reference, label, header.n_ctx, seed), None
        with LlamaLogits(model, n_ctx=header.n_ctx, threads=threads) as engine:
            for number, place in enumerate(chunks):
                tell(number, steps)
                found = _passage(engine, reference, place, total)
                ratio = found if number == 0 else ratio
        divergence = total.result()
        setting = f"{divergence.chunks} x {header.n_ctx} tokens, the second half scored"
        modes = [
            CellResult(
                cell=MID, title="The ladder's own chunks", candidate=label, setting=setting, divergence=divergence
            )
        ]
        errors = dict[str, float]()
        for number, mode in enumerate(header.modes):
            tell(len(chunks) + number, steps)
            result, error = _mode(mode, candidate, model, reference, seed, threads)
            modes.append(result)
            errors[mode.name] = error
    tell(steps, steps)
    return Measured(divergence, total.means(), ratio, modes, errors)


def _total(reference: ReferenceFile, label: str, n_ctx: int, seed: str) -> FileDivergence:
    return FileDivergence(label, f"reference file of {reference.header.name}", n_ctx, reference.header.vocab, seed)


def _passage(
    engine: LlamaLogits,
    reference: ReferenceFile,
    place: Place,
    total: FileDivergence,
    *,
    singly: int = 0,
    block: int | None = None,
) -> float | None:
    """Add one passage, every `block` rows a cluster; returns the alignment of the first rows, None for a single row."""
    tokens, rows = reference.passage(place.passage), reference.rows_of(place.passage, place.first)
    from_ = len(tokens) - singly if singly else None
    logits = joined(list(engine.rows(tokens, first=place.first, singly_from=from_)))  # (T, V)
    targets = tokens[place.first + 1 :]
    step = block or len(rows)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        total.add(compare(rows[part], logits[part], targets[part]), first=place.first + start)
    count = min(len(rows), ALIGNED_ROWS)
    if count < 2:
        return None
    few, own = rows[0:count], logits[:count]
    shifted = min(lower_bound(few[0 : count - 1], own[1:]), lower_bound(few[1:count], own[:-1]))
    right = lower_bound(few, own)
    return shifted / (right if right != right else max(right, 1e-12))  # keeps a NaN; never divides by zero


def _mode(
    mode: Mode, candidate: Candidate, model: LlamaModel, reference: ReferenceFile, seed: str, threads: int | None
) -> tuple[CellResult, float]:
    """The result of one run mode, and the standard error of its mean KLD from the drawn tokens."""
    why = mode.why or _too_large(mode, candidate)
    divergence, error = None, 0.0
    if not why:
        places = reference.header.groups[mode.passages]
        longest = max(reference.header.passages[place.passage].length for place in places)
        total = _total(reference, candidate.label, longest, f"{mode.name} {seed}")
        with LlamaLogits(model, n_ctx=mode.n_ctx or longest, n_ubatch=mode.n_ubatch, threads=threads) as engine:
            for place in places:
                rows = reference.header.passages[place.passage].length - 1 - place.first
                block = BLOCK if rows >= 2 * BLOCK else None
                _passage(engine, reference, place, total, singly=mode.singly, block=block)
        divergence, error = total.result(), total.means().sampling_error
    result = CellResult(
        cell=mode.name,
        title=mode.title,
        candidate=candidate.label,
        setting=mode.setting,
        why=why,
        divergence=divergence,
    )
    return result, error


def _too_large(mode: Mode, candidate: Candidate) -> str:
    """Why a recorded context cannot be allocated for this file, or ""; the reference file may record any length."""
    names: Mapping[str, str] = {
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "hidden_size": "embedding_length",
        "num_hidden_layers": "block_count",
    }
    config = {name: found for name, key in names.items() if isinstance(found := candidate.file.get(key), int)}
    size = cache_bytes(config, mode.n_ctx)
    limit = CACHE_LIMIT >> 30
    return f"a cache of {mode.n_ctx} tokens takes {size / 2**30:.0f} GiB, {limit} at most" if size > CACHE_LIMIT else ""


def divergence_leg(candidate: Candidate, found: Measured) -> list[Check]:
    """Checks of `convert` (float files) or `quality` (quantised files), with the exact lower bound in the detail.

    A float file's KLD is not decided if the standard error from the drawn tokens exceeds both `LARGEST_SAMPLING_ERROR`
    and a fifth of the lower bound.
    """
    leg = "convert" if candidate.file.is_float else "quality"
    means = found.means
    said = f"exact lower bound {means.lower_bound:.3g}, error by the drawn tokens {means.sampling_error:.2g}"
    checks = divergence_checks(leg, found.divergence, subject=candidate.label)
    first = checks[0].model_copy(update={"detail": f"{checks[0].detail}; {said}"})
    unclear = means.sampling_error > max(LARGEST_SAMPLING_ERROR, means.lower_bound / 5)
    if candidate.file.is_float and unclear:
        words = f"needs the weights: {said}, above {LARGEST_SAMPLING_ERROR:g}; verify with --reference HF_DIR"
        first = first.model_copy(update={"value": None, "interval": None, "detail": words})
    return [first, *checks[1:]]


def mode_checks(found: Measured, reference: ReferenceFile) -> list[Check]:
    """Mean KLD, top-1 and finiteness of every measured run mode."""
    notes = {mode.name: mode.note for mode in reference.header.modes}
    checks: list[Check] = []
    for result in found.modes:
        if result.divergence is None:
            continue
        for check in divergence_checks(f"cells.{result.cell}", result.divergence, subject=result.candidate):
            note = notes.get(result.cell) or f"{result.setting}, {check.detail}".rstrip(", ")
            checks.append(check.model_copy(update={"title": f"{result.title}: {check.title}", "detail": note}))
    return checks
