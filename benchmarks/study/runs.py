"""Run every (seed, arm) once, seed by seed, so that a stopped study is complete for its finished seeds.

The work directory holds base/, heldout/, seedN/data/, seedN/ARM/adapter/ and seedN/ARM.json, whose `key` (settings and
digests of base and rows) decides whether it is up to date.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.study.arms import BASE, Arm, Study
from benchmarks.study.evaluation import evaluate
from benchmarks.study.fitting import FIT_NAME, fit, fit_and_save
from pipeline.base_model import prepare_base
from pipeline.data.build import build_dataset
from pipeline.data.generator import families
from pipeline.data.jsonl import read_jsonl
from pipeline.manifest import locked, versions
from pipeline.progress import Reporter
from pipeline.tokenizer import load_tokenizer
from pipeline.train.collate import Collator, EncodedRows
from pipeline.train.fit import heldout_loss
from so8t_core.errors import InputError
from so8t_core.files import atomic_dir, sha256_file, sha256_path, write_text


class Workshop:
    """The study's base, rows and results on disk."""

    def __init__(self, study: Study, arms: dict[str, Arm], work: Path, report: Reporter) -> None:
        self.study, self.arms, self.work, self.report = study, arms, work, report
        torch.set_num_threads(1)  # so that two arms at once do not slow each other
        self.base = prepare_base(arms[BASE].config.model.base, work / "base")
        self.digest = sha256_path(self.base)
        self.tokenizer = load_tokenizer(self.base)
        pad = self.tokenizer.pad_token_id
        self.collator = Collator(pad if pad is not None else self.tokenizer.eos_token_id)
        self.heldout = self.rows(study.heldout_seed) / "heldout.jsonl"

    def rows(self, seed: int) -> Path:
        """The data directory of a seed, made the first time."""
        out = self.work / "data" / f"seed{seed}"
        if not (out / "report.json").is_file():
            with atomic_dir(out) as temporary:
                build_dataset(self.arms[BASE].config.data, self.tokenizer, temporary, seed)
        return out

    def key(self, arm: Arm, seed: int, *, training_only: bool = False) -> str:
        """The settings and digests that a result depends on; of a training alone, those of `train`."""
        parts = {
            "config": (arm.train if training_only else arm.config).model_dump(mode="json"),
            "method": arm.method,
            "peft": arm.peft,
            "dtype": self.study.base_dtype,
            "base": self.digest,
            "heldout": sha256_file(self.heldout),
            "train": None if arm.name == BASE else sha256_file(self.rows(seed) / "train.jsonl"),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def result_path(work: Path, arm: str, seed: int) -> Path:
    """The file of a result; the base has no training, and so one result without a seed."""
    return work / f"{BASE}.json" if arm == BASE else work / f"seed{seed}" / f"{arm}.json"


def run_all(shop: Workshop, seeds: list[int], names: list[str]) -> None:
    """Run the arms that are not up to date, seed by seed. Two processes may run two seeds at once.

    Raises:
        InputError: an unknown arm, another process at work on the same seed, or the error of an arm.
    """
    if unknown := sorted(set(names) - set(shop.arms)):
        raise InputError(f"unknown arm {unknown[0]!r}; the arms are {', '.join(shop.arms)}")
    for seed in seeds:
        for name in names:
            run_one(shop, shop.arms[name], seed)


def run_one(shop: Workshop, arm: Arm, seed: int) -> None:
    """Train and evaluate one arm with one seed, unless that is up to date."""
    target, key = result_path(shop.work, arm.name, seed), shop.key(arm, seed)
    title = arm.name if arm.name == BASE else f"seed {seed} {arm.name}"
    if target.is_file() and json.loads(target.read_text(encoding="utf-8"))["key"] == key:
        shop.report.note(f"{title}: up to date")
        return
    with locked(target.parent):
        _do(shop, arm, seed, title, target, key)


def _do(shop: Workshop, arm: Arm, seed: int, title: str, target: Path, key: str) -> None:
    started, cpu = time.monotonic(), time.process_time()
    adapter = None if arm.method == "none" else shop.work / f"seed{seed}" / arm.name / f"adapter-{key}"
    fitted: dict[str, Any] = {"parameters": 0}
    if adapter is not None:
        if not (adapter / FIT_NAME).is_file():
            train = EncodedRows(shop.rows(seed) / "train.jsonl", shop.tokenizer)
            heldout = EncodedRows(shop.heldout, shop.tokenizer, limit=arm.train.heldout_rows)
            fit_and_save(
                adapter,
                arm,
                shop.base,
                shop.study.base_dtype,
                train,
                heldout,
                shop.collator,
                seed,
                target.parent / "checkpoints",
                shop.report,
                title,
            )
        fitted = json.loads((adapter / FIT_NAME).read_text(encoding="utf-8"))
    found = evaluate(
        arm, shop.base, adapter, shop.heldout, shop.work / "tmp", lambda what: shop.report.note(f"{title}: {what}")
    )
    record = {
        "arm": arm.name,
        "seed": None if arm.name == BASE else seed,
        "key": key,
        **fitted,
        **found,
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds_all": round(time.process_time() - cpu, 1),
        "load": round(os.getloadavg()[0], 1),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }
    write_text(target, json.dumps(record, indent=1) + "\n")
    means = {name: round(fmean(unit), 4) for name, unit in found["units"].items()}
    shop.report.note(f"{title}: {json.dumps(means)}")


def split_rows(shop: Workshop, seed: int) -> tuple[EncodedRows, EncodedRows]:
    """(training rows, validation rows) of a seed: each n-th training family is kept for validation."""
    plan = shop.study.tuning
    kept = {family.name for family in families(heldout=False)[plan.every - 1 :: plan.every]}
    rows = read_jsonl(shop.rows(seed) / "train.jsonl")
    parts = []
    for name, chosen in (
        ("train", [r for r in rows if r["family"] not in kept]),
        ("validation", [r for r in rows if r["family"] in kept][: plan.validation_rows]),
    ):
        path = shop.work / "tuning" / f"seed{seed}-{name}.jsonl"
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen))
        parts.append(EncodedRows(path, shop.tokenizer))
    return parts[0], parts[1]


def tune(shop: Workshop) -> dict[str, list[dict[str, float]]]:
    """Validation loss of each learning rate of the grid; a person writes the choice into the arms' files.

    Each n-th training family of the tuning seed's rows validates, the others train: the study's rows and its held-out
    families are not used.
    """
    plan = shop.study.tuning
    parts = dict(zip(("train", "validation"), split_rows(shop, plan.seed), strict=True))
    done_path = shop.work / "tuning" / "tuning.json"
    done: dict[str, Any] = json.loads(done_path.read_text(encoding="utf-8")) if done_path.is_file() else {}
    with locked(shop.work / "tuning"):
        for rate_number in range(max(len(rates) for rates in plan.grid.values())):
            for name, rates in plan.grid.items():
                known = done.setdefault(name, [])
                if rate_number >= len(rates) or rates[rate_number] in [point["rate"] for point in known]:
                    continue
                arm = shop.arms[name]
                train = arm.train.model_copy(update={"learning_rate": rates[rate_number], "steps": plan.steps})
                tuned = arm.model_copy(update={"config": arm.config.model_copy(update={"train": train})})
                peft, _ = fit(
                    tuned,
                    shop.base,
                    shop.study.base_dtype,
                    parts["train"],
                    parts["validation"],
                    shop.collator,
                    plan.seed,
                    shop.work / "tuning" / "checkpoints",
                    shop.report,
                    f"tune {name} {rates[rate_number]:g}",
                )
                loss = heldout_loss(peft, parts["validation"], shop.collator, train.batch_size)
                known.append({"rate": rates[rate_number], "loss": loss})
                shop.report.note(f"tune {name} {rates[rate_number]:g}: {loss:.4f} nats")
                write_text(done_path, json.dumps(done, indent=1) + "\n")
    return done
