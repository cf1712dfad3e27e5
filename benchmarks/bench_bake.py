"""The bake against its peers, in interleaved rounds: PEFT's merge of OFT for one weight, a copy for a checkpoint.

`tox -e bench` runs it. The checkpoint is synthetic, with the shapes of Phi-3.5: all 32 layers (7.6 GB, and twice as
much free disk) with SO8T_BENCH_FULL=1, otherwise a few narrower layers (about 400 MB).
Bars: one weight at least 10 times as fast as PEFT; a checkpoint at most 1.5 times copy + fsync + sha256 of the same
files plus the fold of its o_proj, in 1 GB of memory.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import OFTConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.side_by_side import comparisons, of_memory
from so8t_core import bake_checkpoint
from so8t_core.files import fsync, sha256_file
from so8t_core.folding import Fold

FULL = os.environ.get("SO8T_BENCH_FULL") == "1"
SHAPE = {"layers": 32, "hidden": 3072, "intermediate": 8192, "vocab": 32064}
SMALL = {"layers": 4, "hidden": 1536, "intermediate": 4096, "vocab": 32064}
TINY = {"layers": 2, "hidden": 1536, "intermediate": 4096, "vocab": 8192}  # a quick run

CHILD = """
import sys, time
from so8t_core import bake_checkpoint
start = time.perf_counter()
bake_checkpoint(*sys.argv[1:])
seconds = time.perf_counter() - start
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, int(peak.split()[1]) * 1024)
"""


def make_checkpoint(
    directory: Path, *, layers: int, hidden: int, intermediate: int, vocab: int, files: int = 2
) -> Path:
    """A Phi-3-shaped bfloat16 checkpoint of random values in `files` files, written one tensor at a time."""
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    shapes["model.norm.weight"] = (hidden,)
    for k in range(layers):
        shapes |= {
            f"model.layers.{k}.self_attn.qkv_proj.weight": (3 * hidden, hidden),
            f"model.layers.{k}.self_attn.o_proj.weight": (hidden, hidden),
            f"model.layers.{k}.mlp.gate_up_proj.weight": (2 * intermediate, hidden),
            f"model.layers.{k}.mlp.down_proj.weight": (hidden, intermediate),
            f"model.layers.{k}.input_layernorm.weight": (hidden,),
            f"model.layers.{k}.post_attention_layernorm.weight": (hidden,),
        }
    directory.mkdir(parents=True)
    (directory / "config.json").write_text('{"model_type": "phi3"}')
    pool = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    names = list(shapes)
    weight_map = {}
    cuts = [k * len(names) // files for k in range(files + 1)]
    for number, (start, end) in enumerate(pairwise(cuts), start=1):
        part, file_name = names[start:end], f"model-{number:05d}-of-{files:05d}.safetensors"
        weight_map |= dict.fromkeys(part, file_name)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in part:
            size = 2 * torch.Size(shapes[name]).numel()
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [offset, offset + size]}
            offset += size
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        with open(directory / file_name, "wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for shift, name in enumerate(part):
                left = torch.Size(shapes[name]).numel()
                while left:
                    piece = pool.roll(997 * shift)[:left]
                    file.write(piece.view(torch.uint8).numpy().data)
                    left -= len(piece)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def make_adapter(directory: Path, *, layers: int, hidden: int) -> Path:
    """A rotation for every o_proj."""
    directory.mkdir(parents=True)
    key = "base_model.model.model.layers.{}.self_attn.o_proj.lora_so8t.theta"
    thetas = {key.format(k): 0.1 * torch.randn(hidden // 8, 28) for k in range(layers)}
    save_file(thetas, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text('{"peft_type": "SO8T"}')
    return directory


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def copy_and_hash(base: Path, out: Path) -> None:
    """Copy, fsync and hash a checkpoint: the work of a release without a bake."""
    out.mkdir()
    for file in sorted(base.iterdir()):
        subprocess.run(["cp", file, out / file.name], check=True)
        fsync(out / file.name)
        sha256_file(out / file.name)


def bake_in_a_process(base: Path, adapter: Path, out: Path) -> tuple[float, int]:
    """(seconds of bake_checkpoint alone, peak resident bytes of the whole process)."""
    done = subprocess.run([sys.executable, "-c", CHILD, base, adapter, out], check=True, capture_output=True, text=True)
    took, peak = done.stdout.split()
    return float(took), int(peak)


def peft_merge(weight: Tensor) -> nn.Module:
    """A linear layer of this weight with stock PEFT OFT (block 8), ready for the merge."""
    one = nn.Module()
    one.o_proj = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    one.o_proj.weight.data = weight.clone()
    config = OFTConfig(r=0, oft_block_size=8, target_modules=["o_proj"])
    model: nn.Module = get_peft_model(one, config)  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("threads", sorted({1, os.cpu_count() or 1}))
def bench_bake_of_one_weight(figures: Any, quick: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    width = 2048 if quick else 3072
    weight = (torch.randn(width, width) * 0.02).bfloat16()
    fold = Fold(theta=0.1 * torch.randn(width // 8, 28))
    figures(
        f"bake of one {width} x {width} bfloat16 weight, {threads} threads",
        {
            "so8t": lambda: fold.apply(weight),
            "PEFT OFT merge": (lambda: peft_merge(weight), lambda model: model.merge_adapter()),
        },
        rounds=9,
        bar=None if quick else 10.0,
    )


def bench_bake_of_a_checkpoint(record: Any, quick: bool, tmp_path: Path) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    shape = SHAPE if FULL else TINY if quick else SMALL
    base = make_checkpoint(tmp_path / "base", **shape)
    adapter = make_adapter(tmp_path / "adapter", layers=shape["layers"], hidden=shape["hidden"])
    size = sum(file.stat().st_size for file in base.iterdir())
    weight = (torch.randn(shape["hidden"], shape["hidden"]) * 0.02).bfloat16()
    fold = Fold(theta=0.1 * torch.randn(shape["hidden"] // 8, 28))
    ours, floor = [], []
    for _ in range(2 if FULL else 3 if quick else 5):
        floor.append(seconds(lambda: copy_and_hash(base, tmp_path / "copy")))
        shutil.rmtree(tmp_path / "copy")
        took = seconds(lambda: bake_checkpoint(base, adapter, tmp_path / "out"))
        shutil.rmtree(tmp_path / "out")
        folds = seconds(lambda: [fold.apply(weight) for _ in range(shape["layers"])])
        ours.append(max(took - folds, 0.01 * took))  # keeps the ratio positive in a disturbed round
    name = f"bake_checkpoint of {size / 1e9:.2f} GB without its folds"
    times = {"so8t": ours, "copy + fsync + sha256": floor}
    for figure in comparisons(name, times, bar=1.5, lower_is_better=True, bytes=size):
        record(figure)
    if quick:
        return  # bench_memory measures the bake alone; this process takes seconds to start
    _, peak = bake_in_a_process(base, adapter, tmp_path / "out")
    sizes = {"so8t": [peak / 1e6], "the checkpoint's files": [size / 1e6]}
    record(of_memory(f"bake_checkpoint of {size / 1e9:.2f} GB, peak memory of the process", sizes, bar=1e9 / size))
