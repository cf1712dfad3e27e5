"""Measured parity between a Hugging Face checkpoint and the GGUF files made from it, with a verdict.

`divergence` compares two streams of logits; `verify` runs the whole ladder; `decide` decides again from a report.
"""

from verification.divergence import divergence as divergence
from verification.ladder import verify
from verification.policy import Policy, decide, load_policy
from verification.schema import Report

__all__ = ["Policy", "Report", "decide", "divergence", "load_policy", "verify"]
