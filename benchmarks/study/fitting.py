"""Train one arm with SO8T's trainer; it also trains stock PEFT adapters.

The record beside the adapter holds the losses, the digest of the batches in their order (all arms of a seed must have
the same digest) and the held-out loss of the first rows, which shows that the saved checkpoint is the trained model.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, OFTConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback, set_seed

from benchmarks.study.arms import Arm
from pipeline.config import TrainConfig
from pipeline.progress import Reporter
from pipeline.train.collate import Collator, EncodedRows
from pipeline.train.fit import adapter_config, heldout_loss, training_arguments
from pipeline.train.trainer import Restart, SO8TTrainer
from so8t_core import gates
from so8t_core.errors import InputError
from so8t_core.files import atomic_dir, write_text

FIT_NAME = "fit.json"
PROBE_ROWS = 4  # held-out rows scored before and after saving
TARGET = "o_proj"  # SO8T's default target; the stock rotation has the same
BLOCK = 8


def with_adapter(model: Any, arm: Arm) -> PeftModel:
    """`model` with a new adapter of the arm."""
    train = arm.train
    if arm.method == "so8t":
        return get_peft_model(model, adapter_config(train))
    if arm.method == "oft":
        return get_peft_model(
            model, OFTConfig(r=0, oft_block_size=BLOCK, target_modules=[TARGET], task_type="CAUSAL_LM")
        )
    if arm.method == "peft":
        fields = dict(arm.peft or {})
        kind = fields.pop("peft_type", None)
        if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
            raise InputError(f"arm {arm.name}: peft.peft_type is {kind!r}, which this peft does not have")
        try:
            stock = PEFT_TYPE_TO_CONFIG_MAPPING[kind](**fields, task_type="CAUSAL_LM")
        except (TypeError, ValueError) as error:
            raise InputError(f"arm {arm.name}: peft: {error}") from None
        return get_peft_model(model, stock)
    lora = train.lora
    assert lora is not None
    return get_peft_model(
        model,
        LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=list(lora.targets),
            task_type="CAUSAL_LM",
        ),
    )


def load(base_dir: Path, dtype: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(base_dir, dtype=getattr(torch, dtype), trust_remote_code=False)


def make_trainer(peft: PeftModel, arm: Arm, rows: EncodedRows, collator: Any, seed: int, work_dir: Path) -> SO8TTrainer:
    """SO8T's trainer with the arm's settings; it saves no checkpoints."""
    train: TrainConfig = arm.train
    arguments = training_arguments(train, work_dir, seed)
    trainer = SO8TTrainer(settings=train, model=peft, args=arguments, train_dataset=rows, data_collator=collator)
    trainer.remove_callback(PrinterCallback)
    if train.restart_every is not None and arm.method == "so8t":
        trainer.add_callback(Restart(train.restart_every))
    return trainer


class Digested:
    """A collator that keeps one digest of all its batches."""

    def __init__(self, collator: Collator) -> None:
        self.collator, self._digest = collator, hashlib.sha256()

    def __call__(self, rows: Any) -> dict[str, torch.Tensor]:
        batch = self.collator(rows)
        self._digest.update(batch["input_ids"].numpy().tobytes())
        return batch

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()[:16]


class _Losses(TrainerCallback):
    def __init__(self, trainer: SO8TTrainer, advance: Any) -> None:
        self.trainer, self.advance = trainer, advance
        self.losses: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        loss = self.trainer.take_terms()["task"]
        self.losses.append(round(loss, 5))
        self.advance(1, info=f"loss {loss:.3f}")
        return control


def fit(
    arm: Arm,
    base_dir: Path,
    dtype: str,
    rows: EncodedRows,
    heldout: EncodedRows,
    collator: Collator,
    seed: int,
    work_dir: Path,
    report: Reporter,
    title: str,
) -> tuple[PeftModel, dict[str, Any]]:
    """Train; returns the model and the record for its adapter's folder."""
    set_seed(seed)
    peft = with_adapter(load(base_dir, dtype), arm)
    digested = Digested(collator)
    trainer = make_trainer(peft, arm, rows, digested, seed, work_dir)
    started = time.process_time()
    with report.task(title, arm.train.steps) as advance:
        losses = _Losses(trainer, advance)
        trainer.add_callback(losses)
        trainer.train()
    shutil.rmtree(work_dir, ignore_errors=True)
    kept = {
        "losses": losses.losses,
        "batches": digested.digest,
        "parameters": sum(p.numel() for p in peft.parameters() if p.requires_grad),
        "cpu_seconds": round(time.process_time() - started, 1),
        "probe_loss": heldout_loss(peft, _first(heldout, PROBE_ROWS), collator, PROBE_ROWS),
        **_angles(peft),
    }
    return peft, kept


def fit_and_save(out_dir: Path, *args: Any) -> None:
    """`fit`, with adapter and record in `out_dir`, whole or not at all."""
    peft, kept = fit(*args)
    with atomic_dir(out_dir) as temporary:
        peft.save_pretrained(str(temporary), save_embedding_layers=False)
        write_text(temporary / FIT_NAME, json.dumps(kept, indent=1) + "\n")


def _first(rows: EncodedRows, count: int) -> EncodedRows:
    part = EncodedRows.__new__(EncodedRows)
    part.rows = rows.rows[:count]
    return part


def _angles(peft: nn.Module) -> dict[str, float]:
    found = [part.angles() for gate in gates(peft).values() for part in gate.parts()]
    if not found:
        return {}
    angles = torch.cat(found)
    return {"mean_angle": angles.mean().item(), "max_angle": angles.max().item()}
