"""The leg `quantise`: a quantised file against the reference re-quantised here, byte by byte, then block by block.

Counted are the tensors that neither equal the oracle's bytes nor hold their type's block bounds (`block_bounds`), so a
file from another build or machine passes with its differences explained, and one from other weights does not. Where
nearly all other tensors are equal, the same build made the file and explains nothing: one flipped bit counts.
"""

from __future__ import annotations

from collections import Counter

from verification.contract.checks import Candidate
from verification.engines.reconversion import Twin, same_bytes
from verification.gate.check import plain_check
from verification.gate.report import Check
from verification.gguf.reader import FLOAT_TYPES, GGUFFile
from verification.weight_parity.block_bounds import Held, hold
from verification.weight_parity.neighbours import SAME_MAKER

_IMATRIX_KEY = "quantize.imatrix.file"  # llama-quantize writes it, among others, when it was given a matrix


def quantise_checks(candidate: Candidate, twin: Twin) -> list[Check]:
    """The leg's checks for one candidate; none for a float file."""
    if candidate.file.is_float:
        return []
    file = candidate.file
    differing = [name for name in file.tensors if not same_bytes(file, twin.file, name)]
    foreign = [name for name in differing if not _comparable(file, twin, name)]
    held = [
        hold(file.tensors[name], twin.file.tensors[name], twin.source.tensors[name], imatrix=twin.imatrix)
        for name in differing
        if name not in foreign
    ]
    beyond = [tensor for tensor in held if not tensor.within or _same_maker(file, tensor, set(differing))]
    equal = len(file.tensors) - len(differing)
    parts = [f"{equal} of {len(file.tensors)} tensors equal the reference re-quantised here {twin.made}, byte for byte"]
    if foreign:
        parts.append(f"{_other_form(file, twin, foreign[0])}{f' and {len(foreign) - 1} more' if foreign[1:] else ''}")
    if beyond:
        worst = max(beyond, key=lambda t: (t.beyond, t.differ / t.blocks))
        parts.append(f"worst {worst}")
    if within := [tensor for tensor in held if tensor not in beyond]:
        parts.append(f"explained by another build or machine: {_summary(within)}")
    if foreign or beyond:
        parts.append(_advice(file, twin))
    return [
        plain_check(
            "quantise.tensors_differ",
            "Tensors that the re-quantised reference does not explain",
            len(foreign) + len(beyond),
            subject=candidate.label,
            detail=". ".join(parts),
        )
    ]


def _same_maker(file: GGUFFile, tensor: Held, differing: set[str]) -> bool:
    """Whether the tensor's neighbours say that the same quantiser made them: then another build explains nothing.

    Another build differs in all larger tensors of a type. Neighbours are the tensors of the same type, or all quantised
    ones where it has fewer than three.
    """
    quantised = [t for t in file.tensors.values() if t.name != tensor.name and t.type not in FLOAT_TYPES]
    alike = [t for t in quantised if t.type == tensor.type]
    alike = alike if len(alike) >= 3 else quantised
    return len(alike) >= 3 and sum(t.name not in differing for t in alike) >= SAME_MAKER * len(alike)


def _comparable(file: GGUFFile, twin: Twin, name: str) -> bool:
    mine, other, source = file.tensors[name], twin.file.tensors.get(name), twin.source.tensors.get(name)
    return (
        other is not None
        and source is not None
        and (mine.type, mine.shape, mine.shape) == (other.type, other.shape, source.shape)
    )


def _other_form(file: GGUFFile, twin: Twin, name: str) -> str:
    mine, other = file.tensors[name], twin.file.tensors.get(name)
    if other is None:
        return f"{name} is not in the reference"
    return f"{name} is {mine.type} {list(mine.shape)}, the reference re-quantised here {other.type} {list(other.shape)}"


def _summary(tensors: list[Held]) -> str:
    differ, blocks = Counter[str](), Counter[str]()
    for tensor in tensors:
        differ[tensor.type] += tensor.differ
        blocks[tensor.type] += tensor.blocks
    kinds = ", ".join(f"{kind} {differ[kind]} of {blocks[kind]} blocks" for kind in sorted(differ))
    bits = sum(tensor.last_bit for tensor in tensors)
    return (
        f"{len(tensors)} tensors ({kinds}; {bits} of them in the scale's last bit only), largest difference "
        f"{max(t.largest for t in tensors):.2g} of a block's rms, error at most "
        f"{max(t.worst_ratio for t in tensors):.3g} times the oracle's"
    )


def _advice(file: GGUFFile, twin: Twin) -> str:
    named = file.metadata.get(_IMATRIX_KEY)
    if named is not None and not twin.imatrix:
        return f"The file says it was quantised with the importance matrix {named}: give it with --imatrix"
    if twin.imatrix:
        return "Other weights, another importance matrix, or options of llama-quantize made this file"
    return "Other weights, an importance matrix (--imatrix), or options of llama-quantize made this file"
