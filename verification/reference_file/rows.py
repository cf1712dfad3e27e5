"""Turns full rows of logits into rows of a reference file: the most likely tokens, and samples of all others.

For a row p over V tokens, with T the K most likely tokens (of equally likely ones the lower id first):
    P = sum_{v not in T} p_v        log P by a float64 logsumexp over the tail, never as 1 minus the rest
    h = -sum_{v not in T} (p_v / P) log(p_v / P)
    S tokens drawn independently, with replacement, each v outside T with probability p_v / P
The draws are the inverse of the cumulative float64 probabilities at uniform numbers from the caller's generator.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from so8t_core.errors import InputError
from verification.reference_file.format import STEPS, Rows, id_type

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
_BLOCK_ELEMENTS = 1 << 20  # elements of a (rows, V) block: 8 MiB of float64


def compressed(logits_TV: Logits, targets_T: Ids, *, top: int, samples: int, generator: np.random.Generator) -> Rows:
    """Stored rows from full logits, (T, V), and the next tokens, (T,).

    Raises:
        InputError: a logit is not finite, so the model cannot be a reference.
    """
    if not np.isfinite(logits_TV).all():
        raise InputError("the checkpoint gives logits that are NaN or Inf: it cannot be a reference")
    step = max(1, _BLOCK_ELEMENTS // logits_TV.shape[1])
    starts = range(0, len(logits_TV), step)
    blocks = [(logits_TV[start : start + step], targets_T[start : start + step]) for start in starts]
    return joined([_block(logits, targets, top, samples, generator) for logits, targets in blocks])


def _block(logits: Logits, targets: Ids, top: int, samples: int, generator: np.random.Generator) -> Rows:
    kind, rows = id_type(logits.shape[1]), np.arange(len(logits))[:, None]
    log_p = _log_softmax(logits.astype(np.float64))  # (T, V)
    ids = np.stack([_most_likely(row, top) for row in log_p])  # (T, K)
    top_log_p, log_p_target = log_p[rows, ids], log_p[rows[:, 0], targets]
    lowest = top_log_p[:, -1].astype("<f4")
    scale = np.where(lowest < 0, lowest.astype(np.float64), -1.0)[:, None]
    codes = np.clip(np.rint(top_log_p / scale * STEPS), 0, STEPS)
    if top < logits.shape[1]:
        mass, entropy, drawn, drawn_log_p = _tail(log_p, ids, samples, generator)
    else:
        mass, entropy = np.full(len(logits), -np.inf), np.zeros(len(logits))
        drawn, drawn_log_p = np.zeros((len(logits), samples), dtype=np.int64), np.zeros((len(logits), samples))
    return Rows(
        top_ids=ids.astype(kind),
        top_codes=codes.astype("<u2"),
        lowest=lowest,
        tail_mass=mass.astype("<f4"),
        tail_entropy=entropy.astype("<f4"),
        target=log_p_target.astype("<f4"),
        tail_ids=drawn.astype(kind),
        tail_log_p=drawn_log_p.astype("<f4"),
    )


def _tail(log_p_TV: Floats, ids_TK: Ids, samples: int, generator: np.random.Generator) -> tuple[Floats, ...]:
    """All tokens but the top: (T,) log mass, (T,) entropy, (T, S) drawn ids, and (T, S) log p of the drawn ids."""
    rows = np.arange(len(log_p_TV))[:, None]
    rest = log_p_TV.copy()
    rest[rows, ids_TK] = -np.inf
    peak = rest.max(axis=1, keepdims=True)
    mass = peak + np.log(np.exp(rest - peak).sum(axis=1, keepdims=True))  # (T, 1)
    shares = np.exp(rest - mass)  # p / P, 0 for the top
    entropy = mass[:, 0] - (shares * log_p_TV).sum(axis=1)
    edges = np.cumsum(shares, axis=1)
    points = generator.random((len(log_p_TV), samples)) * edges[:, -1:]
    drawn = np.stack([np.searchsorted(edge, point, side="right") for edge, point in zip(edges, points, strict=True)])
    return mass[:, 0], np.maximum(entropy, 0.0), drawn, log_p_TV[rows, drawn]


def _log_softmax(logits_TV: Floats) -> Floats:
    peak = logits_TV.max(axis=1, keepdims=True)
    return np.asarray(logits_TV - (peak + np.log(np.exp(logits_TV - peak).sum(axis=1, keepdims=True))))


def _most_likely(log_p: Floats, top: int) -> Ids:
    """Ids of the `top` largest, in falling order; of equally likely ids the lower first."""
    least = np.partition(log_p, -top)[-top]
    found = np.flatnonzero(log_p >= least)  # more than `top` if several are as likely as the last
    return np.asarray(found[np.argsort(-log_p[found], kind="stable")][:top], dtype=np.int64)


def joined(parts: list[Rows]) -> Rows:
    """The parts' rows as one, in order."""
    return Rows(*(np.concatenate(column) for column in zip(*(vars(part).values() for part in parts), strict=True)))
