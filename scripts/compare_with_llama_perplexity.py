#!/usr/bin/env python3
"""Compare `so8t kld` with the real llama-perplexity, digit by digit: same base file, same model, same tokens.

    python scripts/compare_with_llama_perplexity.py --binary .../llama-perplexity --candidate F.gguf --base base.kld
    python scripts/compare_with_llama_perplexity.py --binary .../llama-perplexity --candidate F.gguf --reference HF_DIR
    ... --chunks 12 --n-ctx 512 --rounds 5      # also time both commands, in turns

Exit 0: every printed line is the same; 1: lines differ (they are shown); 2: could not run. The tool runs with one chunk
in each batch and the same number of threads, so that both use the same kernels: other shapes round differently. Its log
thread may lose the end of its output although it exits 0 (seen on 2 cores): then it is run again.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # `benchmarks` of this checkout

from benchmarks.side_by_side import interleave
from so8t_core.errors import InputError
from verification.logit_parity.llama_cpp_commands import candidate_statistics, write_base_of
from verification.logit_parity.llama_cpp_file import read_base

FIRST, LAST = "====== Perplexity statistics ======", "Same top p:"
ATTEMPTS = 5


def stock_command(binary: Path, candidate: Path, base: Path, *, n_ctx: int, threads: int) -> list[str]:
    """The real tool's command line: one chunk a batch, no GPU."""
    command = [str(binary), "-m", str(candidate), "--kl-divergence", "--kl-divergence-base", str(base)]
    command += ["-c", str(n_ctx), "-b", str(n_ctx), "-ub", str(min(n_ctx, 512)), "-t", str(threads)]
    return [*command, "-ngl", "0", "--no-warmup"]


def race(ours: list[str], stock: list[str], rounds: int) -> str:
    """Time both whole commands, in alternating order; returns one line with the median ratio and its range."""
    commands = {"ours": ours, "stock": stock}
    times = interleave({name: partial(_silent, command) for name, command in commands.items()}, rounds=rounds, warmup=0)
    ratios = [a / b for a, b in zip(times["ours"], times["stock"], strict=True)]
    medians = {name: statistics.median(values) for name, values in times.items()}
    return (
        f"so8t kld {medians['ours']:.2f} s, llama-perplexity {medians['stock']:.2f} s: "
        f"{statistics.median(ratios):.2f}x its time [{min(ratios):.2f}, {max(ratios):.2f}] in {rounds} rounds"
    )


def _silent(command: list[str]) -> None:
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)


def stock_lines(stock: list[str]) -> list[str]:
    """The statistics that the real tool prints, without empty lines."""
    found: list[str] = []
    for _ in range(ATTEMPTS):
        with tempfile.TemporaryDirectory(prefix="so8t-") as work:
            log = Path(work) / "log.txt"
            command = [*stock, "--log-file", str(log)]
            done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            found = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
        if any(line.startswith(LAST) for line in found):
            start, stop = found.index(FIRST), next(i for i, line in enumerate(found) if line.startswith(LAST))
            return [line.rstrip() for line in found[start : stop + 1] if line.strip()]
    raise InputError(f"{stock[0]} printed no statistics in {ATTEMPTS} runs (exit code {done.returncode}): {found[-2:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", type=Path, required=True)
    parser.add_argument("--candidate", type=Path, required=True)
    parser.add_argument("--base", type=Path, help="a base file; or give --reference to write one first")
    parser.add_argument("--reference", type=Path, help="a Hugging Face directory")
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--n-ctx", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=0, help="time both commands this often")
    args = parser.parse_args()
    try:
        if not args.binary.is_file() or not (args.base or args.reference):
            raise InputError(f"{args.binary} is not a file, or neither --base nor --reference was given")
        with tempfile.TemporaryDirectory(prefix="so8t-") as work:
            base = args.base or Path(work) / "base.kld"
            if args.base is None:
                write_base_of(args.reference, base, chunks=args.chunks, n_ctx=args.n_ctx)
            text = candidate_statistics(base, args.candidate, threads=args.threads).text
            ours = [line.rstrip() for line in text.splitlines() if line.strip()]
            n_ctx = read_base(base).n_ctx
            stock = stock_command(args.binary, args.candidate, base, n_ctx=n_ctx, threads=args.threads)
            theirs = stock_lines(stock)
            if args.rounds:
                own = [str(Path(sys.executable).with_name("so8t")), "kld", str(base), "-q"]
                own += ["--candidate", str(args.candidate), "--threads", str(args.threads)]
                print(race(own, stock, args.rounds))
    except InputError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    different = [(a, b) for a, b in zip(ours, theirs, strict=False) if a != b]
    for a, b in different:
        print(f"ours  {a}\nstock {b}")
    if len(ours) != len(theirs):
        print(f"{len(ours)} lines here, {len(theirs)} there")
    same = not different and len(ours) == len(theirs)
    print(f"{len(theirs) - len(different)} of {len(theirs)} lines are the same")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
