"""Run all steps once at Phi-3.5-mini's exact size, with random weights, and measure each step on this machine.

    python scripts/phi35_full_size.py --work DIR --out RESULT.json      # 3.8 B parameters: 40 GB of disk
    python scripts/phi35_full_size.py --work DIR --out RESULT.json --miniature

Stages: make (weights layer by layer), train (adapter of configs/phi35_mini.yaml on a bfloat16 base, one step), bake,
convert (F16), quantise (Q8_0, Q4_K_M), lint. Each stage is a separate process; its memory and that of its children is
sampled ten times a second: `own` is memory that is not backed by a file, `all` includes mapped files. A stage with a
result in RESULT.json is not run again. Files that no later stage needs are deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
STAGES = ("make", "train", "bake", "convert F16", "quantise Q8_0", "quantise Q4_K_M", "lint Q4_K_M")
TOKENS = 64  # of the training step's one row


def make(work: Path, miniature: bool) -> dict[str, Any]:
    from phi3_miniature import FULL, Size, save_miniature

    save_miniature(work / "base", Size() if miniature else FULL)
    return {}


def train(work: Path, miniature: bool) -> dict[str, Any]:
    """One optimiser step of the shipped configuration's adapter: rotations on all layers, LoRA inside, with PET."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from pipeline.config import load_config
    from pipeline.train.fit import adapter_config
    from pipeline.train.pet import HiddenStates, penalty
    from so8t_core import gates, save_adapter, trainable_counts

    settings = load_config(ROOT / "configs" / "phi35_mini.yaml").train
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.bfloat16, trust_remote_code=False)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
    model = get_peft_model(base, adapter_config(settings))
    assert settings.pet is not None
    states = HiddenStates(model, settings.pet.layers)
    slow = [p for n, p in model.named_parameters() if p.requires_grad and "so8t" not in n]
    fast = [p for n, p in model.named_parameters() if p.requires_grad and "so8t" in n]
    optimiser = torch.optim.AdamW(
        [{"params": slow, "lr": settings.learning_rate}, {"params": fast, "lr": settings.rotation_learning_rate}],
        weight_decay=0.0,
    )
    ids = torch.randint(3, 1000, (1, TOKENS))
    before = {name: gate.theta.detach().clone() for name, gate in gates(model).items()}
    losses, seconds = [], []
    for step in range(2):  # the second forward shows the step's effect
        started = time.monotonic()
        output = model(input_ids=ids, labels=ids)
        bends = penalty(states.take(), {"input_ids": ids})
        losses.append(float(output.loss.detach()))
        if step == 0:
            (output.loss + settings.pet.warmup * bends).backward()
            optimiser.step()
            seconds.append(time.monotonic() - started)
    moved = sum(not torch.equal(before[name], gate.theta) for name, gate in gates(model).items())
    save_adapter(model, work / "adapter")
    trainable, rotation = trainable_counts(model)
    return {
        "tokens": TOKENS,
        "seconds_of_the_step": round(seconds[0], 1),
        "loss_before": round(losses[0], 4),
        "loss_after": round(losses[1], 4),
        "rotations_that_moved": f"{moved} of {len(before)}",
        "trainable": trainable,
        "of_which_rotation": rotation,
    }


def bake(work: Path, miniature: bool) -> dict[str, Any]:
    from so8t_core import bake_checkpoint

    bake_checkpoint(work / "base", work / "adapter", work / "baked")
    shutil.rmtree(work / "base")
    return {"bytes": sum(p.stat().st_size for p in (work / "baked").iterdir())}


def convert(work: Path, miniature: bool, kind: str) -> dict[str, Any]:
    from verification.engines.convert import convert as to_gguf
    from verification.gguf.reader import read_gguf

    path = to_gguf(work / "baked", work / f"m-{kind}.gguf", outtype=kind.lower())
    return {"bytes": path.stat().st_size, "general.name": read_gguf(path).metadata["general.name"]}


def quantise(work: Path, miniature: bool, kind: str) -> dict[str, Any]:
    from collections import Counter

    from verification.engines.quantise import nominal_types
    from verification.engines.quantise import quantise as to_quant
    from verification.gguf.reader import read_gguf

    path = to_quant(work / "m-F16.gguf", work / f"m-{kind}.gguf", kind, threads=len(os.sched_getaffinity(0)))
    rows = nominal_types(read_gguf(path))
    found = {
        "bytes": path.stat().st_size,
        "types": dict(Counter(row.actual for row in rows)),
        "fallbacks": sum(row.is_fallback for row in rows),
    }
    if kind == "Q8_0":
        path.unlink()
    return found


def lint(work: Path, miniature: bool, kind: str) -> dict[str, Any]:
    from verification.commands.lint import lint as examine

    report = examine(work / f"m-{kind}.gguf", reference=work / "baked")
    refused = [f"{check.name}: {check.detail}"[:200] for check in report.checks if check.status == "fail"]
    return {"verdict": report.verdict, "checks": len(report.checks), "refused": refused}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--work", type=Path, required=True)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--miniature", action="store_true")
    arguments.add_argument("--stage", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.stage:
        name, _, kind = given.stage.partition(" ")
        found = globals()[name](given.work, given.miniature, *([kind] if kind else []))
        print(json.dumps(found))
        return
    given.work.mkdir(parents=True, exist_ok=True)
    result = json.loads(given.out.read_text()) if given.out.is_file() else {"machine": machine(), "stages": {}}
    for stage in STAGES:
        if stage in result["stages"]:
            continue
        print(f"{stage} ...", file=sys.stderr, flush=True)
        result["stages"][stage] = measured(stage, given)
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(given.work)
    show(result)


def measured(stage: str, given: argparse.Namespace) -> dict[str, Any]:
    """Run one stage in a separate process and watch its memory and the disk."""
    command = [sys.executable, __file__, "--stage", stage, "--work", str(given.work), "--out", str(given.out)]
    command += ["--miniature"] if given.miniature else []
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    own = everything = disk = 0
    while process.poll() is None:
        a, b = memory(process.pid)
        own, everything, disk = max(own, a), max(everything, b), max(disk, used(given.work))
        time.sleep(0.1)
    out, errors = process.communicate()
    if process.returncode:
        sys.exit(f"{stage} failed:\n{errors[-3000:]}")
    return {
        "seconds": round(time.monotonic() - started, 1),
        "own_gb": round(own / 1e9, 2),
        "all_gb": round(everything / 1e9, 2),
        "disk_gb": round(disk / 1e9, 2),
        **json.loads(out.splitlines()[-1]),
    }


def memory(pid: int) -> tuple[int, int]:
    """(bytes not backed by files, all resident bytes) of a process and its children."""
    import psutil

    own = everything = 0
    try:
        top = psutil.Process(pid)
        for process in (top, *top.children(recursive=True)):
            info = process.memory_info()
            own, everything = own + info.rss - info.shared, everything + info.rss
    except psutil.Error:
        pass  # the process has just ended
    return own, everything


def used(work: Path) -> int:
    total = 0
    for path in work.rglob("*"):
        try:
            total += path.stat().st_blocks * 512
        except OSError:
            continue  # just renamed
    return total


def machine() -> dict[str, Any]:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory_bytes / 1e9, 1),
        "python": platform.python_version(),
    }


def show(result: dict[str, Any]) -> None:
    known = ("seconds", "own_gb", "all_gb", "disk_gb")
    print("| stage | seconds | memory of its own, GB | with mapped files, GB | disk, GB | found |")
    print("|---|---|---|---|---|---|")
    for stage, row in result["stages"].items():
        rest = ", ".join(f"{key} {value}" for key, value in row.items() if key not in known)
        print(f"| {stage} | {row['seconds']} | {row['own_gb']} | {row['all_gb']} | {row['disk_gb']} | {rest} |")


if __name__ == "__main__":
    main()
