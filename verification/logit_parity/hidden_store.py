"""Stores the reference's hidden states on disk instead of its logits: 4 width bytes a scored position, not 4 V.

A reading returns logits: the model's head computes them again from the stored states, for a whole piece of a passage
and with the same matrix product as the first time, so that the bits are equal. Every reading takes the time of the
head. This store is used if full logits would take much of a disk: for a vocabulary of 262,144, 12 x 512 tokens and the
run modes, 3.8 GB of logits are 9 MB of states of 640 channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from verification.engines.closing import Closing
from verification.engines.huggingface import PIECE_ELEMENTS, hf_rows
from verification.engines.model_head import ModelHead
from verification.engines.positions import scored
from verification.engines.streamed import StreamedModel
from verification.logit_parity.logit_store import Array, LogitSpool
from verification.logit_parity.run_modes import Passage


class HiddenSpool(Closing):
    """A temporary file of hidden states, read as logits; a context manager like `LogitSpool`.

    Raises:
        InputError: the disk does not have enough room for `rows` rows.
    """

    recomputes = True

    def __init__(self, directory: Path, head: ModelHead, *, rows: int, vocab: int) -> None:
        self.vocab, self._head = vocab, head
        self._file = LogitSpool(directory, rows=rows, vocab=head.width)
        self._piece = max(1, PIECE_ELEMENTS // vocab)
        self._pieces: list[tuple[int, int]] = []  # rows start .. stop-1 went through the head together
        self._known: tuple[int, Array] = (0, np.empty((0, vocab), dtype="<f4"))  # the last piece that was read

    def close(self) -> None:
        """Free disk and memory; safe to call twice."""
        self._file.close()
        self._known = (0, self._known[1][:0])

    @property
    def rows(self) -> int:
        return self._file.rows

    def keep(self, passage: Passage) -> None:
        """Run the model's body over a passage and write the hidden states of its scored positions."""
        start = self.rows
        self._file.append(self._head.hidden(passage.tokens, passage.first, len(passage.tokens) - 1))
        self._pieces += [(at, min(at + self._piece, self.rows)) for at in range(start, self.rows, self._piece)]

    def read(self, start: int, stop: int) -> Array:
        """Logits of rows start .. stop-1, (stop - start, V)."""
        if not 0 <= start <= stop <= self.rows:
            raise IndexError(f"rows {start}..{stop} of {self.rows}")
        parts = [
            self._logits(first, last)[max(start - first, 0) : stop - first]
            for first, last in self._pieces
            if first < stop and last > start
        ]
        return parts[0] if len(parts) == 1 else np.concatenate([self._known[1][:0], *parts])

    def _logits(self, first: int, last: int) -> Array:
        at, known = self._known
        if at != first or len(known) != last - first:
            known = self._head.logits(self._file.read(first, last))
            self._known = (first, known)
        return known

    def done(self) -> None:
        """Call after the last passage: keeps only the model's head."""
        self._head.keep_only_head()


def gives_the_same(model: Any, passage: Passage) -> bool:
    """Whether the model's logits of a passage, computed again from its hidden states, are equal bit by bit.

    A streamed model's logits are always equal, because its head always runs separately.
    """
    head = ModelHead(model)
    if not head.usable:
        return False
    if isinstance(model, StreamedModel):
        return True
    try:
        again = head.logits(head.hidden(passage.tokens, passage.first, scored(len(passage.tokens))[1]))
    except (TypeError, ValueError, AttributeError, RuntimeError):  # a family whose head needs more than hidden states
        return False
    return np.array_equal(again, np.concatenate(list(hf_rows(model, passage.tokens, first=passage.first))))
