"""The KLD of a file with judged tensors, divided by the KLD of llama.cpp's own quantisation of those tensors.

llama.cpp's own quantisation is a copy of the candidate. In the copy llama.cpp quantises every judged tensor again, from
the reference, to the same type and with the importance matrix where one is given. So the two files differ in these
tensors only. Ratio r = sum c / sum o over chunks; c and o are the sums of KLDs in a chunk of the candidate and of the
copy. The interval of r is the interval of the paired differences c - o, divided by the mean of o: the effect of the
text on both files cancels. The candidate is "not worse" if the upper end is within the policy's bound.
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
    """Write a copy of the candidate with its judged tensors quantised by llama.cpp.

    Returns the names of the tensors that this build of llama.cpp cannot quantise. A type that needs an importance
    matrix gets a matrix of equal importances where none was given.
    """
    target.mkdir()
    return [name for shard in candidate.file.shards for name in _write_own(shard, judged, run, target)]


def _write_own(file: GGUFFile, judged: list[str], run: Run, folder: Path) -> list[str]:
    """Write one file or one shard, with those judged tensors that it holds."""
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
    """The ratio with its interval; not evaluated where llama.cpp's own quantisation has no KLD, or cannot be made.

    Args:
        mine, own: (chunks, 2), sums of KLDs and numbers of positions, of the candidate and of llama.cpp's quantisation.
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
