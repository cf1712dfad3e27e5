"""The outcome of a file with judged tensors: its KLD against that of llama.cpp's own quantisation, chunk by chunk.

The own quantisation is the candidate with every judged tensor quantised here, from the reference at the same type (with
the importance matrix where one is given), so both differ in these tensors only. Ratio r = sum c / sum o over chunks, c
and o the chunks' sums of KLDs; its interval is that of the paired differences c - o, over the mean of o: what the text
does to both cancels. "Not worse" is the upper end within the policy's bound.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import numpy as np

from verification.commands.stage import Run, Stage
from verification.engines import distributed
from verification.engines.quantise import even_matrix, quantised_bytes
from verification.gate.check import plain_check
from verification.gate.report import Check
from verification.gguf.candidate import Candidate
from verification.gguf.reader import GGUFFile
from verification.logit_parity.compare import measure_file
from verification.logit_parity.intervals import mean_interval, resampled
from verification.logit_parity.kl import Floats

PAIRED = ("quantise.kld_ratio",)


def paired_stage(label: str) -> Stage:
    """The stage for one quantised candidate; it measures nothing where no tensor was judged."""
    needs = ("files", "conversions", "text", "reference")
    return Stage(f"own quantisation {label}", partial(_paired, label), needs=needs, checks=PAIRED, subject=label)


def _paired(label: str, run: Run) -> None:
    judged = distributed.from_first(
        lambda: [row.name for row in run.tensors if row.candidate == label and row.drawer == "judged"]
    )
    if not judged:
        return
    candidate = next(file for file in run.files if file.label == label)
    target = run.work / f"own-{candidate.file.stem}"
    try:
        left = distributed.from_first(lambda: own_quantisation(candidate, judged, run, target))
        own = measure_file(
            label,
            target / candidate.file.path.name,
            run.text,
            run.reference,
            seed=run.seed(label),
            threads=run.threads,
            tell=run.tell,
            stage=f"own quantisation {label}",
        )
    finally:
        if distributed.is_first():
            shutil.rmtree(target, ignore_errors=True)
    run.add("quantise", [ratio_check(label, run.chunk_klds[label], own.chunk_klds, len(judged), left, run.seed(label))])


def own_quantisation(candidate: Candidate, judged: list[str], run: Run, target: Path) -> list[str]:
    """Write the candidate, its judged tensors quantised here, into a folder; names those that this build cannot make.

    A type that is never made without a matrix is made with an even one.
    """
    target.mkdir()
    return [name for shard in candidate.file.shards for name in _write_own(shard, judged, run, target)]


def _write_own(file: GGUFFile, judged: list[str], run: Run, folder: Path) -> list[str]:
    """One file, or one shard, with those of its tensors."""
    left = []
    shutil.copyfile(file.path, folder / file.path.name)
    with (folder / file.path.name).open("r+b") as stream:
        for name in (name for name in judged if name in file.tensors):
            tensor, source = file.tensors[name], run.conversions.tensor("F16", name)
            matrix = run.oracle.imatrix.get(name)
            if source is None or source.shape != tensor.shape:
                left.append(name)
                continue
            matrix = even_matrix(tensor.type, tensor.shape) if matrix is None else matrix
            raw = quantised_bytes(source.values(), tensor.type, matrix)
            if raw is None or raw.size != tensor.raw.size:
                left.append(name)
                continue
            stream.seek(tensor.offset)
            stream.write(raw.tobytes())
    return left


def ratio_check(label: str, mine: Floats, own: Floats, judged: int, left: list[str], seed: str) -> Check:
    """The ratio with its interval; not evaluated where the own quantisation has no KLD, or cannot be made.

    Args:
        mine, own: (chunks, 2), sums of KLDs and numbers of positions.
    """
    title = "Mean KLD, in that of llama.cpp's own quantisation at the same types"
    detail = f"{judged} judged tensors quantised here, {len(mine)} chunks, paired"
    if left:
        detail = f"this build cannot quantise {', '.join(left[:3])}"
    both = (mine[:, 1] > 0) & (mine[:, 1] == own[:, 1]) if mine.shape == own.shape else np.zeros(0, dtype=np.bool_)
    usual = float(own[both, 0].sum() / own[both, 1].sum()) if both.any() else 0.0
    if left or len(both) < 2 or not both.all() or not usual > 0:
        return plain_check(PAIRED[0], title, None, subject=label, detail=detail)
    difference = mine[:, 0] - own[:, 0]
    low, high = mean_interval(difference, own[:, 1], resampled(len(own), seed), extremes=(-np.inf, np.inf))
    excess = float(difference.sum() / own[:, 1].sum())
    interval = (max(1 + low / usual, 0.0), 1 + high / usual)
    return plain_check(PAIRED[0], title, 1 + excess / usual, interval=interval, subject=label, detail=detail)
