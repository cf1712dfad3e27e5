"""Batches of encoded rows, padded on the right with the label IGNORED; input_ids, labels, attention_mask are (B, T)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from pipeline.data.jsonl import read_jsonl
from pipeline.data.masking import encode_row
from so8t_core.errors import InputError

Row = dict[str, list[int]]
IGNORED = -100  # the label that cross-entropy leaves out


class EncodedRows(Dataset[Row]):
    """Rows of the data step's JSONL file as token ids and labels, encoded once.

    Raises:
        InputError: the file has no rows, or a row cannot be encoded.
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
    """Pads a list of rows to the longest row."""

    pad_id: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), longest), self.pad_id)  # (B, T)
        labels = torch.full((len(rows), longest), IGNORED)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[i, :length] = torch.tensor(row["input_ids"])
            labels[i, :length] = torch.tensor(row["labels"])
            mask[i, :length] = 1  # by length, not by id: where pad == eos, the real eos must not be masked
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def keeps_logits(model: nn.Module) -> bool:
    """Whether a model, without PEFT's wrapper, can compute logits at chosen positions alone."""
    inner = getattr(model, "get_base_model", lambda: model)()  # PEFT's own forward takes any argument
    return "logits_to_keep" in signature(inner.forward).parameters


def labelled_only(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with two more inputs, by which a transformers model computes logits only where some row has a label.

    `logits_to_keep` (K,) holds those positions, `shift_labels` (B, K) the labels of the tokens behind them. Loss and
    gradients stay the same. Three quarters of a /think row have no label, and the head is a fifth of a small model.
    """
    behind = batch["labels"][:, 1:]  # (B, T-1)
    kept = (behind != IGNORED).any(0).nonzero().squeeze(1)  # (K,)
    return {**batch, "logits_to_keep": kept, "shift_labels": behind[:, kept]}
