"""Writes llama.cpp's `--kl-divergence-base` file from any stream of logits, reads it, and refuses a damaged file.

Little endian: "_logits_" | int32 n_ctx, n_vocab, n_chunk | int32 tokens (n_chunk, n_ctx) | per scored token a row of
2 ceil(V/2) + 4 uint16: float32 scale, float32 min_log_prob, V codes (and one unused if V is odd). The scored positions
are n_ctx//2 .. n_ctx-2 of a chunk, T of them. A code c stands for log p = scale c + min_log_prob; logits more than 16
below the largest share code 0. Files are written and read chunk by chunk: memory holds one chunk.
llama.cpp's reader exits with 0 on a missing, cut or foreign base file; here each is an error.
Source of the layout and of its float32 arithmetic: llama.cpp, tools/perplexity/perplexity.cpp.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from so8t_core.errors import InputError
from so8t_core.files import atomic_file

Array = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Rows = npt.NDArray[np.uint16]

MAGIC = b"_logits_"
_HEADER = len(MAGIC) + 12
_SPAN = np.float32(16)  # nats below the largest logit that have separate codes
_STEPS = np.float32(65535)
_SCALE, _FIRST_CODE = 0, 4  # uint16 columns


@dataclass(frozen=True)
class BaseFile:
    """A complete base file; `rows` is mapped, not loaded."""

    path: Path
    n_ctx: int
    vocab: int
    tokens: npt.NDArray[np.int32]  # (n_chunk, n_ctx)
    rows: Rows  # (n_chunk, T, row width)

    @property
    def chunks(self) -> int:
        return len(self.tokens)

    def log_probs(self, chunk: int) -> Array:
        """(T, V) float32 log-probabilities of one chunk, decoded as in llama.cpp's tool."""
        rows = np.asarray(self.rows[chunk])
        head = np.ascontiguousarray(rows[:, _SCALE:_FIRST_CODE]).view(np.float32)  # (T, 2)
        values: Array = rows[:, _FIRST_CODE : _FIRST_CODE + self.vocab].astype(np.float32)
        values *= head[:, :1]
        values += head[:, 1:]
        return values


def row_width(vocab: int) -> int:
    """Number of uint16 for a scored token."""
    return 2 * ((vocab + 1) // 2) + 4


def encode(logits_TV: Array) -> Rows:
    """(T, row width) uint16 rows of some positions' logits.

    Raises:
        InputError: a logit is NaN or infinite: the format has no code for it.
    """
    logits = np.ascontiguousarray(logits_TV, dtype=np.float32)
    if not np.isfinite(logits).all():
        raise InputError("the reference gives a logit that is NaN or infinite; a base file cannot hold it")
    total, vocab = logits.shape
    top = logits.max(axis=1)
    low = np.maximum(logits.min(axis=1), top - _SPAN)
    log_sum = log_sum_exp(logits, top)
    scale = (top - low) / _STEPS
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    above = logits > low[:, None]
    codes = np.where(above, np.rint(inverse[:, None] * (logits - low[:, None])), 0)  # half to even, as the tool does
    rows = np.zeros((total, row_width(vocab)), dtype=np.uint16)
    rows[:, _FIRST_CODE : _FIRST_CODE + vocab] = codes.astype(np.uint16)
    head = np.stack([scale, low - top - log_sum], axis=1).astype(np.float32)
    rows[:, _SCALE:_FIRST_CODE] = head.view(np.uint16)
    return rows


def log_sum_exp(logits_TV: Array, top_T: Array) -> Array:
    """(T,) float32: log of the sum of exp(logit - top), each exponential rounded to float32, the sum in float64."""
    exponentials = (logits_TV - top_T[:, None]).astype(np.float64)
    np.exp(exponentials, out=exponentials)
    result: Array = np.log(exponentials.astype(np.float32).sum(axis=1, dtype=np.float64)).astype(np.float32)
    return result


def write_base(path: str | Path, token_chunks: Sequence[Ids], logit_chunks: Iterable[Array], *, vocab: int) -> Path:
    """Write a base file, whole or not at all.

    Args:
        token_chunks: (n_ctx,) each, all of one length.
        logit_chunks: (T, V) each, in the same order; drawn one at a time.

    Raises:
        InputError: chunks of other shapes, not one chunk of logits for each of tokens, non-finite logits.
    """
    path, n_ctx = Path(path), len(token_chunks[0])
    wanted = (n_ctx - 1 - n_ctx // 2, vocab)
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        stream.write(MAGIC + struct.pack("<3i", n_ctx, vocab, len(token_chunks)))
        stream.write(np.stack(list(token_chunks)).astype("<i4").tobytes())
        written = 0
        for logits in logit_chunks:
            if logits.shape != wanted:
                raise InputError(f"chunk {written + 1} has logits of shape {logits.shape}, expected {wanted}")
            stream.write(encode(logits).astype("<u2").tobytes())
            written += 1
        if written != len(token_chunks):
            raise InputError(f"{written} chunks of logits came for {len(token_chunks)} chunks of tokens")
    return path


def read_base(path: str | Path, *, vocab: int | None = None) -> BaseFile:
    """Open a base file and check its size to the byte.

    Args:
        vocab: the vocabulary that the file must have; None accepts any.

    Raises:
        InputError: missing, another format, impossible header, cut off or too long, another vocabulary, or token ids
            outside of the vocabulary.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"base file {path} does not exist; write one with `so8t kld-base`")
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(_HEADER)
    if head[: len(MAGIC)] != MAGIC:
        raise InputError(
            f"{path} is no base file of llama-perplexity: it begins with {head[:8]!r}, expected {MAGIC!r}; write one "
            "with `so8t kld-base`"
        )
    if len(head) < _HEADER:
        raise InputError(f"base file {path} is truncated: {size} bytes, its header alone needs {_HEADER}")
    n_ctx, own_vocab, n_chunk = struct.unpack("<3i", head[len(MAGIC) :])
    if n_ctx < 4 or own_vocab < 1 or n_chunk < 1:
        raise InputError(f"base file {path} is damaged: n_ctx = {n_ctx}, n_vocab = {own_vocab}, n_chunk = {n_chunk}")
    if vocab is not None and own_vocab != vocab:
        raise InputError(
            f"base file {path} has a vocabulary of {own_vocab}, the candidate has {vocab}: they cannot be compared"
        )
    scored, width = n_ctx - 1 - n_ctx // 2, row_width(own_vocab)
    body = _HEADER + 4 * n_chunk * n_ctx
    expected = body + 2 * n_chunk * scored * width
    if size != expected:
        what = "is truncated" if size < expected else "has bytes too many"
        raise InputError(
            f"base file {path} {what}: {n_chunk} chunks of {n_ctx} tokens over {own_vocab} ids take {expected} bytes, "
            f"the file has {size}. Write it again."
        )
    tokens = np.fromfile(path, dtype="<i4", count=n_chunk * n_ctx, offset=_HEADER).reshape(n_chunk, n_ctx)
    if tokens.min() < 0 or tokens.max() >= own_vocab:
        raise InputError(f"base file {path} is damaged: it holds token ids outside 0 .. {own_vocab - 1}")
    rows = np.memmap(path, dtype="<u2", mode="r", offset=body, shape=(n_chunk, scored, width))
    return BaseFile(path, n_ctx, own_vocab, tokens, rows)
