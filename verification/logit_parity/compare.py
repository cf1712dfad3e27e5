"""The comparisons with inference: the reference runs once and its logits go to disk, then every file runs in turn.

At any time one Hugging Face model or one GGUF file is open, with a bounded number of logits in memory. A passage's
logits are stored once, from the first position that any comparison scores, and read back for every candidate and every
cell. Several processes share the passages: the process with the reference's logits of a passage measures the candidates
on this passage.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from so8t_core.errors import InputError
from so8t_core.files import sha256_path
from verification.engines import distributed
from verification.engines.huggingface import hf_rows, open_reference
from verification.engines.llama_logits import LlamaLogits
from verification.engines.llama_model import LlamaModel
from verification.engines.model_head import ModelHead
from verification.engines.positions import scored
from verification.engines.reconversion import Oracle
from verification.engines.streamed import StreamedModel
from verification.gate.check import divergence_checks
from verification.gate.report import CellResult, Check, Divergence
from verification.gguf.candidate import Candidate
from verification.logit_parity.hidden_store import HiddenSpool, gives_the_same
from verification.logit_parity.kl import DivergenceAccumulator, Floats, Ids
from verification.logit_parity.logit_store import LogitSpool, fits
from verification.logit_parity.run_modes import BLOCK, CHAT_LENGTH, Cell, Passage, Plan
from verification.logit_parity.text import BASE_CHUNKS, Corpus
from verification.logit_parity.text_checks import ALIGNED_ROWS, alignment

Tell = Callable[[str, int, int], None]
SAVED = "saved checkpoint"
MID = "mid"  # the cell of the corpus' chunks
SHARED = CHAT_LENGTH  # longest text, in tokens, that holds logits of its beginnings: a stretched RoPE begins later


def passages_of(chunks: Iterable[Ids]) -> list[Passage]:
    """The corpus' chunks, ids (n,) each, scored in their second half."""
    return [Passage(tokens, scored(len(tokens))[0]) for tokens in chunks]


@dataclass
class Reference:
    """The reference's logits: the spool, and the place of each passage in it."""

    spool: LogitSpool | HiddenSpool
    name: str
    _places: dict[bytes, tuple[int, int]] = field(default_factory=dict)  # tokens -> first row, first position
    _texts: dict[bytes, None] = field(
        default_factory=dict
    )  # texts of all processes: each process must find the same beginnings in them

    def __post_init__(self) -> None:
        self._texts = dict.fromkeys([*self._texts, *self._places])

    def read(self, passage: Passage, start: int, stop: int) -> Any:
        """Rows start .. stop-1 of a passage's scored positions, (rows, V) float32."""
        row, first = self._places[_key_of(passage, self._texts)]
        row += passage.first - first
        return self.spool.read(row + start, row + stop)

    def mine(self, passages: Sequence[Passage]) -> dict[int, Passage]:
        """The passages whose logits this process has: place in the list -> passage."""
        return {place: p for place, p in enumerate(passages) if _key_of(p, self._texts) in self._places}

    def add(self, passage: Passage, model: Any) -> None:
        """Run the model over a passage and keep its logits, or the hidden states that give these logits."""
        row = self.spool.rows
        if isinstance(self.spool, HiddenSpool):
            self.spool.keep(passage)
        else:
            for logits in hf_rows(model, passage.tokens, first=passage.first):
                self.spool.append(logits)
        self._places[passage.tokens.tobytes()] = (row, passage.first)


def distinct(groups: Iterable[Sequence[Passage]]) -> list[Passage]:
    """Each text once, from the first position that any group scores; a beginning of another text is part of that text.

    A causal model's logits at a position do not depend on later tokens.
    """
    found: dict[bytes, Passage] = {}
    for passage in sorted((p for group in groups for p in group), key=lambda p: -len(p.tokens)):
        key = _key_of(passage, found)
        if key not in found or passage.first < found[key].first:
            found[key] = replace(found.get(key, passage), first=passage.first)
    return list(found.values())


def _key_of(passage: Passage, texts: Mapping[bytes, object]) -> bytes:
    """The passage's key: its text, or a text in `texts` of at most `SHARED` tokens that begins with its text."""
    own = passage.tokens.tobytes()
    if own in texts:
        return own
    longest = SHARED * passage.tokens.itemsize
    return next((key for key in texts if len(own) < len(key) <= longest and key.startswith(own)), own)


def run_reference(
    model: Any, passages: Sequence[Passage], directory: Path, *, name: str, tell: Tell, stage: str = "reference"
) -> Reference:
    """Store the reference's logits of all passages, or of this process' share, on disk; close `.spool` when done.

    If the logits would be large, hidden states are kept instead; then only the model's head is usable afterwards.
    """
    vocab = int(model.config.get_text_config().vocab_size)
    texts = dict.fromkeys(p.tokens.tobytes() for p in passages)
    small = distributed.from_first(lambda: _keeps_hidden_states(model, passages, directory, vocab))
    shared = list(distributed.shared_out(passages).values())
    rows = sum(p.rows for p in shared)
    spool: LogitSpool | HiddenSpool = (
        HiddenSpool(directory, ModelHead(model), rows=rows, vocab=vocab)
        if small
        else LogitSpool(directory, rows=rows, vocab=vocab)
    )
    reference = Reference(spool, name, _texts=texts)
    try:
        ahead, weight = _layers_first(model, shared, partial(tell, stage))
        total = ahead + weight * len(shared)
        for number, passage in enumerate(shared):
            tell(stage, ahead + weight * number, total)
            reference.add(passage, model)
        if isinstance(spool, HiddenSpool):
            spool.done()
    except BaseException:
        spool.close()
        raise
    tell(stage, total, total)
    return reference


def _keeps_hidden_states(model: Any, passages: Sequence[Passage], directory: Path, vocab: int) -> bool:
    """Whether the logits would be large and hidden states give the same bits."""
    if fits(directory, rows=sum(p.rows for p in passages), vocab=vocab):
        return False
    return gives_the_same(model, min(passages, key=lambda p: len(p.tokens)))


def _layers_first(model: Any, passages: Sequence[Passage], tell: Callable[[int, int], None]) -> tuple[int, int]:
    """Run a streamed model's layers on the passages; returns (steps done, steps of the head for a passage)."""
    if not isinstance(model, StreamedModel) or not passages:
        return 0, 1
    units = model.head_units(sum(p.rows for p in passages), sum(len(p.tokens) for p in passages))
    weight, done = max(1, units // len(passages)), [0]

    def in_layers(now: int, layers: int) -> None:
        done[0] = layers
        tell(now, layers + weight * len(passages))

    model.prepare([p.tokens for p in passages], in_layers)
    return done[0], weight


def in_turn(
    passages: Sequence[Passage],
    reference: Reference,
    into: Sequence[DivergenceAccumulator],
    measure: Callable[[int, Passage], None],
) -> None:
    """Measure this process' passages; then give each of `into` the clusters of all passages, in order."""
    parts = {}
    for place, passage in reference.mine(passages).items():
        measure(place, passage)
        parts[place] = [total.take() for total in into]
    for everything in distributed.together(parts):
        for total, clusters in zip(into, everything, strict=True):
            total.extend(clusters)


def compare_rows(
    rows: Iterable[Any],
    reference: Reference,
    passage: Passage,
    into: DivergenceAccumulator,
    *,
    block: int | None = None,
    aligned: bool = True,
) -> float | None:
    """Add one passage of a candidate; every `block` rows are a cluster, None makes the whole passage one cluster.

    Returns:
        The `alignment` of the first rows; None for a single row or without `aligned`.

    Raises:
        InputError: the candidate gave more or fewer rows than are scored.
    """
    done, ratio = 0, None
    into.begin_chunk()
    for part in rows:
        own = reference.read(passage, done, done + len(part))
        if aligned and ratio is None and len(part) > 1:  # the first batch may end after one scored row
            ratio = alignment(own[:ALIGNED_ROWS], part[:ALIGNED_ROWS])
        start = 0
        while start < len(part):
            position = done + start
            if block and position and position % block == 0:
                into.begin_chunk()
            stop = min(len(part), start + block - position % block) if block else len(part)
            at = passage.first + position
            targets = passage.tokens[at + 1 : at + 1 + stop - start]
            into.add(own[start:stop], part[start:stop], targets, first_position=at)
            start = stop
        done += len(part)
    if done != passage.rows:
        raise InputError(f"{into.candidate} gave {done} rows where {passage.rows} positions are scored")
    return ratio


@dataclass(frozen=True)
class CorpusResult:
    """The results of one file on the corpus."""

    divergence: Divergence
    alignment: float | None
    chunk_klds: Floats  # (chunks, 2): sum of the KLDs and number of positions


@dataclass(frozen=True)
class FileResult(CorpusResult):
    """The results of one candidate on the corpus and in the cells."""

    cells: list[CellResult]


@dataclass(frozen=True)
class Subject:
    """A file to measure: its name in the report, its path or open model, and the seed of its bootstrap."""

    label: str
    file: Path | LlamaModel
    seed: str


def measure_corpus(
    files: Sequence[Subject],
    text: Corpus,
    reference: Reference,
    *,
    threads: int | None = None,
    tell: Callable[[int], None] = lambda chunks: None,
) -> dict[str, CorpusResult]:
    """Compare files with the reference on the corpus, for each chunk all files: a chunk's logits are read once.

    All files are open at once.

    Raises:
        InputError: a file has another vocabulary than the reference.
    """
    chunks, n_ctx = passages_of(text.chunks), len(text.chunks[0])
    totals = [_accumulator(reference, file.label, n_ctx, file.seed) for file in files]
    ratios: dict[int, list[float | None]] = {}
    with contextlib.ExitStack() as stack:
        engines = []
        for file in files:
            model = file.file if isinstance(file.file, LlamaModel) else stack.enter_context(LlamaModel(file.file))
            _same_vocabulary(file.label, model, reference)
            engines.append(stack.enter_context(LlamaLogits(model, n_ctx=n_ctx, threads=threads)))

        def measure(place: int, passage: Passage) -> None:
            tell(place)
            found = [
                compare_rows(
                    engine.rows(passage.tokens, first=passage.first), reference, passage, total, aligned=place == 0
                )
                for engine, total in zip(engines, totals, strict=True)
            ]
            if place == 0:
                ratios[place] = found

        in_turn(chunks, reference, totals, measure)
    shared = distributed.together(ratios)[0]
    return {
        file.label: CorpusResult(total.result(), ratio, total.chunk_klds())
        for file, total, ratio in zip(files, totals, shared, strict=True)
    }


def _same_vocabulary(label: str, model: LlamaModel, reference: Reference) -> None:
    if model.vocab_size != reference.spool.vocab:
        raise InputError(
            f"{label} gives {model.vocab_size} logits a token, the reference {reference.spool.vocab}: "
            "different vocabularies cannot be compared"
        )


def measure_file(
    label: str,
    path: Path,
    text: Corpus,
    reference: Reference,
    *,
    plan: Plan | None = None,
    seed: str,
    threads: int | None = None,
    tell: Tell,
    stage: str = "",
    corpus: CorpusResult | None = None,
) -> FileResult:
    """Compare one file with the reference on the corpus, then in every cell. The file is open only here.

    Args:
        corpus: the file's results on the corpus, if they were measured before.

    Raises:
        InputError: the file has another vocabulary than the reference.
    """
    chunks, cells = len(text.chunks), plan.cells if plan else []
    steps = chunks + len(cells)
    stage = stage or label
    measured, refused = dict[str, Divergence](), dict[str, str]()
    with LlamaModel(path) as model:
        subject = Subject(label, model, seed)
        own = (
            corpus
            or measure_corpus(
                [subject], text, reference, threads=threads, tell=lambda place: tell(stage, place, steps)
            )[label]
        )
        for number, cell in enumerate(cells):
            tell(stage, chunks + number, steps)
            if plan is not None and not (cell.why or cell.same_as or cell.after):
                together = [cell, *(other for other in cells if other.after == cell.name)]
                try:
                    measured |= _run_cells(together, label, model, plan, reference, seed, threads)
                except InputError as error:
                    if cell.flash is None:
                        raise
                    refused[cell.name] = str(error)  # the architecture has no such kernel
    results = [_mid(label, own.divergence)] if plan else []
    cells = [replace(cell, why=refused.get(cell.name, cell.why)) for cell in cells]
    results += [_cell_result(cell, label, measured.get(cell.same_as or cell.name)) for cell in cells]
    tell(stage, steps, steps)
    return FileResult(own.divergence, own.alignment, own.chunk_klds, results)


def _mid(label: str, divergence: Divergence) -> CellResult:
    setting = f"{divergence.chunks} x {divergence.n_ctx} tokens, the second half scored"
    return CellResult(
        cell=MID, title="The ladder's own chunks", candidate=label, setting=setting, divergence=divergence
    )


def _run_cells(
    cells: Sequence[Cell],
    label: str,
    model: LlamaModel,
    plan: Plan,
    reference: Reference,
    seed: str,
    threads: int | None,
) -> dict[str, Divergence]:
    """Run one cell and the cells that continue from its cache, in one context; returns cell name -> divergence."""
    first = cells[0]
    passages = plan.passages[first.passages]
    longest = max(len(p.tokens) for p in passages)
    totals = {cell.name: _accumulator(reference, label, longest, f"{cell.name} {seed}") for cell in cells}
    served: dict[str, Any] = {"n_ubatch": first.n_ubatch, "kv": first.kv, "flash": first.flash}
    with LlamaLogits(model, n_ctx=first.n_ctx or longest, threads=threads, **served) as engine:

        def measure(place: int, _: Passage) -> None:
            for cell in cells:
                passage = plan.passages[cell.passages][place]
                singly = len(passage.tokens) - cell.singly if cell.singly else None
                kept = singly or 0 if cell.after else 0
                rows = engine.rows(passage.tokens, first=passage.first, singly_from=singly, kept=kept)
                block = BLOCK if passage.rows >= 2 * BLOCK else None
                compare_rows(rows, reference, passage, totals[cell.name], block=block, aligned=False)

        in_turn(passages, reference, list(totals.values()), measure)
    return {name: total.result() for name, total in totals.items()}


def _cell_result(cell: Cell, label: str, divergence: Divergence | None) -> CellResult:
    return CellResult(
        cell=cell.name, title=cell.title, candidate=label, setting=cell.setting, why=cell.why, divergence=divergence
    )


def _accumulator(reference: Reference, label: str, n_ctx: int, seed: str) -> DivergenceAccumulator:
    return DivergenceAccumulator(
        reference=reference.name, candidate=label, n_ctx=n_ctx, vocab=reference.spool.vocab, seed=seed
    )


def saved_against(
    model: Any,
    text: Corpus,
    reference: Reference,
    *,
    name: str,
    seed: str,
    tell: Tell,
    stage: str,
    known: Sequence[Any] = (),
) -> Divergence:
    """Divergence of the saved checkpoint, whose logits are in the spool, from `model`, for example the bake in fp32.

    Args:
        known: the model's logits (T, V) of the first chunks, if they were computed before.
    """
    total = DivergenceAccumulator(
        reference=name, candidate=SAVED, n_ctx=len(text.chunks[0]), vocab=reference.spool.vocab, seed=seed
    )
    chunks = passages_of(text.chunks)
    if isinstance(model, StreamedModel):
        model.prepare([p.tokens for place, p in reference.mine(chunks).items() if place >= len(known)])

    def measure(place: int, passage: Passage) -> None:
        tell(stage, place, len(chunks))
        total.begin_chunk()
        done = 0
        own = [known[place]] if place < len(known) else hf_rows(model, passage.tokens, first=passage.first)
        for part in own:
            at = passage.first + done
            targets = passage.tokens[at + 1 : at + 1 + len(part)]
            total.add(part, reference.read(passage, done, done + len(part)), targets, first_position=at)
            done += len(part)

    in_turn(chunks, reference, [total], measure)
    tell(stage, len(chunks), len(chunks))
    return total.result()


def files_leg(candidate: Candidate, d: Divergence) -> list[Check]:
    """Checks of `convert` (float files) or `quality` (quantised files)."""
    return divergence_checks("convert" if candidate.file.is_float else "quality", d, subject=candidate.label)


def cell_checks(results: Sequence[CellResult], plan: Plan) -> list[Check]:
    """Mean KLD, top-1 and finiteness of every measured cell; cells that only inform have no checks."""
    notes: Mapping[str, str] = {cell.name: cell.note for cell in plan.cells}
    shown = {cell.name for cell in plan.cells if cell.informs}
    checks: list[Check] = []
    for result in results:
        if result.divergence is None or result.cell in shown:
            continue
        for check in divergence_checks(f"cells.{result.cell}", result.divergence, subject=result.candidate):
            note = notes.get(result.cell) or f"{result.setting}, {check.detail}".rstrip(", ")
            checks.append(check.model_copy(update={"title": f"{result.title}: {check.title}", "detail": note}))
    return checks


def base_damage_of(
    base: Path,
    files: Sequence[Candidate],
    oracle: Oracle,
    text: Corpus,
    directory: Path,
    *,
    seed: str,
    threads: int | None,
    tell: Tell,
    stream: bool | None = None,
) -> list[Divergence]:
    """How the same quantisation changes the base model on the first chunks of the text; information only."""
    kinds = list(dict.fromkeys(c.file.file_type for c in files if not c.file.is_float))
    if not kinds:
        return []

    def make() -> dict[str, Path]:
        digest = sha256_path(base)
        source = oracle.converted(base, digest)
        return {kind: oracle.of_type(source, kind, base, digest) for kind in kinds}

    paths = distributed.from_first(make)
    text = replace(text, chunks=text.chunks[:BASE_CHUNKS])
    chunks = passages_of(text.chunks)
    model = open_reference(base, stream=stream)
    reference = run_reference(model, chunks, directory, name="base", tell=tell, stage="base")
    with reference.spool:
        return [
            measure_file(
                kind, path, text, reference, seed=seed, threads=threads, tell=tell, stage=f"base {kind}"
            ).divergence
            for kind, path in paths.items()
        ]
