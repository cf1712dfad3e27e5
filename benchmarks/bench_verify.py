"""The cost of a whole verification against the forward passes that it needs: the reference once, every file once.

python -m benchmarks.bench_verify --reference HF_DIR --candidate FILE.gguf [--candidate ...] [--chunks 12] [--rounds 3]

Bare: the model's forward and llama.cpp's decode over the chunks; logits are fetched and dropped. Report: every stage of
`verify` with its default settings and with the verifier's conversion. Both run in every round, so that a machine that
slows down slows both. The output has the rounds' wall and CPU seconds (with children), medians and ranges of their
ratio, and the seconds of each stage. CPU seconds are steadier on a machine that other programs use.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.peak import resident
from verification import verify
from verification.commands.stage import Run
from verification.engines.huggingface import hf_rows, load_hf
from verification.engines.llama_logits import LlamaLogits
from verification.logit_parity.compare import measure_file, passages_of, run_reference
from verification.logit_parity.text import Corpus, read_corpus
from verification.reference.tokenizer import load_tokenizer

Seconds = tuple[float, float]  # wall seconds, CPU seconds


def main() -> None:
    """Parse, measure, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--candidate", type=Path, action="append", required=True)
    parser.add_argument("--chunks", type=int, default=12)
    parser.add_argument("--n-ctx", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    text = read_corpus(None, load_tokenizer(given.reference), n_ctx=given.n_ctx, chunks=given.chunks)
    stages: dict[str, list[Seconds]] = {}

    def report() -> None:
        with _stages_timed(stages):
            verify(given.reference, given.candidate, chunks=given.chunks, n_ctx=given.n_ctx, threads=given.threads)

    bare = partial(_bare, given.reference, given.candidate, text, given.threads)
    rounds = []
    for number in range(given.rounds):
        contenders: dict[str, Callable[[], None]] = {"bare": bare, "report": report}
        order = list(contenders) if number % 2 == 0 else list(reversed(contenders))
        rounds.append({name: _timed(contenders[name]) for name in order})
    result: dict[str, object] = {"rounds": rounds}
    for place, clock in enumerate(("wall", "processor")):
        result[f"ratio, {clock}"] = _summary([r["report"][place] / r["bare"][place] for r in rounds])
    result["stages"] = {name: [_summary([s[k] for s in found]) for k in (0, 1)] for name, found in stages.items()}
    result["peak_gib"] = round(resident("VmHWM") * 1e6 / 2**30, 2)
    print(json.dumps(result, indent=1))


@contextlib.contextmanager
def _stages_timed(into: dict[str, list[Seconds]]) -> Iterator[None]:
    """Collect the seconds of every stage in the block; a stage that one run enters several times counts once."""
    plain, found = Run.timed, dict[str, Seconds]()

    @contextlib.contextmanager
    def timed(run: Run, stage: str) -> Iterator[None]:
        start = _clocks()
        with plain(run, stage):
            yield
        wall, processor = (now - then for now, then in zip(_clocks(), start, strict=True))
        known = found.get(stage, (0.0, 0.0))
        found[stage] = (known[0] + wall, known[1] + processor)

    Run.timed = timed  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Run.timed = plain  # type: ignore[method-assign]
        for stage, seconds in found.items():
            into.setdefault(stage, []).append(seconds)


def _bare(reference: Path, files: list[Path], text: Corpus, threads: int | None) -> None:
    model = load_hf(reference)
    chunks = passages_of(text.chunks)
    for passage in chunks:
        for _ in hf_rows(model, passage.tokens, first=passage.first):
            pass
    del model
    gc.collect()
    for path in files:
        with LlamaLogits(path, n_ctx=len(text.chunks[0]), threads=threads) as engine:
            for passage in chunks:
                for _ in engine.rows(passage.tokens, first=passage.first):
                    pass


def _ours(reference: Path, files: list[Path], text: Corpus, threads: int | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        passages = passages_of(text.chunks)
        stored = run_reference(load_hf(reference), passages, Path(folder), name="reference", tell=_silent)
        gc.collect()
        with stored.spool:
            for path in files:
                measure_file(path.name, path, text, stored, seed="s", threads=threads, tell=_silent)


def _timed(work: Callable[[], None]) -> Seconds:
    start = _clocks()
    work()
    wall, processor = (now - then for now, then in zip(_clocks(), start, strict=True))
    return wall, processor


def _clocks() -> Seconds:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(u.ru_utime + u.ru_stime for u in used)


def _summary(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def _silent(stage: str, done: int, total: int) -> None:
    pass


if __name__ == "__main__":
    main()
