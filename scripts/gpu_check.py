"""Measure on a GPU, in one command: every method at the exact Phi-3.5 shape, and the rotation against memcpy.

python scripts/gpu_check.py [--tokens 1024] [--out FILE.json]

Weights are random, so nothing is downloaded. It measures tokens/s of a whole training step (forward, backward, AdamW)
of base, LoRA, QLoRA, PEFT OFT, SO8T and SO8T + LoRA, each against the frozen base in the same model, in interleaved
rounds; the device's peak memory of each; and one rotation of (tokens, 3072), forward and with its gradient, against
copies of the same bytes and against PEFT's OFT. The 16-bit methods need about 24 GB; a method that does not fit is
named in the table. Exit codes: 0 measured, 2 no CUDA device.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peft import OFTConfig
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # `benchmarks` of this checkout

from benchmarks.bench_core import OFT, _adapted, _step
from benchmarks.methods import METHODS, PHI35, prepare, synchronise
from benchmarks.result_file import machine
from benchmarks.side_by_side import Comparison, compare
from so8t_core import SO8TConfig
from so8t_core.files import write_text


def methods_table(
    shape: dict[str, int], tokens: int, device: str, dtype: torch.dtype, *, rounds: int
) -> list[dict[str, Any]]:
    """One row for each method: tokens/s, ratio to the frozen base, peak memory; or why it was not measured."""
    rows = []
    for method in METHODS:
        row: dict[str, Any] = {"method": method}
        try:
            made = prepare(method, shape, tokens, device, dtype)
            (found,) = compare(
                method, {method: made.step, "frozen base": made.floor}, rounds=rounds, lower_is_better=True
            )
            row |= {
                "tokens_per_second": 1e3 * tokens / found.milliseconds[method],
                "over_frozen_base": found.ratio,
                "ratios": list(found.ratios),
                "peak_mb": made.megabytes,
            }
            del made
        except torch.OutOfMemoryError:
            row["failed"] = "out of memory"
        except ImportError as error:
            row["failed"] = f"not installed: {error.name}"
        rows.append(row)
    return rows


def apply_table(tokens: int, width: int, device: str, dtype: torch.dtype, *, rounds: int) -> list[Comparison]:
    """One rotation of (tokens, width) against PEFT's OFT and against memcpy.

    Any such operator reads x and writes y, which is one copy of x. Its backward reads x and the gradient and writes a
    gradient, which is more than a second copy. So two copies are a lower bound of its traffic.
    """
    with torch.device(device):
        plain = torch.randn(1, tokens, width, dtype=dtype)
        (ours, x), (oft, y) = (_adapted(c, tokens, width, 1, dtype) for c in (SO8TConfig(), OFTConfig(**OFT)))

    def timed(work: Any) -> Any:
        def run() -> None:
            for _ in range(10):
                work()
            synchronise(plain)

        return run

    def forward(model: Any) -> Any:
        def run() -> None:
            with torch.no_grad():
                model()

        return timed(run)

    found = compare(
        f"rotation, forward, {tokens} x {width}, 10 times",
        {"so8t": forward(ours), "PEFT OFT": forward(oft), "memcpy": timed(plain.clone)},
        rounds=rounds,
    )
    found += compare(
        f"rotation, forward and backward, {tokens} x {width}, 10 times",
        {
            "so8t": timed(_step(ours, x)),
            "PEFT OFT": timed(_step(oft, y)),
            "2 memcpy": timed(lambda: (plain.clone(), plain.clone())),
        },
        rounds=rounds,
    )
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_check: no CUDA device; nothing was measured", file=sys.stderr)
        return 2
    methods = methods_table(PHI35, given.tokens, "cuda", torch.bfloat16, rounds=given.rounds)
    applied = apply_table(2048, PHI35["hidden_size"], "cuda", torch.bfloat16, rounds=given.rounds)
    show(methods, applied)
    now, where = datetime.now(UTC), machine()
    name = "".join(c if c.isalnum() else "-" for c in str(where.gpu)).lower()
    path = given.out or Path(__file__).parents[1] / "benchmarks" / "results" / f"gpu-{now:%Y-%m-%d}-{name}.json"
    document = {
        "schema_version": "1.0",
        "date": f"{now:%Y-%m-%dT%H:%M:%SZ}",
        "machine": where.model_dump(mode="json"),
        "tokens": given.tokens,
        "methods": methods,
        "apply": [figure.to_dict() for figure in applied],
    }
    write_text(path, json.dumps(document, indent=1) + "\n")
    print(f"written: {path}")
    return 0


def show(methods: list[dict[str, Any]], applied: list[Comparison]) -> None:
    """Print two short tables."""
    table = Table("method", "tokens/s", "over the frozen base", "peak memory")
    for row in methods:
        if "failed" in row:
            table.add_row(row["method"], row["failed"], "", "")
            continue
        peak = "" if row["peak_mb"] is None else f"{row['peak_mb'] / 1e3:.2f} GB"
        table.add_row(row["method"], f"{row['tokens_per_second']:.0f}", f"{row['over_frozen_base']:.3f}", peak)
    console = Console(width=110)
    console.print(table)
    table = Table("rotation", "against", "ours", "theirs", "times as fast")
    for f in applied:
        ours, theirs = (f"{f.milliseconds[who]:.3g} ms" for who in (f.ours, f.peer))
        table.add_row(f.name, f.peer, ours, theirs, f"{f.ratio:.3g} [{f.quartiles[0]:.3g}, {f.quartiles[1]:.3g}]")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
