"""Measured parity between a Hugging Face checkpoint and the GGUF files made from it, with a verdict.

`divergence` compares two streams of logits; `verify` runs the whole ladder; `decide` decides again from a report.
Names are loaded when first used, because pytest imports the plugin of this package at every start and must not wait for
torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from verification.commands.request import VerifyRequest
    from verification.commands.verify import verify, verify_request
    from verification.gate.decide import decide
    from verification.gate.policy import Policy, load_policy
    from verification.gate.report import Report
    from verification.logit_parity.kl import divergence

_HOME = {
    "Policy": "gate.policy",
    "Report": "gate.report",
    "decide": "gate.decide",
    "divergence": "logit_parity.kl",
    "load_policy": "gate.policy",
    "VerifyRequest": "commands.request",
    "verify": "commands.verify",
    "verify_request": "commands.verify",
}

__all__ = [
    "Policy",
    "Report",
    "VerifyRequest",
    "decide",
    "divergence",
    "load_policy",
    "verify",
    "verify_request",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'verification' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"verification.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
