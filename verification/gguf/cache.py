"""Stored results of examined tensors, found again by the tensor's bytes.

The result of a tensor depends on its name, type, shape and bytes, on the sources (one `Memory` belongs to one set of
sources), and on the frame: names and shapes of all tensors in the file. If two files share most tensors, for example a
healthy file and a copy with one fault, only the different tensors are examined again. Without a `Memory` nothing is
kept.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from verification.gguf.reader import GGUFFile, GGUFTensor

T = TypeVar("T")


class Memory:
    """Results of examined tensors, for one reference, base and adapter."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}

    def recall(self, make: Callable[[], T], *key: Hashable | GGUFTensor | None) -> T:
        """`make()`, or its earlier result for the same key; a tensor in the key is replaced by its `tensor_key`."""
        parts = tuple(tensor_key(part) if isinstance(part, GGUFTensor) else part for part in key)
        if parts not in self._known:
            self._known[parts] = make()
        found: T = self._known[parts]
        return found


def tensor_key(tensor: GGUFTensor) -> Hashable:
    """Name, type, shape and digest of a tensor."""
    digest = hashlib.blake2b(tensor.raw.data, digest_size=16).digest()
    return tensor.name, tensor.type, tensor.shape, digest


def key_digest(file: GGUFFile) -> Hashable:
    """Digest of all keys."""
    return hashlib.blake2b(pickle.dumps(sorted(file.metadata.items())), digest_size=16).digest()


def frame(file: GGUFFile) -> Hashable:
    """Everything besides the tensor itself that an examination reads from the file."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    shapes = tuple((tensor.name, tensor.shape) for tensor in file.tensors.values())
    counts = tuple(str(file.get(key)) for key in ("block_count", "expert_count"))
    return file.architecture, counts, len(tokens) if isinstance(tokens, list) else 0, hash(shapes)
