"""`so8t reference`: makes a checkpoint's reference file, from one pass over the text and the run modes.

The built-in text is scored unless another text is given: the file publishes the scored tokens.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from so8t_core.files import sha256_path
from verification.contract.chat import fixtures
from verification.engines.huggingface import hf_rows, load_hf
from verification.engines.llama_model import LlamaModel
from verification.engines.reconversion import Oracle
from verification.engines.threads import torch_threads
from verification.gguf.reader import read_gguf
from verification.logit_parity.compare import passages_of
from verification.logit_parity.run_modes import Cell, Level, Passage, Plan, plan_cells
from verification.logit_parity.text import read_corpus
from verification.reference.checkpoint import Checkpoint
from verification.reference.tokenizer import load_tokenizer
from verification.reference_file.format import ReferenceFile, Rows, write
from verification.reference_file.header import SAMPLES, SKETCH, TOP, Header, Mode, PassageRecord, Place
from verification.reference_file.measure import CORPUS
from verification.reference_file.record import (
    chat_records,
    expected_record,
    metadata_record,
    stops_of,
    tensor_records,
    tokenizer_record,
)
from verification.reference_file.rows import compressed, joined

Tell = Callable[[str, int, int], None]


def write_reference(
    directory: str | Path,
    out: str | Path,
    *,
    corpus: str | Path | Sequence[str | Path] | None = None,
    chunks: int = 12,
    n_ctx: int = 512,
    level: Level = "quick",
    ship_n_ctx: int | None = None,
    long_context: int | None = None,
    threads: int | None = None,
    converter: str | Path | None = None,
    work_dir: str | Path | None = None,
    versions: dict[str, str] | None = None,
    tell: Tell = lambda stage, done, total: None,
) -> ReferenceFile:
    """Make a checkpoint's reference file; the arguments are those of a verification.

    Args:
        versions: versions of the parts that make the file, by part.
        work_dir: directory that keeps the conversion; None takes a temporary directory.

    Raises:
        InputError: a checkpoint or text that cannot be used, logits that are not finite, or `out` cannot be written.
    """
    checkpoint = Checkpoint(directory)
    tokenizer = load_tokenizer(checkpoint.directory)
    digest = sha256_path(checkpoint.directory)
    with tempfile.TemporaryDirectory(prefix="so8t-") as scratch, torch_threads(threads):
        oracle = Oracle(Path(work_dir or scratch), converter=converter, threads=threads)
        tell("oracle", 0, 1)
        source = read_gguf(oracle.converted(checkpoint.directory, digest))
        with LlamaModel(source.path, vocab_only=True) as model:
            bos = model.bos if model.add_bos else None
            vocab = model.vocab_size
        tensors, norms, sketches = tensor_records(source, lambda done, total: tell("tensors", done, total))
        text = read_corpus(corpus, tokenizer, n_ctx=n_ctx, chunks=chunks, bos=bos)
        rendered = fixtures(tokenizer)
        chats = [tokenizer(chat, add_special_tokens=False, verbose=False)["input_ids"] for chat in rendered]
        plan = plan_cells(
            level,
            text.chunks,
            checkpoint.config,
            bos=tokenizer.bos_token_id,
            n_ctx=ship_n_ctx,
            long_context=long_context,
            chats=[np.asarray(ids, dtype=np.int64) for ids in chats],
        )
        corpus_passages = passages_of(text.chunks)
        passages = _distinct([*corpus_passages, *(p for group in plan.passages.values() for p in group)])
        header = Header(
            name=checkpoint.directory.resolve().name[:200],
            sha256=digest,
            versions={key[:200]: value[:200] for key, value in (versions or {}).items()},
            vocab=vocab,
            top=min(TOP, vocab),
            samples=SAMPLES,
            sketch=SKETCH,
            n_ctx=n_ctx,
            text_sha256=text.sha256,
            passages=[PassageRecord(length=len(p.tokens), first=p.first) for p in passages],
            groups=_groups(passages, plan, corpus_passages),
            modes=[_mode(cell) for cell in plan.cells],
            architecture=source.architecture,
            metadata=metadata_record(source),
            expected=expected_record(checkpoint.config, source.architecture),
            tokenizer=tokenizer_record(tokenizer, stops_of(checkpoint.directory, tokenizer)),
            chats=chat_records(tokenizer),
            tensors=tensors,
        )
        rows = _rows(checkpoint.directory, passages, header, tell)
    tokens = np.concatenate([p.tokens for p in passages]).astype("<u4")
    file = ReferenceFile(header, tokens, rows, norms, sketches)
    write(file, Path(out))
    return file


def _mode(cell: Cell) -> Mode:
    """The record of a run mode; each mode runs separately, so fields on shared runs are left out."""
    return Mode(**{name: value for name, value in asdict(cell).items() if name in Mode.model_fields})


def _distinct(passages: Sequence[Passage]) -> list[Passage]:
    """Each text once, whole, from the first position that any group scores."""
    found: dict[bytes, Passage] = {}
    for passage in passages:
        key = passage.tokens.tobytes()
        if key not in found or passage.first < found[key].first:
            found[key] = passage
    return list(found.values())


def _groups(passages: Sequence[Passage], plan: Plan, corpus: Sequence[Passage]) -> dict[str, list[Place]]:
    place = {passage.tokens.tobytes(): number for number, passage in enumerate(passages)}
    sets = {CORPUS: corpus, **plan.passages}
    return {
        name: [Place(passage=place[p.tokens.tobytes()], first=p.first) for p in group] for name, group in sets.items()
    }


def _rows(directory: Path, passages: Sequence[Passage], header: Header, tell: Tell) -> Rows:
    """Run every passage through the checkpoint in fp32; digest and tokens seed the draws, so they are repeatable."""
    model, parts = load_hf(directory), list[Rows]()
    for number, passage in enumerate(passages):
        tell("reference", number, len(passages))
        seed = hashlib.sha256(f"{header.sha256} ".encode() + passage.tokens.astype("<u4").tobytes()).digest()
        generator = np.random.default_rng(int.from_bytes(seed[:8], "little"))
        at = passage.first + 1
        for logits in hf_rows(model, passage.tokens, first=passage.first):
            targets = passage.tokens[at : at + len(logits)]
            parts.append(compressed(logits, targets, top=header.top, samples=header.samples, generator=generator))
            at += len(logits)
    tell("reference", len(passages), len(passages))
    return joined(parts)
