"""The `Trainer` with SO8T's two extra terms: loss = task + lambda(step) * PET + w * orthogonality.

`pet` computes PET's term. theta may have its own learning rate.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pipeline.config import TrainConfig
from pipeline.train.collate import EncodedRows, Row, keeps_logits, labelled_only
from pipeline.train.pet import HiddenStates, penalty, triples
from so8t_core import (
    PETSchedule,
    gates,
    orthogonality_error,
    orthogonality_loss,
    plane_angles,
    restart,
)
from so8t_core.errors import InputError
from so8t_core.files import write_text
from verification.engines import distributed

CURVES_NAME = "so8t_curves.json"


class Order(Sampler[int]):
    """Row numbers of a whole run: one shuffle of all rows after another, a function of seed and lengths alone.

    A batch is padded to its longest row, so rows of similar length are put together: the rows of WINDOW steps are
    sorted by length and dealt to these steps, and the steps are shuffled. No row is left out or comes more often. The
    Trainer's own sampler ends every epoch with a short batch, whose rows several processes would divide differently.

    Args:
        lengths: tokens of each row.
        wanted: total of row numbers, a multiple of `step`.
        step: rows of one optimiser step.
    """

    WINDOW = 16

    def __init__(self, lengths: Sequence[int], wanted: int, step: int, seed: int) -> None:
        self.lengths, self.wanted, self.step, self.seed = lengths, wanted, step, seed

    def __len__(self) -> int:
        return self.wanted

    def __iter__(self) -> Iterator[int]:
        shuffled, window = self._shuffled(), self.WINDOW * self.step
        for start in range(0, self.wanted, window):
            rows = sorted(islice(shuffled, min(window, self.wanted - start)), key=self.lengths.__getitem__)
            steps = [rows[first : first + self.step] for first in range(0, len(rows), self.step)]
            generator = torch.Generator().manual_seed(self.seed + start)
            for number in torch.randperm(len(steps), generator=generator).tolist():
                yield from steps[number]

    def _shuffled(self) -> Iterator[int]:
        for epoch in count():
            generator = torch.Generator().manual_seed(self.seed + epoch)
            yield from torch.randperm(len(self.lengths), generator=generator).tolist()


def order(settings: TrainConfig, rows: Sequence[Row] | EncodedRows, seed: int) -> Order:
    """The order in which a run of `settings` learns from `rows`."""
    step = settings.batch_size * settings.gradient_accumulation
    return Order([len(rows[i]["input_ids"]) for i in range(len(rows))], settings.steps * step, step, seed)


def first_rows(settings: TrainConfig, rows: Sequence[Row] | EncodedRows, seed: int) -> list[Row]:
    """The rows that the first optimiser step learns from."""
    step = settings.batch_size * settings.gradient_accumulation
    return [rows[i] for i in islice(order(settings, rows, seed), step)]


def split_step(batch_size: int, accumulation: int, processes: int) -> tuple[int, int]:
    """(rows a micro-batch, micro-batches a step) of each process; all processes take batch_size * accumulation rows.

    So the rows of a step, and the result, do not depend on the number of processes.

    Raises:
        InputError: the rows of a step do not divide evenly over the processes.
    """
    rows, left = divmod(batch_size * accumulation, processes)
    if left:
        raise InputError(
            f"a step has {batch_size * accumulation} rows (train.batch_size {batch_size} x train.gradient_accumulation "
            f"{accumulation}), which {processes} processes cannot share evenly; make it a multiple of {processes}"
        )
    micro = max(size for size in range(1, min(batch_size, rows) + 1) if rows % size == 0)
    return micro, rows // micro


class SO8TTrainer(Trainer):
    """Trainer over a model that carries an SO8T adapter; see the module's docstring for the loss."""

    optimizer: torch.optim.Optimizer | None

    def __init__(self, *, settings: TrainConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.settings = settings
        self.extra: dict[str, float] = {}  # the step's task loss and extra terms so far, for the curves
        pet = settings.pet
        self._states = HiddenStates(self.model, pet.layers) if pet else None
        self._schedule = PETSchedule(pet.warmup, pet.main, pet.anneal) if pet else None
        self._triples = 0.0  # number in the step's micro-batches of all processes
        self._keeps_logits = keeps_logits(self.model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        return order(self.settings, self.train_dataset, self.args.seed)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """With several processes, the trained parameters get the mean gradient of all processes; the frozen parameters
        are ignored, so that they may be split (`sharding`).
        """
        if self.args.world_size == 1 or isinstance(model, DistributedDataParallel):
            return model
        alone = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        alone += [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, alone)  # type: ignore[no-untyped-call]
        devices = [self.args.device] if self.args.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        own = sum(triples(batch) for batch in batches)
        self._triples = float(self.accelerator.reduce(torch.as_tensor(own, device=device), "sum"))
        return batches, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task is a mean over all labels of the step's rows, PET a mean over all their triples, for any split of
        the rows into micro-batches and processes.

        Where the model divides by `num_items_in_batch` itself, the Trainer adds micro-batches without dividing.
        Gradients are averaged over processes, so a term that has to be summed is multiplied by their number.

        Raises:
            InputError: the loss is NaN or Inf.
        """
        if self._keeps_logits:
            inputs = labelled_only(inputs)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        steps = self.current_gradient_accumulation_steps
        divided = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        self._add("task", loss.detach().item() / (1 if divided else steps))
        if not torch.isfinite(loss):
            raise InputError(
                f"the loss became {loss.item()} at step {self.state.global_step}; "
                "lower train.learning_rate and run again"
            )
        if self._states is not None and self._schedule is not None and self.settings.pet is not None and model.training:
            weight = self._schedule(self.state.global_step, self.settings.steps)
            of_step = triples(inputs) / max(self._triples, 1) * self.args.world_size
            bends = penalty(self._states.take(), inputs, huber_delta=self.settings.pet.huber_delta)
            bends = (bends * of_step.to(bends.device)).to(loss.device)
            loss = loss + (1 if divided else steps) * weight * bends
            self.extra["lambda"] = weight
            self._add("pet", bends.detach().item())
        if self.settings.orthogonality_weight > 0:
            share = 1 / steps if divided else 1.0
            loss = loss + share * self.settings.orthogonality_weight * orthogonality_loss(model)
        return (loss, outputs) if return_outputs else loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's writer reports a full disk as RuntimeError
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"cannot write the checkpoint of step {self.state.global_step} to {self.args.output_dir}: {reason}. "
                "Free some space and run again: training goes on from the checkpoint before"
            ) from None

    def _add(self, name: str, value: float) -> None:
        self.extra[name] = self.extra.get(name, 0.0) + value

    def take_terms(self) -> dict[str, float]:
        """Return the step's terms of the loss, as means over all processes, and forget them."""
        names = sorted(self.extra)
        values = torch.tensor([self.extra[name] for name in names], dtype=torch.float64, device=self.args.device)
        means = self.accelerator.reduce(values, "mean").tolist()
        self.extra = {}
        return dict(zip(names, means, strict=True))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            found = gates(self.model).values()
            rotation = {id(part.theta) for gate in found for part in gate.parts()}
            scale = {id(gate.log_scale) for gate in found if gate.log_scale is not None}
            named = [p for p in self.model.parameters() if p.requires_grad]
            own, settings = self.settings.learning_rate, self.settings
            turning, scaling = settings.rotation_learning_rate or own, settings.scale_learning_rate or own
            groups = [
                # Weight decay is for LoRA alone: on theta it would pull the rotation towards the identity.
                {"params": [p for p in named if id(p) in rotation], "lr": turning, "weight_decay": 0.0},
                {"params": [p for p in named if id(p) in scale], "lr": scaling, "weight_decay": 0.0},
                {"params": [p for p in named if id(p) not in rotation | scale], "lr": own},
            ]
            self.optimizer = torch.optim.AdamW(
                [group for group in groups if group["params"]],
                lr=self.settings.learning_rate,
                betas=(0.9, 0.999),
                weight_decay=self.settings.weight_decay,
            )
        return self.optimizer


class Watch(TrainerCallback):
    """Curves, progress and the held-out loss; called once per optimiser step."""

    def __init__(self, trainer: SO8TTrainer, advance: Any, heldout: Callable[[], float], every: int) -> None:
        self.trainer, self.advance, self.heldout, self.every = trainer, advance, heldout, every
        self.curves: dict[str, list[tuple[int, float]]] = {}
        self._rate = 0.0  # learning rate of the step's first group, the rotation

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Keep the step's learning rate: at the step's end the optimizer already holds the next step's."""
        self._rate = float(kwargs["optimizer"].param_groups[0]["lr"])
        return control

    def add(self, name: str, step: int, value: float) -> None:
        """Add one point to a curve."""
        self.curves.setdefault(name, []).append((step, value))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        step = state.global_step
        extra = self.trainer.take_terms()
        self.add("loss", step, extra["task"])
        for name in ("lambda", "pet"):
            if name in extra:
                self.add(name, step, extra[name])
        found = [(name, part) for name, gate in gates(self.trainer.model).items() for part in gate.parts()]
        angles = torch.cat([plane_angles(part.theta) for _, part in found])  # (all blocks, 4)
        with torch.no_grad():
            error = max(orthogonality_error(part.rotation()).max().item() for _, part in found)
        if not torch.isfinite(angles).all():
            bad = next(name for name, part in found if not bool(torch.isfinite(part.theta).all()))
            raise InputError(f"theta of {bad} is NaN or Inf at step {step}; lower train.rotation_learning_rate")
        self.add("max_angle", step, angles.max().item())
        self.add("mean_angle", step, angles.mean().item())
        self.add("orthogonality", step, error)
        self.add("learning_rate", step, self._rate)
        if step % self.every == 0 and step < args.max_steps:
            self.add("heldout_loss", step, self.heldout())
        self.advance(1, info=f"loss {extra['task']:.3f}")
        return control


class Restart(TrainerCallback):
    """Every few steps theta moves into the product of earlier rotations, and the optimiser's state of theta is dropped.

    Adam's means belong to the coordinates of the old theta. LoRA and scale do not change, and their means stay.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step % self.every == 0 and state.global_step < args.max_steps:
            model = kwargs["model"]
            restart(model)
            for gate in gates(model).values():
                for part in gate.parts():
                    kwargs["optimizer"].state.pop(part.theta, None)
        return control


class SaveCurves(TrainerCallback):
    """Write the curves as the last file of each checkpoint: a checkpoint without them is not complete."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if not distributed.is_first():
            return control
        folder = Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        write_text(folder / CURVES_NAME, json.dumps(self.watch.curves))
        return control


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint below `folder`, or None."""
    found = [p for p in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (p / CURVES_NAME).is_file()]
    return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def restore_curves(watch: Watch, checkpoint: Path) -> int:
    """Give `watch` the curves of an interrupted run; returns their last step."""
    curves = json.loads((checkpoint / CURVES_NAME).read_text(encoding="utf-8"))
    watch.curves = {name: [(int(s), float(v)) for s, v in points] for name, points in curves.items()}
    return int(checkpoint.name.rpartition("-")[2])
