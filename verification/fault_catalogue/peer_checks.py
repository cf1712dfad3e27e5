"""Two usual checks of a file (NMSE and KLD), and the gate's comparison of logits, in a child process.

NMSE: llama.cpp's check of a converter (examples/model-conversion): sum (a - b)^2 / sum a^2 over the logits of the last
token of "Hello, my name is"; reference and file each use their own tokenizer; a value below 1e-2 passes. KLD: the mean
over the file's logits against the reference's, as in `llama-perplexity --kl-divergence`; people allow 0.15 nats for a
Q4_K_M. A damaged file can end llama.cpp and the child with it; that counts as refused.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from so8t_core.errors import InputError

PROMPT = "Hello, my name is"
NMSE_BOUND, KLD_BOUND = 1e-2, 0.15
CHUNKS, N_CTX = 6, 128


@dataclass(frozen=True)
class Texts:
    """Paths of the reference's logits and of their tokens."""

    last: str  # .npy, (V,) logits of the prompt's last token
    rows: str  # .npy, (chunks, T, V) float32
    tokens: str  # .npy, (chunks, n_ctx)


@dataclass(frozen=True)
class Said:
    """Measured values of one file; None if it could not be run."""

    nmse: float | None = None
    kld: float | None = None  # mean KLD as in llama.cpp
    mean_kld: float | None = None  # mean KLD over the full support
    upper: float | None = None  # upper end of the 95 % interval of `mean_kld`
    refused: str = ""


def reference_texts(reference: Path, tokenizer: Any, work: Path) -> Texts:
    """Run the reference once and store its logits, with which every file is compared."""
    from verification.engines.huggingface import hf_chunk, hf_rows, load_hf
    from verification.logit_parity.text import read_corpus

    texts = Texts(*(str(work / f"reference-{name}.npy") for name in ("last", "rows", "tokens")))
    if all(Path(path).is_file() for path in (texts.last, texts.rows, texts.tokens)):
        return texts
    chunks = read_corpus(None, tokenizer, n_ctx=N_CTX, chunks=CHUNKS).chunks
    model = load_hf(reference)
    prompt = np.asarray(tokenizer(PROMPT)["input_ids"], dtype=np.int64)
    last = next(iter(hf_rows(model, np.append(prompt, prompt[-1]), first=len(prompt) - 1)))[0]
    np.save(texts.last, last)
    np.save(texts.rows, np.stack([hf_chunk(model, tokens) for tokens in chunks]))
    np.save(texts.tokens, np.stack(chunks))
    return texts


class Others:
    """Runs the checks in a child process, and starts a new child if one died; a context manager."""

    def __init__(self, threads: int = 1) -> None:
        self.threads, self._pool = threads, self._start()

    @staticmethod
    def _start() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=get_context("spawn"))

    def __enter__(self) -> Others:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def nmse(self, path: Path, texts: Texts) -> Said:
        """llama.cpp's check of a converter."""
        return self._ask(_nmse, path, texts)

    def kld(self, path: Path, texts: Texts) -> Said:
        """Mean KL divergence from the reference."""
        return self._ask(_kld, path, texts)

    def _ask(self, question: Any, path: Path, texts: Texts) -> Said:
        try:
            answer: Said = self._pool.submit(question, str(path), texts, self.threads).result()
        except BrokenProcessPool:
            self._pool.shutdown(wait=False)
            self._pool = self._start()
            return Said(refused="llama.cpp crashed")
        return answer


def _nmse(path: str, texts: Texts, threads: int) -> Said:
    from verification.engines.llama_logits import LlamaLogits
    from verification.engines.llama_model import LlamaModel

    wanted = np.load(texts.last).astype(np.float64)
    try:
        with LlamaModel(path) as model, LlamaLogits(model, n_ctx=64, threads=threads) as engine:
            ids = model.tokenize(PROMPT, add_special=True)
            rows = engine.chunk(np.asarray([*ids, ids[-1]], dtype=np.int64), first=len(ids) - 1)
    except InputError as error:
        return Said(refused=str(error))
    if rows.shape[1] != wanted.size:
        return Said(refused="another vocabulary")
    return Said(nmse=float(np.sum((rows[0] - wanted) ** 2) / np.sum(wanted**2)))


def _kld(path: str, texts: Texts, threads: int) -> Said:
    from verification.engines.llama_logits import LlamaLogits
    from verification.engines.positions import scored
    from verification.logit_parity.kl import DivergenceAccumulator

    rows, tokens = np.load(texts.rows, mmap_mode="r"), np.load(texts.tokens)
    n_ctx, vocab = tokens.shape[1], rows.shape[2]
    total = DivergenceAccumulator(reference="reference", candidate=path, n_ctx=n_ctx, vocab=vocab, seed="self-test")
    first = scored(n_ctx)[0]
    try:
        with LlamaLogits(path, n_ctx=n_ctx, threads=threads) as engine:
            for chunk, own in zip(tokens, rows, strict=True):
                total.begin_chunk()
                total.add(np.array(own), engine.chunk(chunk), chunk[first + 1 :], first_position=first)
    except InputError as error:
        return Said(refused=str(error))
    found = total.result()
    if found.non_finite or not found.tokens:
        return Said(kld=float("inf"), mean_kld=float("inf"), upper=float("inf"))
    return Said(kld=found.mean_kld_llama_cpp, mean_kld=found.mean_kld, upper=found.mean_kld_interval[1])
