"""Tensors whose type differs from the recipe of the file type: mixes per tensor, `--pure`, kept heads.

Another type is not a fault: each tensor is compared with the reference at the type that it has. The report names the
other types, because the file's name does not.
"""

from __future__ import annotations

from so8t_core.errors import InputError
from verification.contract.finding import Finding
from verification.engines.quantise import preset_types
from verification.gguf.reader import GGUFFile

_ACTION = "nothing, if the mix was meant"


def recipe_differences(file: GGUFFile) -> list[Finding]:
    """Tensors whose type differs from the preset; empty if llama.cpp has no preset for the file."""
    if file.is_float or file.file_type == "unknown":
        return []
    options = []
    for imatrix in (False, True):  # some presets choose other types with a matrix
        try:
            preset = preset_types(file, imatrix=imatrix)
        except InputError:
            continue
        options.append(
            [
                Finding(name, preset[name], tensor.type, _ACTION, "another type than the preset's")
                for name, tensor in file.tensors.items()
                if name in preset and preset[name] != tensor.type
            ]
        )
    return min(options, key=len, default=[])
