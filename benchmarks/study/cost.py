"""Seconds a step and peak memory of every arm: interleaved rounds, each arm in a fresh process with one thread.

The figure is the ratio to LoRA within a round, because other work on the machine slows a whole round. Seconds are CPU
seconds of the process, on a quiet machine equal to wall seconds. Peak memory is the process's largest resident set,
with the base model and the libraries, so that a small adapter does not look free.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.peak import resident
from benchmarks.result_file import machine
from benchmarks.study.arms import Arm
from benchmarks.study.runs import Workshop
from pipeline.manifest import locked
from pipeline.tokenizer import load_tokenizer
from pipeline.train.collate import Collator, EncodedRows
from so8t_core.files import write_text

UNIT = "lora"  # ratios are relative to this arm
COST_NAME = "cost.json"


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time() - self.started)


def one_round(arm: Arm, base: Path, dtype: str, data: Path, steps: int) -> dict[str, float]:
    """Run one arm in a separate process: a step to warm up, then `steps` timed steps."""
    from benchmarks.study.fitting import load, make_trainer, with_adapter

    torch.set_num_threads(1)
    tokenizer = load_tokenizer(base)
    pad = tokenizer.pad_token_id
    rows = EncodedRows(data / "train.jsonl", tokenizer)
    torch.manual_seed(0)
    peft = with_adapter(load(base, dtype), arm)
    train = arm.train.model_copy(update={"steps": steps + 1})
    timed = arm.model_copy(update={"config": arm.config.model_copy(update={"train": train})})
    with tempfile.TemporaryDirectory() as folder:
        collator = Collator(pad if pad is not None else tokenizer.eos_token_id)
        trainer = make_trainer(peft, timed, rows, collator, 0, Path(folder))
        clock = _Clock()
        trainer.add_callback(clock)
        trainer.train()
    peak = resident("VmHWM") * 1e6 / 2**20
    return {"seconds": statistics.median(clock.seconds[1:]), "peak_mib": peak}


def measure_cost(shop: Workshop) -> dict[str, Any]:
    """Run the rounds and write `cost.json` into the work directory."""
    plan = shop.study.cost
    arms = [arm for arm in shop.arms.values() if arm.method != "none"]
    found: dict[str, Any] = {arm.name: {"seconds": [], "peak_mib": []} for arm in arms}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.study.fitting"])
    data = shop.rows(shop.study.seeds[0])
    with (
        locked(shop.work),
        ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool,
        shop.report.task("cost", plan.rounds * len(arms)) as advance,
    ):
        for number in range(plan.rounds):
            for arm in arms if number % 2 == 0 else reversed(arms):
                turn = pool.submit(one_round, arm, shop.base, shop.study.base_dtype, data, plan.steps).result()
                for name, value in turn.items():
                    found[arm.name][name].append(round(value, 4))
                advance(1, info=f"{arm.name} {turn['seconds']:.2f} s")
    record = {"machine": machine().model_dump(), "rounds": plan.rounds, "steps": plan.steps, "arms": found}
    write_text(shop.work / COST_NAME, json.dumps(record, indent=1) + "\n")
    return record
