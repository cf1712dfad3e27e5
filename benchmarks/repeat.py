"""Test the gate of `compare`: measure one commit ten times, and twice with a planted slowdown of 30 %.

python -m benchmarks.repeat OUT.jsonl [--times 10] [-- FILES AND OPTIONS OF PYTEST]

Every run is `pytest benchmarks --quick` in a separate process; in the last two, --plant 1.3 slows SO8T's side by a wait
inside the timed part. OUT has one result file a line; `summary` compares all of them, and the tests decide again from
the stored runs (tests/fixtures/benchmark_runs.jsonl).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import combinations, permutations
from pathlib import Path
from typing import NamedTuple

from benchmarks.compare import compare
from benchmarks.result_file import Results

OPTIONS = ["-o", "python_files=bench_*.py", "-o", "python_functions=bench_*", "-o", "timeout=1800", "-q", "--quick"]


class Summary(NamedTuple):
    """The gate's verdicts."""

    pairs: int
    alone: list[str]  # false alarms of one comparison
    false_alarms: list[str]  # of those, the ones that a third run confirmed
    of_four: list[str]  # of those, the ones that a second old and a second new run both confirmed
    undecided: float  # share of the comparisons of unchanged figures
    planted: int  # comparisons of slowed figures
    caught: int
    missed: list[str]  # slowed by 30 %, but called the same or better


def summary(runs: list[Results]) -> Summary:
    """Compare every ordered pair of unslowed runs, and every slowed run with every unslowed run."""
    clean = [run for run in runs if run.planted == 1.0]
    slowed = [run for run in runs if run.planted != 1.0]
    pairs = {(i, j): compare(clean[i], clean[j])[0] for i, j in permutations(range(len(clean)), 2)}
    unchanged = [change for changes in pairs.values() for change in changes]
    worse = {pair: {c.name for c in changes if c.status == "regressed"} for pair, changes in pairs.items()}
    twos = list(combinations(range(len(clean)), 2))
    changed = [change for old in clean for new in slowed for change in compare(old, new)[0] if change.extra]
    return Summary(
        len(pairs),
        [change.name for change in unchanged if change.status == "regressed"],
        [name for i, j, k in permutations(range(len(clean)), 3) for name in sorted(worse[i, j] & worse[i, k])],
        [
            name
            for (a, b), (c, d) in permutations(twos, 2)
            if not {a, b} & {c, d}
            for name in sorted(worse[a, c] & worse[a, d] & worse[b, c] & worse[b, d])
        ],
        sum(change.status == "undecided" for change in unchanged) / max(1, len(unchanged)),
        len(changed),
        sum(change.status == "regressed" for change in changed),
        [f"{change.name}: {change.slower:.2f}" for change in changed if change.status in ("same", "better")],
    )


def main() -> None:
    """Measure, write, print the summary."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.repeat", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--times", type=int, default=10)
    words, rest = sys.argv[1:], []
    if "--" in words:
        words, rest = words[: words.index("--")], words[words.index("--") + 1 :]
    given = parser.parse_args(words)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for number, plant in enumerate([*["1.0"] * given.times, "1.3", "1.3"]):
            file = Path(folder) / f"{number}.json"
            command = [sys.executable, "-m", "pytest", *(rest or ["benchmarks"]), *OPTIONS]
            done = subprocess.run([*command, "--plant", plant, "--save-to", file], capture_output=True, text=True)
            if not file.is_file():
                sys.exit(f"error: run {number} wrote no result: {done.stdout[-2000:]}{done.stderr[-500:]}")
            lines.append(json.dumps(json.loads(file.read_text(encoding="utf-8")), separators=(",", ":")))
            given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
            print(f"run {number} of {given.times}, planted {plant}", flush=True)
    print(summary([Results(**json.loads(line)) for line in lines]))


if __name__ == "__main__":
    main()
