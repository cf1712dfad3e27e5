"""A Hugging Face model directory: its config.json and its safetensors, read one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

from so8t_core.errors import InputError
from so8t_core.files import read_json

Array = npt.NDArray[np.float32]
_NOT_WEIGHTS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


class Checkpoint(Mapping[str, Array]):
    """A Hugging Face directory's safetensors as float32 arrays, read one at a time.

    Raises:
        InputError: there are none, or one cannot be read.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.config: dict[str, Any] = read_config(self.directory)
        self._file_of: dict[str, Path] = {}
        for path in sorted(self.directory.glob("*.safetensors")):
            try:
                with safe_open(str(path), framework="pt") as shard:
                    self._file_of |= {name: path for name in shard.keys() if not name.endswith(_NOT_WEIGHTS)}  # noqa: SIM118
            except Exception as error:  # safetensors raises its own SafetensorError, which is not exported as a class
                raise InputError(f"{path} is not a readable safetensors file: {error}") from None
        if not self._file_of:
            raise InputError(f"{directory} holds no *.safetensors; save the model with save_pretrained first")

    def __getitem__(self, name: str) -> Array:
        return self.tensor(name).float().numpy()

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, in the shape and dtype it was saved in."""
        with safe_open(str(self._file_of[name]), framework="pt") as shard:
            value: torch.Tensor = shard.get_tensor(name)
        return value

    def saved_in(self, name: str | None) -> str:
        """The float type that a tensor is saved in, F32 for any other; None: of the first tensor."""
        with safe_open(str(self._file_of[name or next(iter(self))]), framework="pt") as shard:
            kind = shard.get_slice(name or next(iter(self))).get_dtype()
        return kind if kind in ("F16", "BF16") else "F32"

    def __iter__(self) -> Any:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory, with a nested text model's keys laid on top."""
    value = read_json(directory / "config.json")
    return {**value, **(value.get("text_config") or {})}
