"""Tensors whose type differs from the recipe of the file type: mixes per tensor, `--pure`, kept heads.

Another type is not a fault: each tensor is compared with the reference at the type that it has. The report names the
other types, because the file's name does not.
"""

from __future__ import annotations

from verification.contract.finding import Finding
from verification.engines.presets import preset_types
from verification.gguf.reader import GGUFFile

_ACTION = "nothing, if the mix was meant"


def recipe_differences(file: GGUFFile) -> list[Finding]:
    """Tensors whose type differs from the preset; empty if llama.cpp has no preset for the file."""
    if file.is_float or file.file_type == "unknown":
        return []
    options = [
        [
            Finding(name, preset[name], tensor.type, _ACTION, "another type than the preset's")
            for name, tensor in file.tensors.items()
            if name in preset and preset[name] != tensor.type
        ]
        for preset in preset_types(file)
    ]
    return min(options, key=len, default=[])
