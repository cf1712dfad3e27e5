"""Checks whether text and evaluator can carry a verdict: enough positions, neither flat nor trivial, logits aligned.

A reference whose mean entropy is near ln V hides faults (every candidate looks alike); one near zero flatters (a
repetitive text is predicted by anything). Both leave the verdict open. A candidate whose logits agree better with
the reference's neighbouring positions than with their own was scored off by one, or is broken: that fails.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from verification.gate.check import plain_check
from verification.gate.report import Check, Divergence
from verification.logit_parity.kl import mean_kld

Array = npt.NDArray[np.float32]
ALIGNED_ROWS = 64
_LEAST_KLD = 1e-12  # nats; two equal streams would divide by zero


def alignment(ref_TV: Array, cand_TV: Array) -> float:
    """KLD of the better of the two shifts by one position over the KLD of the right alignment; NaN when not finite."""
    ref, cand = ref_TV[:ALIGNED_ROWS], cand_TV[:ALIGNED_ROWS]
    right = mean_kld(ref, cand)
    shifted = np.minimum(mean_kld(ref[:-1], cand[1:]), mean_kld(ref[1:], cand[:-1]))  # np.minimum keeps a NaN
    return float(shifted) / (right if math.isnan(right) else max(right, _LEAST_KLD))


def alignment_check(ratio: float | None, subject: str) -> Check:
    """A shift by one position must be worse than no shift."""
    return plain_check(
        "evidence.alignment",
        "Shifted by one position, the divergence grows (factor)",
        ratio,
        subject=subject,
        detail="an evaluator that is off by one, or a broken file, would not see it grow",
    )


def evidence_checks(d: Divergence) -> list[Check]:
    """Amount and nature of the text, from the reference's side of any one comparison."""
    seen = d.tokens > 0
    where = "use more text (--chunks, --n-ctx, --corpus)"
    share = d.reference_entropy / math.log(d.vocab)
    return [
        plain_check("evidence.positions", "Scored positions", d.tokens, detail=where),
        plain_check("evidence.chunks", "Independent chunks", d.chunks, detail=where),
        plain_check(
            "evidence.entropy",
            "Reference's mean entropy",
            d.reference_entropy if seen else None,
            unit="nats",
            detail="a text that the reference finds this predictable flatters every candidate; use varied text",
        ),
        plain_check(
            "evidence.entropy_share",
            "Reference's mean entropy, as a share of ln V",
            share if seen else None,
            unit="share",
            detail="a reference this close to uniform hides faults: is it trained, and is the text its language?",
        ),
    ]
