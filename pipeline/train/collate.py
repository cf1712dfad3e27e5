"""Batches of encoded rows: right padding, labels -100 on padding. Shapes: input_ids, labels, attention_mask (B, T)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.data.jsonl import read_jsonl
from pipeline.data.masking import encode_row
from so8t_core.errors import InputError

Row = dict[str, list[int]]


class EncodedRows(Dataset[Row]):
    """Rows of the data step's JSONL file as token ids and labels, encoded once.

    Raises:
        InputError: the file has no rows, or one that cannot be encoded.
    """

    def __init__(self, path: Path, tokenizer: Any, *, limit: int | None = None) -> None:
        rows = read_jsonl(path)[:limit]
        if not rows:
            raise InputError(f"{path} has no rows; run the data step with other sources or a larger generator")
        self.rows = [encode_row(tokenizer, row["messages"], tools=row.get("tools", ())) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


@dataclass(frozen=True)
class Collator:
    """Pad a list of rows to the longest."""

    pad_id: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), longest), self.pad_id)  # (B, T)
        labels = torch.full((len(rows), longest), -100)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[i, :length] = torch.tensor(row["input_ids"])
            labels[i, :length] = torch.tensor(row["labels"])
            mask[i, :length] = 1  # by length, not by id: where pad == eos the real eos must stay inside
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}
