"""Peak memory of SO8T's work above the memory that its process held before, against a peer or a floor, in forks.

python -m benchmarks.bench_memory WORK_DIR TOKENIZER_DIR quick|whole prints the figures that the benchmark records.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.bench_bake import SMALL, TINY, make_adapter, make_checkpoint
from benchmarks.side_by_side import of_memory

QUICK: dict[str, Any] = {"rounds": 2, "tokens": 256, "methods": ["so8t"], "shape": TINY}
WHOLE: dict[str, Any] = {"rounds": 5, "tokens": 1024, "methods": ["so8t", "LoRA r=8", "PEFT OFT"], "shape": SMALL}
Jobs = dict[str, dict[str, Callable[[], Any]]]


def bench_memory(record: Any, tokenizer_dir: Path, tmp_path: Path, quick: bool) -> None:
    """Measure in a fresh process: a fork of this one would keep its threads' locks."""
    size = "quick" if quick else "whole"
    command = [sys.executable, "-m", "benchmarks.bench_memory", str(tmp_path), str(tokenizer_dir), size]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, sizes in json.loads(done.stdout.splitlines()[-1]).items():
        record(of_memory(name, sizes))


def _jobs(work: Path, tokenizer_dir: Path, *, tokens: int, methods: list[str], shape: dict[str, int]) -> Jobs:
    """Import and prepare everything before the first fork, without computing a gradient."""
    import torch
    from safetensors.torch import load_file

    from benchmarks.bench_core import FLOOR, method
    from benchmarks.bench_data import build, rows_file
    from benchmarks.number_type import NAME
    from so8t_core import bake_checkpoint
    from verification.reference.tokenizer import load_tokenizer

    torch.set_num_threads(1)
    base, adapter = make_checkpoint(work / "base", **shape), work / "adapter"
    make_adapter(adapter, layers=shape["layers"], hidden=shape["hidden"])
    rows = rows_file(work / "rows.jsonl", 300)
    models = {name: method(name) for name in (FLOOR, *methods)}
    ids = torch.randint(0, 4096, (2, tokens // 2), generator=torch.Generator().manual_seed(0))

    def step(name: str) -> Callable[[], None]:
        return lambda: models[name](input_ids=ids, labels=ids).loss.backward()

    def bake() -> None:
        bake_checkpoint(base, adapter, work / "out")

    def whole() -> int:
        files = sorted(base.glob("*.safetensors"))  # cloned, because safetensors only maps tensors
        return len([tensor.clone() for file in files for tensor in load_file(file).values()])

    def data() -> int:
        return build(rows, load_tokenizer(tokenizer_dir), work / "data")

    def tokenizer_and_rows() -> int:
        load_tokenizer(tokenizer_dir)
        return len([json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()])

    jobs: Jobs = {
        f"peak memory, training step, Llama 768 x 6 {NAME}, {tokens} tokens: {name}": {
            name: step(name),
            FLOOR: step(FLOOR),
        }
        for name in methods
    }
    size = sum(file.stat().st_size for file in base.iterdir()) / 1e9
    jobs[f"peak memory, bake_checkpoint of {size:.2f} GB"] = {"so8t": bake, "the checkpoint in memory": whole}
    jobs["peak memory, data step, 300 rows"] = {"so8t": data, "tokenizer + rows in memory": tokenizer_and_rows}
    return jobs


def main(work: Path, tokenizer_dir: Path, *, rounds: int, **sizes_of_jobs: Any) -> None:
    """Measure all contenders in turns; print one JSON object: figure -> contender -> MB of every round."""
    from benchmarks.peak import peak

    jobs = _jobs(work, tokenizer_dir, **sizes_of_jobs)
    sizes: dict[str, dict[str, list[float]]] = {name: {who: [] for who in pair} for name, pair in jobs.items()}
    for _ in range(rounds):
        for name, pair in jobs.items():
            for who, job in pair.items():
                sizes[name][who].append(round(peak(job), 2))
    print(json.dumps(sizes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), **{"quick": QUICK, "whole": WHOLE}[sys.argv[3]])
