"""Measured parity between a Hugging Face checkpoint and the GGUF files made from it, with a verdict.

`divergence` compares two streams of logits; `verify` runs the whole ladder; `decide` decides again from a report.
Names are loaded when first used: pytest imports the plugin in here at every start and must not wait for torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from verification.decision import decide
    from verification.divergence import divergence
    from verification.ladder import verify
    from verification.policy import Policy, load_policy
    from verification.schema import Report

_HOME = {"verify": "ladder", "Policy": "policy", "decide": "decision", "load_policy": "policy", "Report": "schema"}

__all__ = ["Policy", "Report", "decide", "divergence", "load_policy", "verify"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'verification' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"verification.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """`verification.divergence` is the function, although importing the submodule sets the name to the module."""

    @property
    def divergence(self) -> Any:
        return import_module("verification.divergence").divergence

    @divergence.setter
    def divergence(self, module: ModuleType) -> None:
        pass  # what the import system does after loading the submodule


sys.modules[__name__].__class__ = _Package
