"""Peak memory and time of the reference's pass: streamed layer by layer, and whole, each in a separate process.

python -m benchmarks.bench_streamed [--layers 2 4 8] [--chunks 2] [--n-ctx 512] [--whole]

The model is random, of Phi-3.5-mini's shape (hidden 3072, feed-forward 8192, 32 heads, 32,064 tokens) with the given
numbers of layers, saved in bfloat16, one layer in each shard. The measured work is that of `verify` for its reference:
load, run every passage, write logits to the disk. CPU seconds are printed beside wall seconds, because other programs
hardly change them. An exponent e means growth with layers^e.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.peak import resident

SHAPE = {"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 32}


def main() -> None:
    """Parse, make each model, measure it in child processes; print one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--n-ctx", type=int, default=512)
    parser.add_argument("--whole", action="store_true", help="the whole model in memory, beside the streamed one")
    parser.add_argument("--child", nargs=2, metavar=("DIR", "WAY"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        _measure(Path(given.child[0]), given.child[1] == "streamed", given.chunks, given.n_ctx)
        return
    found: dict[int, dict[str, float]] = {}
    for layers in given.layers:
        with tempfile.TemporaryDirectory(prefix="so8t-shape-") as folder:
            _save(Path(folder), layers)
            for way in ("streamed", *(("whole",) if given.whole else ())):
                command = [sys.executable, "-m", "benchmarks.bench_streamed", "--child", folder, way]
                command += ["--chunks", str(given.chunks), "--n-ctx", str(given.n_ctx)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
                row = json.loads(done.stdout.splitlines()[-1])
                print(json.dumps({"layers": layers, "way": way, **row}), flush=True)
                if way == "streamed":
                    found[layers] = row
    if len(found) > 1:
        a, b = min(found), max(found)
        names = ("peak_gb", "processor_s")
        print(json.dumps({n: round(math.log(found[b][n] / found[a][n]) / math.log(b / a), 3) for n in names}))


def _save(folder: Path, layers: int) -> None:
    """Write the checkpoint with one layer in memory at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(
        **SHAPE,
        vocab_size=32064,
        num_hidden_layers=layers,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
        architectures=["Phi3ForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        state = {name: value.shape for name, value in Phi3ForCausalLM(config).named_parameters()}
    torch.manual_seed(0)
    names: dict[str, str] = {}
    groups: dict[str, list[str]] = {}
    for name in state:
        groups.setdefault(name.split(".")[2] if ".layers." in name else "outside", []).append(name)
    for number, group in enumerate(groups.values(), start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {
            name: torch.empty(state[name], dtype=torch.bfloat16).normal_(std=state[name][-1] ** -0.5)
            if len(state[name]) == 2
            else torch.ones(state[name], dtype=torch.bfloat16)
            for name in group
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(group, file)
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _measure(folder: Path, streamed: bool, chunks: int, n_ctx: int) -> None:
    import numpy as np

    from verification.engines.huggingface import open_reference
    from verification.logit_parity.compare import passages_of, run_reference

    rng = np.random.default_rng(0)
    passages = passages_of([rng.integers(3, 32000, n_ctx) for _ in range(chunks)])
    start, told = time.perf_counter(), list[tuple[float, int, int]]()

    def tell(stage: str, done: int, total: int) -> None:
        told.append((time.perf_counter() - start, done, total))

    with tempfile.TemporaryDirectory() as work:
        model = open_reference(folder, stream=streamed)
        run_reference(model, passages, Path(work), name="reference", tell=tell).spool.close()
    wall, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    row = {
        "peak_gb": round(resident("VmHWM") / 1e3, 2),
        "wall_s": round(wall, 1),
        "processor_s": round(used.ru_utime + used.ru_stime, 1),
        "tokens": chunks * n_ctx,
    }
    if streamed:  # as a progress bar: time so far by the share done, after the first layer
        at, done, total = next(step for step in told if step[1] > 0)
        begin = told[0][0]
        row["estimate_over_truth"] = round((at - begin) * total / done / (wall - begin), 3)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
