"""What the verifier's logits cost against the bare forward passes they need: the reference once, every file once.

python -m benchmarks.bench_verify --reference HF_DIR --candidate FILE.gguf [--candidate ...] [--chunks 4] [--rounds 5]

Bare: the model's forward over the chunks, and llama.cpp's decode over them, logits fetched and dropped. Ours: the same
plus spooling, reading back, the divergence in float64 and the alignment. Both load their models and contexts inside
the timed part. The two take turns in every round, so that a machine that slows down slows both; printed are medians and
ranges of the rounds' times and of their ratio (bar: 1.25), the peak memory, and the cells' and noise floor's own cost.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peak import resident
from benchmarks.side_by_side import interleave
from verification.contract.chat import fixtures
from verification.engines.huggingface import hf_rows, load_hf
from verification.engines.llama_logits import LlamaLogits
from verification.logit_parity.compare import measure_file, passages_of, run_reference
from verification.logit_parity.engine_noise import noise_floor
from verification.logit_parity.run_modes import Plan, plan_cells
from verification.logit_parity.text import Corpus, read_corpus
from verification.reference.tokenizer import load_tokenizer


def main() -> None:
    """Parse, measure, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--candidate", type=Path, action="append", required=True)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--n-ctx", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cells", choices=("quick", "full", "none"), default="quick")
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    tokenizer = load_tokenizer(given.reference)
    text = read_corpus(None, tokenizer, n_ctx=given.n_ctx, chunks=given.chunks)
    work = (given.reference, given.candidate, text, given.threads)
    times = interleave({"ours": partial(_ours, *work), "bare": partial(_bare, *work)}, rounds=given.rounds, warmup=0)
    ratios = [ours / bare for ours, bare in zip(times["ours"], times["bare"], strict=True)]
    shown = {name: _summary(values) for name, values in times.items()}
    result: dict[str, object] = {**shown, "ratio": _summary(ratios)}
    if given.cells != "none":
        result["cells_and_noise_seconds"] = round(_cells(given, text, tokenizer), 2)
    result["peak_gib"] = round(resident("VmHWM") * 1e6 / 2**30, 2)
    print(json.dumps(result, indent=1))


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


def _ours(reference: Path, files: list[Path], text: Corpus, threads: int | None, plan: Plan | None = None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        passages = [
            *passages_of(text.chunks),
            *(p for group in (plan.passages.values() if plan else ()) for p in group),
        ]
        stored = run_reference(load_hf(reference), passages, Path(folder), name="reference", tell=_silent)
        gc.collect()
        with stored.spool:
            for path in files:
                measure_file(path.name, path, text, stored, plan=plan, seed="s", threads=threads, tell=_silent)


def _cells(given: argparse.Namespace, text: Corpus, tokenizer: Any) -> float:
    """Seconds that the cells of all files and the noise floor add, from one run with and one without them."""
    config = json.loads((given.reference / "config.json").read_text(encoding="utf-8"))
    ids = [np.asarray(tokenizer(c, add_special_tokens=False)["input_ids"]) for c in fixtures(tokenizer)]
    plan = plan_cells(given.cells, text.chunks, config, bos=tokenizer.bos_token_id, chats=ids)

    def everything() -> None:
        _ours(given.reference, given.candidate, text, given.threads, plan)
        noise_floor("first", given.candidate[0], plan.passages["plain"], threads=given.threads)

    alone = _timed(lambda: _ours(given.reference, given.candidate, text, given.threads))
    return _timed(everything) - alone


def _timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


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
