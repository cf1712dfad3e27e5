"""A Hugging Face model directory: its config.json and its safetensors, read one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from so8t_core.checkpoint_admission import admit_checkpoint
from so8t_core.files import read_json
from verification.reference.config_forms import as_published

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[np.float32]
_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # types with which numpy reads the bytes
_NOT_WEIGHTS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


class Checkpoint(Mapping[str, Array]):
    """A Hugging Face directory's safetensors as float32 arrays, read one at a time.

    Raises:
        InputError: the directory is refused; see `admit_checkpoint`.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.config: dict[str, Any] = read_config(self.directory)
        weights, self.notes = admit_checkpoint(self.directory)
        self._file_of = {n: path for n, path in weights.file_of.items() if not n.endswith(_NOT_WEIGHTS)}
        self._entries = weights.entries

    def __getitem__(self, name: str) -> Array:
        """One tensor as float32, read by numpy, because torch takes seconds to import; torch reads 8-bit floats."""
        entry = self._entries[name]
        if entry.dtype not in _TYPES:
            return self.tensor(name).float().numpy()
        kind = np.dtype(_TYPES[entry.dtype])
        found = np.fromfile(self._file_of[name], kind, entry.nbytes // kind.itemsize, offset=entry.begin)
        if entry.dtype == "BF16":  # the upper half of a float32
            return (found.astype(np.uint32) << 16).view(np.float32).reshape(entry.shape)
        with np.errstate(over="ignore"):
            return found.astype(np.float32, copy=False).reshape(entry.shape)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, in its saved shape and dtype."""
        with safe_open(str(self._file_of[name]), framework="pt") as shard:
            value: torch.Tensor = shard.get_tensor(name)
        return value

    def saved_in(self, name: str | None) -> str:
        """The float type of a saved tensor, F32 for other types; the name None means the first tensor."""
        kind = self._entries[name or next(iter(self))].dtype
        return kind if kind in ("F16", "BF16") else "F32"

    @property
    def size(self) -> int:
        """Bytes of all its weights."""
        return sum(self._entries[name].nbytes for name in self)

    def __iter__(self) -> Any:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory; keys of a nested text model replace those of the model."""
    value = as_published(read_json(directory / "config.json"))
    text = value.get("text_config")
    return {**value, **(text if isinstance(text, dict) else {})}
