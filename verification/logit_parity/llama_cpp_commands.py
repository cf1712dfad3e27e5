"""The work of `so8t kld-base` and `so8t kld`: base files from a checkpoint, statistics of a GGUF file against a base.

A base file from here holds fp32 logits of the Hugging Face model, so llama.cpp's tool then measures conversion and
quantisation together. llama.cpp's usual base comes from a converted file, so that conversion errors cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from so8t_core.errors import InputError
from verification.engines.huggingface import hf_chunk, load_hf
from verification.engines.llama_logits import LlamaLogits
from verification.engines.llama_model import usable_cores
from verification.gguf.kind import require_logits
from verification.gguf.reader import read_gguf
from verification.logit_parity.llama_cpp_file import Array, read_base, write_base
from verification.logit_parity.llama_cpp_statistics import KldStatistics, statistics
from verification.logit_parity.text import Corpus, read_corpus

Progress = Callable[[str, int, int], None]


def write_base_of(
    reference: str | Path,
    out: str | Path,
    *,
    corpus: str | Path | Sequence[str | Path] | None = None,
    chunks: int = 12,
    n_ctx: int = 512,
    progress: Progress | None = None,
) -> Corpus:
    """Score a text with a checkpoint in fp32 and write llama.cpp's base file; returns the scored corpus.

    A chunk begins with BOS if the checkpoint's tokenizer adds BOS; llama.cpp's tool does so by the GGUF's flag.

    Raises:
        InputError: a checkpoint, text or output path that cannot be used; non-finite logits.
    """
    from verification.reference.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Path(reference))
    text = read_corpus(corpus, tokenizer, n_ctx=n_ctx, chunks=chunks, bos=_bos(tokenizer))
    model = load_hf(reference)

    def logits() -> Iterator[Array]:
        for number, tokens in enumerate(text.chunks):
            if progress is not None:
                progress("base", number, len(text.chunks))
            yield hf_chunk(model, tokens)

    write_base(out, text.chunks, logits(), vocab=int(model.get_output_embeddings().weight.shape[0]))
    return text


def candidate_statistics(
    base: str | Path, candidate: str | Path, *, threads: int | None = None, progress: Progress | None = None
) -> KldStatistics:
    """The output of `llama-perplexity -m candidate --kl-divergence --kl-divergence-base base`; tokens of the base.

    Raises:
        InputError: a base file or candidate that cannot be used, or whose vocabularies differ.
    """
    n_ctx = read_base(base).n_ctx
    file = read_gguf(candidate)
    require_logits(file)
    candidate = file.path  # the first shard of a set: llama.cpp finds the others by its name
    with LlamaLogits(candidate, n_ctx=n_ctx, threads=threads) as engine:
        found = read_base(base, vocab=engine.vocab)
        if engine.file.add_eos:
            raise InputError(f"{candidate} appends EOS to every text; llama.cpp's own tool refuses such files here")
        bos = engine.file.bos if engine.file.add_bos else None

        def logits() -> Iterator[Array]:
            for number, tokens in enumerate(found.tokens):
                if progress is not None:
                    progress("candidate", number, found.chunks)
                ids = tokens.astype(np.int64)
                if bos is not None:
                    ids[0] = bos
                yield engine.chunk(ids)

        return statistics(found, logits(), threads=threads or usable_cores())


def _bos(tokenizer: Any) -> int | None:
    ids = tokenizer("a")["input_ids"]
    return int(ids[0]) if ids and ids[0] == tokenizer.bos_token_id else None
