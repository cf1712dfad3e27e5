"""The fault catalogue: all faults, collected from one file for each class of fault."""

from __future__ import annotations

from verification.fault_catalogue.fault import Fault
from verification.fault_catalogue.faults import adapter, checkpoint, engine, file, metadata, tokens, weights


def catalogue() -> list[Fault]:
    """Every fault, by class."""
    modules = (metadata, tokens, weights, adapter, checkpoint, file, engine)
    return [fault for module in modules for fault in module.FAULTS]
