"""Logits of a chunk of tokens from llama.cpp, at the scored positions (`positions`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import numpy as np

from so8t_core.errors import InputError
from verification.engines.closing import Closing
from verification.engines.llama_model import LlamaModel, last_words, usable_cores
from verification.engines.positions import Array, Ids, joined, scored

KV_TYPES = {"q8_0": llama_cpp.GGML_TYPE_Q8_0, "q4_0": llama_cpp.GGML_TYPE_Q4_0}
FLASH = {True: llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED, False: llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED}
N_BATCH = 512  # llama.cpp keeps one row of logits for each scored token of a batch


class LlamaLogits(Closing):
    """One context of one GGUF file, for one chunk after another; a context manager.

    Args:
        file: a path, or a loaded model, which is not closed here.
        n_batch: tokens given to llama.cpp at once; also bounds the rows of logits that llama.cpp holds.
        kv: type of the cached keys and values, "q8_0" or "q4_0" (with `flash`); None leaves llama.cpp's float16.
        flash: whether attention is computed by the flash kernel; None leaves it to llama.cpp.

    Raises:
        InputError: llama.cpp cannot load the file or make the context.
    """

    def __init__(
        self,
        file: str | Path | LlamaModel,
        *,
        n_ctx: int,
        n_batch: int | None = None,
        n_ubatch: int | None = None,
        threads: int | None = None,
        kv: str | None = None,
        flash: bool | None = None,
    ) -> None:
        self._own = not isinstance(file, LlamaModel)
        self.file = file if isinstance(file, LlamaModel) else LlamaModel(file)
        self.n_ctx, self.n_batch = n_ctx, min(n_batch or N_BATCH, n_ctx)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, self.n_batch, min(n_ubatch or N_BATCH, self.n_batch)
        params.n_seq_max, params.no_perf = 1, True
        # llama.cpp's default is always 4; with more threads than cores, threads wait for each other in busy loops
        params.n_threads = params.n_threads_batch = threads or usable_cores()
        if kv is not None:
            params.type_k = params.type_v = KV_TYPES[kv]
        if flash is not None:
            params.flash_attn_type = FLASH[flash]
        self.context = llama_cpp.llama_init_from_model(self.file.model, params)
        if not self.context:
            if self._own:
                self.file.close()
            raise InputError(f"llama.cpp cannot make a context of {n_ctx} tokens for {self.file.path}: {last_words()}")
        self.batch = llama_cpp.llama_batch_init(self.n_batch, 0, 1)

    def close(self) -> None:
        """Free the context, and the model if it was loaded here; safe to call twice."""
        if self.context:
            llama_cpp.llama_batch_free(self.batch)
            llama_cpp.llama_free(self.context)
            self.context = None
        if self._own:
            self.file.close()

    @property
    def vocab(self) -> int:
        return self.file.vocab_size

    def rows(
        self, tokens: Ids, *, first: int | None = None, singly_from: int | None = None, kept: int = 0
    ) -> Iterator[Array]:
        """Yield (rows, V) float32 logits of the scored positions `first` .. len-2, from an empty cache.

        Args:
            singly_from: position from which the tokens are decoded one by one, as in a generation.
            kept: number of first tokens that are the same as in the last call. They stay in the cache, unless the cache
                has lost its beginning (sliding window) or cannot remove its end (recurrent layers).
        """
        length = len(tokens)
        if length > self.n_ctx:
            raise InputError(f"a chunk of {length} tokens does not fit the context of {self.n_ctx}")
        if int(tokens.max()) >= self.vocab:
            raise InputError(
                f"{self.file.path} has a vocabulary of {self.vocab}, the reference's tokenizer gave the id "
                f"{int(tokens.max())}: different vocabularies cannot be compared"
            )
        start, stop = scored(length)
        start = start if first is None else first
        memory = llama_cpp.llama_get_memory(self.context)
        whole = llama_cpp.llama_memory_seq_pos_min(memory, 0) == 0  # a sliding window may have lost the beginning
        if not (kept and whole and llama_cpp.llama_memory_seq_rm(memory, 0, kept, -1)):
            llama_cpp.llama_memory_clear(memory, True)
            kept = 0
        together = length if singly_from is None else singly_from
        parts = [(begin, min(begin + self.n_batch, together)) for begin in range(kept, together, self.n_batch)]
        parts += [(begin, begin + 1) for begin in range(together, length)]
        for begin, end in parts:
            wanted = self._fill(tokens[begin:end], begin, start, stop)
            if llama_cpp.llama_decode(self.context, self.batch) != 0:
                raise InputError(f"llama.cpp failed to decode {self.file.path}: {last_words()}")
            if wanted:
                pointer = llama_cpp.llama_get_logits(self.context)
                yield np.ctypeslib.as_array(pointer, shape=(wanted, self.vocab)).copy()

    def chunk(self, tokens: Ids, *, first: int | None = None, singly_from: int | None = None, kept: int = 0) -> Array:
        """(T, V) float32 logits of one chunk; see `rows`."""
        return joined(list(self.rows(tokens, first=first, singly_from=singly_from, kept=kept)))

    def _fill(self, part: Ids, begin: int, start: int, stop: int) -> int:
        """Write one batch; returns the number of its rows with logits."""
        batch, wanted = self.batch, 0
        batch.n_tokens = len(part)
        for i, token in enumerate(part.tolist()):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, begin + i, 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = int(start <= begin + i < stop)
            wanted += batch.logits[i]
        return wanted
