"""Train the adapter: SO8T alone or with LoRA, on a full-precision or quantised base, resumable.

The loss counts the assistant's turn only, with its end-of-turn token. The result is an adapter directory and
`training.json` (curves, angles, held-out loss before and after, and the effect of the rotation alone).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PrinterCallback, TrainingArguments, set_seed

from pipeline.config import RunConfig, TrainConfig
from pipeline.progress import Reporter
from pipeline.tokenizer import load_tokenizer
from pipeline.train import placement
from pipeline.train.collate import IGNORED, Collator, EncodedRows, keeps_logits, labelled_only
from pipeline.train.sharding import shard_base, take_request
from pipeline.train.trainer import (
    Restart,
    SaveCurves,
    SO8TTrainer,
    Watch,
    first_rows,
    last_complete_checkpoint,
    restore_curves,
    split_step,
)
from so8t_core import SO8TConfig, gates, save_adapter, trainable_counts
from so8t_core.adapter import layer_of
from so8t_core.errors import InputError
from so8t_core.files import atomic_dir, sha256_path, write_text
from verification.engines import distributed
from verification.engines.bitsandbytes_base import load_quantised
from verification.gate.report import Curve, TrainingRecord

RECORD_NAME = "training.json"
UNITS = {"max_angle": "rad", "mean_angle": "rad", "loss": "nats", "heldout_loss": "nats"}


def train(
    config: RunConfig, base_dir: Path, data_dir: Path, out_dir: Path, work_dir: Path, report: Reporter
) -> TrainingRecord:
    """Train and write the adapter to `out_dir`; checkpoints in `work_dir` serve to resume the same run.

    Every process of a launch calls it: they train together, and the first process writes.

    Raises:
        InputError: no rows, a target or layer that does not exist, a loss that is not finite, or rows of a step that do
            not divide evenly over the processes.
    """
    settings = config.train
    tokenizer = load_tokenizer(base_dir)
    rows = EncodedRows(data_dir / "train.jsonl", tokenizer)
    heldout = EncodedRows(data_dir / "heldout.jsonl", tokenizer, limit=settings.heldout_rows)
    collator = Collator(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
    split = take_request()
    distributed.agree("training rows", sha256_path(data_dir))
    distributed.from_first(lambda: _forget_other_runs(work_dir, config, base_dir, data_dir))
    started = time.monotonic()
    if isinstance(settings.layers, str):
        text = distributed.from_first(lambda: _chosen_layers(config, base_dir, rows, collator, work_dir, report))
        settings = settings.model_copy(update={"layers": json.loads(text)})

    def fit(settings: TrainConfig, name: str, title: str, before: float | None = None) -> _Fitted:
        return _fit(config, settings, base_dir, rows, heldout, collator, work_dir / name, report, title, split, before)

    trained = work_dir / "adapter"  # kept until the end, so that a stopped second fit does not cost the first
    if not distributed.from_first(lambda: (trained / RECORD_NAME).is_file()):
        model = fit(settings, "main", "training")
        with rotation_off(model.peft):
            model.record.heldout_loss_rotation_off = heldout_loss(model.peft, heldout, collator, settings.batch_size)
        if distributed.is_first():
            with atomic_dir(trained) as temporary:
                save_adapter(model.peft, temporary)
                write_text(temporary / RECORD_NAME, model.record.model_dump_json())
        del model
    text = distributed.from_first(lambda: (trained / RECORD_NAME).read_text(encoding="utf-8"))
    record = TrainingRecord.model_validate_json(text)
    if settings.so8t_only_steps:
        alone = settings.model_copy(update={"lora": None, "steps": settings.so8t_only_steps})
        same_start = settings.init_scale == 0  # both adapters then start as the base, which was evaluated
        only = fit(alone, "so8t_only", "rotation alone", record.heldout_loss_before if same_start else None)
        record.so8t_only = {
            "steps": alone.steps,
            "heldout_loss_before": only.record.heldout_loss_before,
            "heldout_loss_after": only.record.heldout_loss_after,
            "max_angle": max((a for _, _, a in only.record.angles_by_layer), default=0.0),
        }
    record.seconds = time.monotonic() - started
    if distributed.is_first():
        with atomic_dir(out_dir) as temporary:
            shutil.copytree(trained, temporary, dirs_exist_ok=True)
            write_text(temporary / RECORD_NAME, record.model_dump_json(indent=1) + "\n")
        shutil.rmtree(work_dir)
    return record


def _forget_other_runs(work_dir: Path, config: RunConfig, base_dir: Path, data_dir: Path) -> None:
    """Remove checkpoints of other settings, another base or other data: to resume them would mix two runs."""
    key = {
        "train": config.train.model_dump(mode="json"),
        "seed": config.seed,
        "base": sha256_path(base_dir),
        "data": sha256_path(data_dir),
    }
    text = json.dumps(key, indent=1, sort_keys=True) + "\n"
    stored = work_dir / "of.json"
    if work_dir.is_dir() and not (stored.is_file() and stored.read_text(encoding="utf-8") == text):
        shutil.rmtree(work_dir)
    write_text(stored, text)


def _chosen_layers(
    config: RunConfig, base_dir: Path, rows: EncodedRows, collator: Collator, work_dir: Path, report: Reporter
) -> str:
    """The layers that `train.layers: auto:N` chooses, as JSON; chosen once and stored beside the checkpoints."""
    kept = work_dir / "layers.json"
    if not kept.is_file():
        settings = config.train
        model = load_base(base_dir, settings.quantization)
        places = placement.rank(model, settings, first_rows(settings, rows, config.seed), collator)
        layers = placement.best_layers(places, placement.wanted(settings.layers))
        report.note(f"  layers with the most gradient: {', '.join(map(str, layers))}")
        write_text(kept, json.dumps(layers))
    return kept.read_text(encoding="utf-8")


def training_arguments(settings: TrainConfig, output_dir: Path, seed: int, **more: Any) -> TrainingArguments:
    """transformers' arguments for a run of `settings`; no checkpoint is saved unless `more` asks for it."""
    arguments: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "learning_rate": settings.learning_rate,
        "warmup_steps": round(settings.warmup_share * settings.steps),
        "lr_scheduler_type": "cosine",
        "max_grad_norm": settings.max_grad_norm,
        "weight_decay": settings.weight_decay,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": seed,
        "data_seed": seed,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "use_cpu": not torch.cuda.is_available(),
        "label_names": ["labels"],
    }
    return TrainingArguments(**{**arguments, **more})


class _Fitted:
    def __init__(self, peft: nn.Module, record: TrainingRecord) -> None:
        self.peft, self.record = peft, record


def _fit(
    config: RunConfig,
    settings: TrainConfig,
    base_dir: Path,
    rows: EncodedRows,
    heldout: EncodedRows,
    collator: Collator,
    work_dir: Path,
    report: Reporter,
    title: str,
    split: bool,
    before: float | None = None,
) -> _Fitted:
    from peft import get_peft_model

    micro, accumulation = split_step(settings.batch_size, settings.gradient_accumulation, distributed.count())
    set_seed(config.seed)
    model = load_base(base_dir, settings.quantization, device="cpu" if split else None)
    if settings.quantization != "none":
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=settings.gradient_checkpointing)
    if settings.gradient_checkpointing:
        model.config.use_cache = False
    peft = get_peft_model(model, adapter_config(settings))
    if split:
        shard_base(peft, settings.quantization)
    if before is None:
        before = heldout_loss(peft, heldout, collator, settings.batch_size)
    checkpointing: dict[str, Any] = {}
    if settings.gradient_checkpointing:
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    arguments = training_arguments(
        settings,
        work_dir,
        config.seed,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        save_strategy="steps",
        save_steps=settings.checkpoint_every,
        save_total_limit=2,
        **checkpointing,
    )
    trainer = SO8TTrainer(settings=settings, model=peft, args=arguments, train_dataset=rows, data_collator=collator)
    checkpoint = distributed.from_first(lambda: last_complete_checkpoint(work_dir))
    torch.manual_seed(config.seed + distributed.rank())  # each process draws its own dropout
    with report.task(title, settings.steps) as advance:
        watch = Watch(
            trainer,
            advance,
            lambda: heldout_loss(peft, heldout, collator, settings.batch_size),
            settings.checkpoint_every,
        )
        if checkpoint is not None:
            done = restore_curves(watch, checkpoint)
            report.note(f"  {title}: going on from step {done} of {settings.steps}")
            advance(done, info="resumed")
        trainer.remove_callback(PrinterCallback)  # curves and bar show the same
        trainer.add_callback(watch)
        if settings.restart_every is not None:
            trainer.add_callback(Restart(settings.restart_every))
        trainer.add_callback(SaveCurves(watch))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    after = heldout_loss(peft, heldout, collator, settings.batch_size)
    watch.curves.setdefault("heldout_loss", []).append((settings.steps, after))
    if watch.curves["heldout_loss"][0][0] != 0:
        watch.curves["heldout_loss"].insert(0, (0, before))
    distributed.wait()
    if distributed.is_first():
        shutil.rmtree(work_dir, ignore_errors=True)
    return _Fitted(peft, _record(peft, settings, before, after, watch))


def adapter_config(settings: TrainConfig) -> SO8TConfig:
    """The adapter that a training section describes."""
    lora = None
    if settings.lora is not None:
        lora = {
            "r": settings.lora.r,
            "lora_alpha": settings.lora.alpha,
            "lora_dropout": settings.lora.dropout,
            "target_modules": list(settings.lora.targets),
        }
    # A gradient decides `auto:N` (`placement`); before, the first N layers stand for them, with as many parameters
    layers = list(range(placement.wanted(settings.layers))) if isinstance(settings.layers, str) else settings.layers
    return SO8TConfig(
        layers=layers,
        init_scale=settings.init_scale,
        targets=settings.targets,
        share=settings.share,
        scale=settings.scale,
        shuffle=settings.shuffle,
        accumulate=settings.restart_every is not None,
        lora=lora,
        task_type="CAUSAL_LM",
    )


def load_base(
    base_dir: Path, quantization: Literal["none", "8bit", "4bit"] = "none", *, device: str | None = None
) -> Any:
    """The base model for training: float32 on a CPU, bfloat16 on a GPU, or 8-bit / 4-bit through bitsandbytes.

    Args:
        device: the model's device; None = this process's GPU if there is one.

    Raises:
        InputError: the model cannot be loaded.
    """
    where = distributed.local_rank() if device is None else device
    try:
        if quantization != "none":
            return load_quantised(base_dir, quantization, device=where)
        cuda = torch.cuda.is_available()
        options: dict[str, Any] = {"device_map": {"": where}} if cuda else {}
        dtype = torch.bfloat16 if cuda else torch.float32
        return AutoModelForCausalLM.from_pretrained(
            base_dir, dtype=dtype, trust_remote_code=False, use_safetensors=True, **options
        )
    except InputError:  # a ValueError too; its message is complete
        raise
    except (OSError, ValueError, ImportError) as error:
        raise InputError(
            f"the base model in {base_dir} cannot be loaded: {str(error).strip().splitlines()[0]}"
        ) from None


@torch.no_grad()
def heldout_loss(model: nn.Module, rows: EncodedRows, collator: Collator, batch_size: int) -> float:
    """Mean cross-entropy per assistant token over held-out rows, nats."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = collator([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        if keeps_logits(model):
            batch = labelled_only(batch)
            labels = batch.pop("shift_labels")  # (B, K), of the K positions that are kept
            del batch["labels"]
        else:
            labels = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=IGNORED)  # (B, T)
        logits = model(**{k: v.to(device) for k, v in batch.items()}).logits  # (B, K or T, V)
        kept = labels != IGNORED
        total += F.cross_entropy(logits[kept.to(device)].float(), labels[kept].to(device), reduction="sum").item()
        count += int(kept.sum())
    model.train(was_training)
    return total / count


@contextmanager
def rotation_off(model: nn.Module) -> Iterator[None]:
    """Replace every rotation and its scale by the identity while the block runs."""
    found = gates(model).values()
    saved = [(gate, {name: value.clone() for name, value in gate.state_dict().items()}) for gate in found]
    try:
        with torch.no_grad():
            for gate in found:
                for parameter in gate.parameters():
                    parameter.zero_()
                if gate.accumulated is not None:
                    gate.restart()  # drops the rotation of the former values
                    for part in gate.parts():
                        part.accumulated.copy_(torch.eye(8))  # type: ignore[union-attr]
        yield
    finally:
        for gate, state in saved:
            gate.load_state_dict(state)


def _record(model: nn.Module, settings: TrainConfig, before: float, after: float, watch: Watch) -> TrainingRecord:
    trainable, rotation = trainable_counts(model)
    of_layer: dict[int, list[torch.Tensor]] = {}  # (n, 4) of each rotation of a layer, largest first
    for name, gate in gates(model).items():
        of_layer.setdefault(layer_of(name), []).extend(part.angles() for part in gate.parts())
    by_layer, by_block = [], []
    for layer, found in of_layer.items():
        angles = torch.cat(found)
        by_layer.append((layer, angles.mean().item(), angles.max().item()))
        by_block.append((layer, [float(f"{angle:.4g}") for angle in angles[:, 0].tolist()]))
    return TrainingRecord(
        steps=settings.steps,
        seconds=0.0,
        trainable_parameters=trainable,
        rotation_parameters=rotation,
        heldout_loss_before=before,
        heldout_loss_after=after,
        curves=[Curve(name=n, unit=UNITS.get(n, ""), points=p) for n, p in watch.curves.items()],
        angles_by_layer=sorted(by_layer),
        angles_by_block=sorted(by_block),
    )
