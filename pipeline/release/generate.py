"""Greedy answers from a GGUF file through llama.cpp, several prompts decoded together.

Continuous batching: each of `parallel` slots owns one sequence of the KV cache; a finished slot takes the next prompt
at once. A CPU spends most of its time reading weights, and each step reads them once for all slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import llama_cpp
import numpy as np

from so8t_core.errors import InputError
from verification.engines.llama_model import LlamaModel, last_words, usable_cores

PIECE_BYTES = 256  # first size of the buffer for one token's text


@dataclass(frozen=True)
class Completion:
    """One answer: its text, and whether the model ended it (False: it was cut at the limit)."""

    text: str
    finished: bool


@dataclass
class _Slot:
    prompt: int  # index into the prompts
    pending: list[int]  # tokens to feed next
    position: int = 0  # tokens already in the cache
    generated: list[int] = field(default_factory=list)


def complete(
    gguf: Path,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    parallel: int = 8,
    threads: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Greedy completions of rendered prompts (special tokens written out), in the prompts' order.

    Args:
        advance: called with the number of prompts finished since the last call.

    Raises:
        InputError: llama.cpp cannot load or run the file.
    """
    with LlamaModel(gguf) as model:
        encoded = [with_bos(model, model.tokenize(text)) for text in prompts]
        if not encoded:
            return []
        per_sequence = -(-(max(map(len, encoded)) + max_new_tokens) // 256) * 256
        engine = _Engine(model, per_sequence, min(parallel, len(encoded)), threads)
        try:
            return engine.run(encoded, max_new_tokens, advance or (lambda n: None))
        finally:
            engine.close()


def with_bos(model: LlamaModel, ids: list[int]) -> list[int]:
    """Put BOS in front if the file asks for it and the template has not written it: two BOS change the answer."""
    return [model.bos, *ids] if model.add_bos and ids[:1] != [model.bos] else ids


class _Engine:
    def __init__(self, model: LlamaModel, per_sequence: int, parallel: int, threads: int | None) -> None:
        self.model, self.parallel = model, parallel
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = per_sequence * parallel
        params.n_seq_max = parallel
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = threads or usable_cores()
        self.context = llama_cpp.llama_init_from_model(model.model, params)
        if not self.context:
            raise InputError(f"llama.cpp cannot open a context of {params.n_ctx} tokens: {last_words()}")
        self.capacity = params.n_batch
        self.batch = llama_cpp.llama_batch_init(self.capacity, 0, 1)
        self.memory = llama_cpp.llama_get_memory(self.context)

    def close(self) -> None:
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)

    def run(self, prompts: list[list[int]], limit: int, advance: Callable[[int], None]) -> list[Completion]:
        results: dict[int, Completion] = {}
        waiting = list(range(len(prompts)))[::-1]
        slots: list[_Slot | None] = [None] * self.parallel
        while len(results) < len(prompts):
            for index in range(self.parallel):
                if slots[index] is None and waiting:
                    llama_cpp.llama_memory_seq_rm(self.memory, index, -1, -1)
                    number = waiting.pop()
                    slots[index] = _Slot(number, list(prompts[number]))
            for index, token in self._step(slots):
                slot = slots[index]
                assert slot is not None
                ended = self.model.is_end(token)
                if not ended:
                    slot.generated.append(token)
                    slot.pending = [token]
                if ended or len(slot.generated) >= limit:
                    results[slot.prompt] = Completion(self._text(slot.generated), ended)
                    slots[index] = None
                    advance(1)
        return [results[i] for i in range(len(prompts))]

    def _step(self, slots: list[_Slot | None]) -> list[tuple[int, int]]:
        """Feed the slots' pending tokens (long prompts in pieces); returns (slot, next token) of each slot with none
        pending."""
        count = 0
        due: list[tuple[int, int]] = []  # (slot, row of the batch)
        for index, slot in enumerate(slots):
            if slot is None:
                continue
            piece = slot.pending[: self.capacity - count]
            for token in piece:
                self.batch.token[count] = token
                self.batch.pos[count] = slot.position
                self.batch.n_seq_id[count] = 1
                self.batch.seq_id[count][0] = index
                self.batch.logits[count] = 0
                slot.position += 1
                count += 1
            slot.pending = slot.pending[len(piece) :]
            if piece and not slot.pending:
                self.batch.logits[count - 1] = 1
                due.append((index, count - 1))
        self.batch.n_tokens = count
        status = llama_cpp.llama_decode(self.context, self.batch)
        if status != 0:
            raise InputError(f"llama.cpp stopped with status {status}: {last_words()}")
        size = self.model.vocab_size
        return [
            (slot, int(np.argmax(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, row), (size,)))))
            for slot, row in due
        ]

    def _text(self, tokens: list[int]) -> str:
        pieces = []
        buffer = llama_cpp.ctypes.create_string_buffer(PIECE_BYTES)
        for token in tokens:
            length = llama_cpp.llama_token_to_piece(self.model.vocab, token, buffer, len(buffer), 0, True)
            if length < 0:  # too long: llama.cpp gives the length and writes nothing
                buffer = llama_cpp.ctypes.create_string_buffer(-length)
                length = llama_cpp.llama_token_to_piece(self.model.vocab, token, buffer, len(buffer), 0, True)
            pieces.append(buffer.raw[: max(length, 0)])
        return b"".join(pieces).decode("utf-8", errors="replace")
