"""Checks whether the text is sufficient for a verdict, and whether logits are compared at the right positions.

If the reference's mean entropy is near ln V, faults do not show (all candidates look alike). If the entropy is near
zero, every file looks good (any model predicts a repetitive text). Both make the verdict inconclusive. If a candidate's
logits agree better with the reference's neighbouring positions than with the same positions, they were scored off by
one, or the file is broken: the check fails.
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
    """The smaller KLD of the two shifts by one position, divided by the KLD without a shift; NaN if not finite."""
    ref, cand = ref_TV[:ALIGNED_ROWS], cand_TV[:ALIGNED_ROWS]
    right = mean_kld(ref, cand)
    shifted = np.minimum(mean_kld(ref[:-1], cand[1:]), mean_kld(ref[1:], cand[:-1]))  # np.minimum keeps a NaN
    return float(shifted) / (right if math.isnan(right) else max(right, _LEAST_KLD))


def alignment_check(ratio: float | None, subject: str) -> Check:
    """Check that a shift by one position is worse than no shift."""
    return plain_check(
        "evidence.alignment",
        "Shifted by one position, the divergence grows (factor)",
        ratio,
        subject=subject,
        detail="an evaluator that is off by one, or a broken file, would not see it grow",
    )


def evidence_checks(d: Divergence) -> list[Check]:
    """Checks of the text's length and entropy, from the reference's numbers in any comparison."""
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
