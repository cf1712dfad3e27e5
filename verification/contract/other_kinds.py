"""Checks of files that are not a language model: the keys and tensors of each kind must fit together.

LoRA: tensor pairs `X.lora_a` (rank, in) and `X.lora_b` (out, rank), and alpha. Projector: every declared encoder with
its blocks. Control vector: layers. Embedding model: pooling type. Importance matrix: entries.
Sources: gguf, constants.py (keys); llama.cpp, src/llama-adapter.cpp, tools/mtmd/clip.cpp, common/imatrix-loader.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from so8t_core.errors import InputError
from verification.contract.finding import Finding, show
from verification.gguf.imatrix import read_imatrix
from verification.gguf.kind import POOLINGS, Name
from verification.gguf.reader import GGUFFile

_AGAIN = "convert it again"
_PROJECTIONS = ("mm.", "resampler.", "adapter.", "model.", "v.merger", "a.proj")
_ENCODERS = {"vision": "v.", "audio": "a."}  # the prefix of an encoder's tensors


def parts(file: GGUFFile, kind: Name) -> list[Finding]:
    """The parts of the file that do not fit together."""
    checks: dict[Name, Callable[[GGUFFile], Iterator[Finding]]] = {
        "lora": _lora,
        "projector": _projector,
        "control_vector": _control_vector,
        "embedding": _pooled,
        "reranker": _pooled,
        "imatrix": _imatrix,
    }
    return list(checks[kind](file)) if kind in checks else []


def _lora(file: GGUFFile) -> Iterator[Finding]:
    """Check that each pair has one rank, and that the scale is a number."""
    alpha = file.metadata.get("adapter.lora.alpha")
    if file.metadata.get("adapter.type", "lora") != "lora":
        yield Finding("adapter.type", "lora", show(file.metadata["adapter.type"]), _AGAIN)
    if alpha is None or alpha == 0:
        yield Finding("adapter.lora.alpha", "a number other than 0", show(alpha), _AGAIN, "the adapter does nothing")
    if not file.tensors:
        yield Finding("tensors", "pairs of lora_a and lora_b", "none", _AGAIN)
    for name, tensor in file.tensors.items():
        stem, _, half = name.rpartition(".lora_")
        if half not in ("a", "b"):
            if not name.endswith("norm.weight"):  # trained norms are not in pairs
                yield Finding(name, "a name that ends in .lora_a or .lora_b", "another", _AGAIN)
            continue
        other = file.tensors.get(f"{stem}.lora_{'b' if half == 'a' else 'a'}")
        if other is None:
            yield Finding(stem, "lora_a and lora_b", f"lora_{half} alone", _AGAIN, "half of a pair is missing")
        elif half == "a":
            if len(tensor.shape) < 2 or len(tensor.shape) != len(other.shape):
                yield Finding(stem, "two matrices", f"{list(tensor.shape)} and {list(other.shape)}", _AGAIN)
            elif other.shape[-1] not in tensor.shape[-2:]:  # an embedding's pair is transposed
                found = f"lora_a {list(tensor.shape)}, lora_b {list(other.shape)}"
                yield Finding(stem, "one rank in both", found, _AGAIN, "halves of two adapters")
        elif not tensor.raw.any():
            yield Finding(name, "weights", "zeros", "train the adapter", "the adapter does nothing here")


def _projector(file: GGUFFile) -> Iterator[Finding]:
    """Check that each declared encoder has all its blocks, and that an undeclared encoder has no tensors."""
    declared = {kind: file.metadata.get(f"clip.has_{kind}_encoder", False) for kind in _ENCODERS}
    if not any(declared.values()):
        yield Finding("clip.has_vision_encoder", "an encoder, for images or sound", "none declared", _AGAIN)
    for kind, prefix in _ENCODERS.items():
        held = {name for name in file.tensors if name.startswith(prefix)}
        if bool(held) != bool(declared[kind]):
            found = f"{len(held)} tensors of {prefix}*"
            yield Finding(f"clip.has_{kind}_encoder", show(declared[kind]), found, _AGAIN, "key and tensors disagree")
        if not held:
            continue
        types = [file.metadata.get(key) for key in ("clip.projector_type", f"clip.{kind}.projector_type")]
        if not any(types) and not file.metadata.get("clip.has_llava_projector"):
            yield Finding("clip.projector_type", "a projector's name", "nothing", _AGAIN)
        yield from _blocks(file, kind, prefix)
    if not any(name.startswith(_PROJECTIONS) for name in file.tensors):
        yield Finding("mm.*", "a projection into the language model", "none", _AGAIN, "the projector itself is missing")


def _blocks(file: GGUFFile, kind: str, prefix: str) -> Iterator[Finding]:
    stated, width = (file.metadata.get(f"clip.{kind}.{key}") for key in ("block_count", "embedding_length"))
    numbers = {int(name.split(".")[2]) for name in file.tensors if _numbered(name, f"{prefix}blk.")}
    absent = sorted(set(range(stated if isinstance(stated, int) and stated <= 4096 else 0)) - numbers)
    if numbers and absent:
        gone = f"{len(absent)} of {stated} blocks missing, first {absent[0]}"
        yield Finding(f"clip.{kind}.block_count", f"{stated} blocks", gone, _AGAIN, "a layer is missing")
    for part in ("attn_q", "attn_k", "attn_v"):
        tensor = file.tensors.get(f"{prefix}blk.0.{part}.weight")
        if tensor is not None and isinstance(width, int) and tensor.shape[-1] != width:
            yield Finding(f"{prefix}blk.0.{part}.weight", f"{width} columns", f"{tensor.shape[-1]}", _AGAIN)


def _numbered(name: str, prefix: str) -> bool:
    number = name.removeprefix(prefix).partition(".")[0]
    return name.startswith(prefix) and number.isascii() and number.isdigit() and len(number) < 6


def _control_vector(file: GGUFFile) -> Iterator[Finding]:
    """Check that all directions have one width, and that layers count from 1."""
    shapes = {tensor.shape for tensor in file.tensors.values()}
    if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
        yield Finding("direction.*", "vectors of one width", show(sorted(shapes)[:3]), _AGAIN)
    for name in file.tensors:
        number = name.removeprefix("direction.")
        if not (number.isascii() and number.isdigit() and int(number) > 0):
            yield Finding(name, "direction.N with a layer from 1 on", "another name", _AGAIN)


def _pooled(file: GGUFFile) -> Iterator[Finding]:
    """Check that llama.cpp knows the pooling type."""
    pooling = file.get("pooling_type")
    if pooling is not None and pooling not in (0, *POOLINGS):
        known = ", ".join(f"{number} {name}" for number, name in POOLINGS.items())
        yield Finding(f"{file.architecture}.pooling_type", f"0 none, {known}", show(pooling), _AGAIN)


def _imatrix(file: GGUFFile) -> Iterator[Finding]:
    """Check that sums and counts give every channel an importance."""
    try:
        read_imatrix(file.path)
    except InputError as error:
        reason = str(error).removeprefix(f"importance matrix {file.path}").lstrip(": ")
        yield Finding(file.path.name, "sums and counts of every entry", reason, "make the matrix again")
