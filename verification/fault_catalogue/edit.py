"""Faults for GGUF files: each function takes a healthy file and writes a faulty copy of it.

The functions change a file in parts (`Raw`) and the values of single tensors. They write float tensors in the tensor's
type, and quantised tensors with llama.cpp's quantiser, as a converter with that fault would.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from verification.engines.quantise import quantised_bytes
from verification.gguf.reader import STRING, read_gguf
from verification.gguf.writer import Raw
from verification.weight_parity.hypotheses import halves_to_pairs, pairs_to_halves

Array = npt.NDArray[np.float32]
_UINT32, _FLOAT32, _BOOL = 4, 6, 7


def set_metadata(source: Path, target: Path, values: dict[str, Any]) -> Path:
    """Set metadata by key; None removes it."""
    raw = Raw.read(source)
    for key, value in values.items():
        if value is None:
            raw.keys.pop(key, None)
            continue
        new = _BOOL if isinstance(value, bool) else _FLOAT32 if isinstance(value, float) else _UINT32
        new = STRING if isinstance(value, str) else new
        raw.keys[key] = raw.keys[key][0] if key in raw.keys else new, value
    return raw.write(target)


def edit_tensor(source: Path, target: Path, name: str, change: Callable[[Array], Array]) -> Path:
    """Replace a tensor's values, written in the tensor's type (quantised by llama.cpp's quantiser)."""
    shutil.copyfile(source, target)
    tensor = read_gguf(source).tensors[name]
    values = np.ascontiguousarray(change(tensor.values().copy()), dtype=np.float32).reshape(tensor.shape)
    data = quantised_bytes(values, tensor.type)
    assert data is not None
    with open(target, "r+b") as stream:
        stream.seek(tensor.offset)
        stream.write(data.tobytes())
    return target


def transposed(source: Path, target: Path, name: str) -> Path:
    """Copy a file with one matrix (rows, columns) transposed."""
    return edit_tensor(source, target, name, lambda w: w.T)


def scaled(source: Path, target: Path, name: str, factor: float) -> Path:
    """Copy a file with one tensor multiplied by a number."""
    return edit_tensor(source, target, name, lambda w: w * np.float32(factor))


def shifted(source: Path, target: Path, name: str, by: float) -> Path:
    """Gemma's norm + 1, missing (-1) or doubled (+1)."""
    return edit_tensor(source, target, name, lambda w: w + np.float32(by))


def permuted(source: Path, target: Path, name: str, head_rows: int) -> Path:
    """Permute q or k rows from halves to pairs a second time."""
    return edit_tensor(source, target, name, lambda w: halves_to_pairs(w, head_rows))


def unpermuted(source: Path, target: Path, name: str, head_rows: int) -> Path:
    """Leave q or k rows as in the checkpoint: in halves, but llama.cpp needs pairs."""
    return edit_tensor(source, target, name, lambda w: pairs_to_halves(w, head_rows))


def swapped(source: Path, target: Path, one: str, other: str) -> Path:
    """Exchange two tensors of one shape and type."""
    raw = Raw.read(source)
    by_name = {t.name: t for t in raw.tensors}
    by_name[one].data, by_name[other].data = by_name[other].data, by_name[one].data
    return raw.write(target)


def without_tensor(source: Path, target: Path, name: str) -> Path:
    """Copy a file without one tensor."""
    raw = Raw.read(source)
    raw.tensors = [t for t in raw.tensors if t.name != name]
    return raw.write(target)


def renamed(source: Path, target: Path, name: str, new: str) -> Path:
    """Copy a file with one tensor under another name."""
    raw = Raw.read(source)
    for t in raw.tensors:
        t.name = new if t.name == name else t.name
    return raw.write(target)


def poisoned(source: Path, target: Path, name: str, value: float) -> Path:
    """Set one weight of a float tensor to NaN, Inf or another number."""

    def put(w: Array) -> Array:
        w.reshape(-1)[7] = value
        return w

    return edit_tensor(source, target, name, put)


def flipped_bit(source: Path, target: Path, name: str, *, byte: int = 20, bit: int = 6) -> Path:
    """Flip one bit of a tensor's data."""
    shutil.copyfile(source, target)
    with open(target, "r+b") as stream:
        stream.seek(read_gguf(source).tensors[name].offset + byte)
        value = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([value ^ (1 << bit)]))
    return target


def truncated(source: Path, target: Path, keep: int) -> Path:
    """Copy a file's first `keep` bytes."""
    target.write_bytes(source.read_bytes()[:keep])
    return target


def padded(source: Path, target: Path, extra: int = 4096) -> Path:
    """Add bytes after the last tensor."""
    target.write_bytes(source.read_bytes() + bytes(extra))
    return target


def token_type(source: Path, target: Path, token: int, kind: int) -> Path:
    """Set the type of one token: 1 normal, 3 control, 4 user-defined, 6 byte."""
    raw = Raw.read(source)
    raw.keys["tokenizer.ggml.token_type"][1][token] = kind
    return raw.write(target)


def swapped_tokens(source: Path, target: Path, one: int, other: int) -> Path:
    """Exchange two entries of the vocabulary."""
    raw = Raw.read(source)
    tokens = raw.keys["tokenizer.ggml.tokens"][1]
    tokens[one], tokens[other] = tokens[other], tokens[one]
    return raw.write(target)


def rotated_plane(source: Path, target: Path, name: str, angle: float, *, column: int = 0) -> Path:
    """Rotate two columns of a weight by `angle`: an error in one plane of one layer's rotation."""

    def turn(w: Array) -> Array:
        c, s = np.cos(angle), np.sin(angle)
        w = w.astype(np.float64)
        w[:, column : column + 2] = w[:, column : column + 2] @ np.array([[c, -s], [s, c]])
        return w.astype(np.float32)

    return edit_tensor(source, target, name, turn)
