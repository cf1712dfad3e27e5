"""Logits of a chunk of tokens from the Hugging Face model and from llama.cpp, for exactly the same positions.

A chunk has n_ctx tokens; positions n_ctx//2 .. n_ctx-2 are scored (T = n_ctx - 1 - n_ctx//2), so that each has at least
half a chunk of context and its target inside the chunk. Every chunk starts with an empty cache. Both sides yield
float32 rows (rows, V), a bounded number at a time. Positions: llama.cpp, tools/perplexity/perplexity.cpp.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from so8t_core.errors import InputError
from verification.engines.llama_model import LlamaModel, last_words

Array = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
PIECE_ELEMENTS = 1 << 27  # logits held at once: 512 MiB of float32
N_BATCH = 512  # llama.cpp keeps one row of logits for each scored token of a batch


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def scored(n_ctx: int) -> tuple[int, int]:
    """First scored position and one past the last."""
    return n_ctx // 2, n_ctx - 1


def load_hf(directory: str | Path) -> Any:
    """A causal LM from a local directory in float32, ready for evaluation; never remote code.

    Raises:
        InputError: no such directory, no config.json, or transformers cannot read it.
    """
    from transformers import AutoModelForCausalLM

    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory} is not a Hugging Face model directory: it has no config.json")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(directory), dtype="float32", trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"transformers cannot load {directory}: {' '.join(str(error).split())[:300]}") from None
    return model.eval()


def hf_rows(model: Any, tokens: Ids, *, first: int | None = None, piece: int = PIECE_ELEMENTS) -> Iterator[Array]:
    """Yield (rows, V) float32 logits of the scored positions `first` .. len-2, at most `piece` elements at a time.

    Long pieces are cut: the model's body runs once and its head once a piece, so memory does not grow with the length.
    A model without `logits_to_keep` gives all of its logits at once.
    """
    import torch  # here: a command that runs llama.cpp alone starts two seconds sooner without

    start, stop = scored(len(tokens))
    start = start if first is None else first
    ids_1T = torch.from_numpy(np.asarray(tokens, dtype=np.int64))[None].to(model.device)
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        with torch.inference_mode():
            yield _numpy(model(input_ids=ids_1T, use_cache=False).logits[0, start:stop])
        return
    rows = max(1, piece // int(model.config.get_text_config().vocab_size))
    with _body_once(model) if stop - start > rows else contextlib.nullcontext():
        for begin in range(start, stop, rows):
            keep = torch.arange(begin, min(begin + rows, stop), device=ids_1T.device)
            with torch.inference_mode():
                logits = model(input_ids=ids_1T, use_cache=False, logits_to_keep=keep).logits[0]
            yield _numpy(logits)


@contextlib.contextmanager
def _body_once(model: Any) -> Iterator[None]:
    """Inside, the model's body answers every call with what it gave the first time: only the head runs again."""
    from torch import nn

    body = getattr(model, getattr(model, "base_model_prefix", "") or "?", None)
    if not isinstance(body, nn.Module) or body is model or "forward" in vars(body):
        yield  # no body of its own, or somebody else's forward on it: run the whole model for every piece
        return
    kept: list[Any] = []
    forward = body.forward

    def once(*args: Any, **more: Any) -> Any:
        if not kept:
            kept.append(forward(*args, **more))
        return kept[0]

    body.forward = once
    try:
        yield
    finally:
        del body.forward


def _numpy(logits: Any) -> Array:
    result: Array = logits.float().cpu().numpy()
    return result


def hf_chunk(model: Any, tokens: Ids, *, first: int | None = None) -> Array:
    """(T, V) float32 logits of one chunk; the head is applied to the scored positions only."""
    return _joined(list(hf_rows(model, tokens, first=first)))


def _joined(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class LlamaLogits:
    """One context of one GGUF file, asked chunk by chunk; a context manager.

    Args:
        file: a path, or a model that is loaded already and stays its owner's.
        n_batch: tokens given to llama.cpp at once; also bounds the rows of logits that it holds.

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
    ) -> None:
        self._own = not isinstance(file, LlamaModel)
        self.file = file if isinstance(file, LlamaModel) else LlamaModel(file)
        self.n_ctx, self.n_batch = n_ctx, min(n_batch or N_BATCH, n_ctx)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, self.n_batch, min(n_ubatch or N_BATCH, self.n_batch)
        params.n_seq_max, params.no_perf = 1, True
        # llama.cpp's default is 4 whatever the machine: more threads than cores spin at each other's barriers
        params.n_threads = params.n_threads_batch = threads or usable_cores()
        self.context = llama_cpp.llama_init_from_model(self.file.model, params)
        if not self.context:
            if self._own:
                self.file.close()
            raise InputError(f"llama.cpp cannot make a context of {n_ctx} tokens for {self.file.path}: {last_words()}")
        self.batch = llama_cpp.llama_batch_init(self.n_batch, 0, 1)

    def __enter__(self) -> LlamaLogits:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the context, and the model where it was loaded here; safe to call twice."""
        if self.context:
            llama_cpp.llama_batch_free(self.batch)
            llama_cpp.llama_free(self.context)
            self.context = None
        if self._own:
            self.file.close()

    @property
    def vocab(self) -> int:
        return self.file.vocab_size

    def rows(self, tokens: Ids, *, first: int | None = None, singly_from: int | None = None) -> Iterator[Array]:
        """Yield (rows, V) float32 logits of the scored positions `first` .. len-2, from an empty cache.

        Args:
            singly_from: position from which the tokens are decoded one by one, as a generation does it.
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
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        together = length if singly_from is None else singly_from
        parts = [(begin, min(begin + self.n_batch, together)) for begin in range(0, together, self.n_batch)]
        parts += [(begin, begin + 1) for begin in range(together, length)]
        for begin, end in parts:
            wanted = self._fill(tokens[begin:end], begin, start, stop)
            if llama_cpp.llama_decode(self.context, self.batch) != 0:
                raise InputError(f"llama.cpp failed to decode {self.file.path}: {last_words()}")
            if wanted:
                pointer = llama_cpp.llama_get_logits(self.context)
                yield np.ctypeslib.as_array(pointer, shape=(wanted, self.vocab)).copy()

    def chunk(self, tokens: Ids, *, first: int | None = None, singly_from: int | None = None) -> Array:
        """(T, V) float32 logits of one chunk; see `rows`."""
        return _joined(list(self.rows(tokens, first=first, singly_from=singly_from)))

    def _fill(self, part: Ids, begin: int, start: int, stop: int) -> int:
        """Write one batch; returns how many of its rows carry logits."""
        batch, wanted = self.batch, 0
        batch.n_tokens = len(part)
        for i, token in enumerate(part.tolist()):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, begin + i, 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = int(start <= begin + i < stop)
            wanted += batch.logits[i]
        return wanted
