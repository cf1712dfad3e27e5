"""Compares the trained adapter with its bake, and the bake with the saved checkpoint.

Three comparisons in fp32 on a few hundred positions. First, base + adapter against the baked weights. Second, two
controls in the same run: the baked model must differ from its base, and the bake of R^T must fail the first comparison.
Third, the saved checkpoint's weights against the fp32 bake, |saved - w| <= u |w| with u = 2^-p of the saved type. The
core is used only through its public functions: load_adapter, gates, bake; for a streamed model bake_checkpoint, into a
temporary float32 checkpoint.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from verification.engines.huggingface import hf_chunk, load_hf, must_stream, open_reference
from verification.engines.streamed import StreamedModel
from verification.gate.check import plain_check
from verification.gate.report import Check
from verification.reference.checkpoint import Checkpoint

Array = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
BAKE_CHUNKS = 2  # 2 x 255 positions at n_ctx 512 are enough: a missing bake changes logits by tens
_UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # half a spacing, relative
_SMALLEST = {
    torch.float32: 2.0**-150,
    torch.float16: 2.0**-25,
    torch.bfloat16: 2.0**-134,
}  # half the smallest subnormal


@dataclass(frozen=True)
class BakeResult:
    """Checks of the leg `bake` and of one control, the model baked in fp32, and logits for other stages."""

    bake: list[Check]
    controls: list[Check]
    baked: Any
    gated: Array  # logits of base + adapter on the first chunk
    own: list[Array]  # logits of the baked model on the first chunks


def bake_leg(
    base: Path,
    adapter: Path,
    chunks: Sequence[Ids],
    *,
    max_abs_logit: float,
    work: Path | None = None,
    stream: bool | None = None,
) -> BakeResult:
    """Bake and compare on chunks of ids (n,); one model, or one layer of one, is in memory at a time.

    Args:
        max_abs_logit: the bake leg's bound; top-1 must agree at positions where the reference's margin exceeds twice
            the bound.
        work: directory for the baked checkpoint of a streamed model; None takes the system's temporary directory.
        stream: see `open_reference`.
    """
    from so8t_core import bake, load_adapter

    used = list(chunks[:BAKE_CHUNKS])
    stream = must_stream(base) if stream is None else stream
    model = open_reference(base, stream=stream)
    plain = hf_chunk(model, used[0])
    model = open_reference(base, stream=True, adapter=adapter) if stream else load_adapter(model, adapter)
    gated = _logits(model, used)
    baked = _baked_in_files(base, adapter, work) if stream else bake(model)
    own = _logits(baked, used)
    positions = sum(len(rows) for rows in own)
    flips = _flips(gated, own, 2 * max_abs_logit)
    return BakeResult(
        bake=[
            plain_check(
                "bake.max_abs_logit",
                "Largest logit difference",
                _largest(gated, own),
                detail=f"{positions} positions, fp32",
            ),
            plain_check(
                "bake.top1_disagreements",
                "Most likely token changed against the margin",
                flips,
                detail=f"counted where the reference's margin exceeds {2 * max_abs_logit:g}",
            ),
        ],
        controls=[
            plain_check(
                "controls.differs_from_base",
                "Baked model differs from its base (largest logit difference)",
                _largest([plain], own[:1]),
                detail="an adapter that changes nothing proves nothing",
            )
        ],
        baked=baked,
        gated=gated[0],
        own=own,
    )


def _logits(model: Any, chunks: Sequence[Ids]) -> list[Array]:
    if isinstance(model, StreamedModel):
        model.prepare(chunks)
    return [hf_chunk(model, tokens) for tokens in chunks]


def _baked_in_files(base: Path, adapter: Path, work: Path | None, *, invert: bool = False) -> StreamedModel:
    """base + adapter baked in float32 into a directory that is deleted with the model."""
    from so8t_core import bake_checkpoint

    folder = tempfile.TemporaryDirectory(dir=work, prefix="so8t-baked-")
    baked = bake_checkpoint(base, adapter, Path(folder.name) / "baked", dtype=torch.float32, invert=invert)
    return StreamedModel(baked, folder=folder)


def transposed_control(
    base: Path,
    adapter: Path,
    chunk: Ids,
    gated: Array,
    *,
    max_abs_logit: float,
    work: Path | None = None,
    stream: bool | None = None,
) -> Check:
    """The comparison of `bake_leg` with the wrong bake (R^T), which must miss the bound; arguments as in `bake_leg`.

    Args:
        gated: logits of base + adapter on the chunk, from `bake_leg`.
    """
    if must_stream(base) if stream is None else stream:
        wrong = hf_chunk(_baked_in_files(base, adapter, work, invert=True), chunk)
    else:
        wrong = _logits_of_transposed(base, adapter, chunk)
    by, flips = _largest([gated], [wrong]), _flips([gated], [wrong], 2 * max_abs_logit)
    return plain_check(
        "controls.transposed",
        "Wrong bake (R transposed) misses the bake leg (largest logit difference)",
        by,
        detail=f"{by / max_abs_logit:.3g} times the bake leg's bound, {flips} positions flip",
    )


def base_control(base: Path, reference: Array, chunk: Ids, *, stream: bool | None = None) -> Check:
    """Check without an adapter: whether the reference's logits (T, V) on the chunk (T,) differ from the base's."""
    return plain_check(
        "controls.differs_from_base",
        "Reference differs from its base (largest logit difference)",
        _largest([hf_chunk(open_reference(base, stream=stream), chunk)], [reference]),
    )


def _logits_of_transposed(base: Path, adapter: Path, chunk: Ids) -> Array:
    """Logits of the adapter baked with R^T instead of every R."""
    from so8t_core import bake, gates, load_adapter

    model = load_adapter(load_hf(base), adapter)
    with torch.no_grad():
        for gate in gates(model).values():
            for part in gate.parts():
                part.transpose()
    return hf_chunk(bake(model), chunk)


def _largest(ours: list[Array], theirs: list[Array]) -> float:
    """The largest difference; NaN if any logit is NaN: the built-in max drops a NaN that does not come first."""
    return float(np.max([np.max(np.abs(a - b)) for a, b in zip(ours, theirs, strict=True)]))


def _flips(reference: list[Array], other: list[Array], margin: float) -> int:
    """Positions whose argmax changed although the reference's two best logits are more than `margin` apart.

    Two logits that each change by at most the bound b change their order only if they are closer than 2 b.
    """
    count = 0
    for a, b in zip(reference, other, strict=True):
        best_two = np.partition(a, -2, axis=1)[:, -2:]  # (T, 2)
        decided = best_two[:, 1] - best_two[:, 0] > margin
        count += int(np.count_nonzero(decided & (a.argmax(axis=1) != b.argmax(axis=1))))
    return count


def saved_rounding(baked: Any, saved: Checkpoint) -> tuple[float, str]:
    """(worst weight of the saved checkpoint in roundings of its type, its tensor).

    Infinite for a missing tensor, another shape, a NaN or Inf, or a type that is not float32, float16 or bfloat16.
    """
    from transformers.core_model_loading import revert_weight_conversion  # takes a second; needed only with a model

    tied = {"lm_head.weight"} if getattr(baked.config, "tie_word_embeddings", False) else set()
    if isinstance(baked, StreamedModel):
        files = Checkpoint(baked.directory)
        return _worst_rounding(((name, files.tensor(name)) for name in files), saved, tied)
    state = baked.state_dict()
    if not state.keys() - tied <= saved.keys():  # all experts are one tensor in memory, but one each in files
        state = revert_weight_conversion(baked, state)
    return _worst_rounding(state.items(), saved, tied)


def _worst_rounding(state: Iterable[tuple[str, torch.Tensor]], saved: Checkpoint, tied: set[str]) -> tuple[float, str]:
    worst, where = 0.0, ""
    for name, w in state:
        if name not in saved:
            if name in tied or name.endswith("inv_freq"):
                continue
            return float("inf"), f"{name} is not in the saved checkpoint"
        value = saved.tensor(name)
        if value.dtype not in _UNIT or value.shape != w.shape:
            return float("inf"), f"{name} is {list(value.shape)} in {value.dtype}, the bake gives {list(w.shape)}"
        if not bool(torch.isfinite(value).all()):
            return float("inf"), f"{name} holds NaN or Inf"
        allowed = _UNIT[value.dtype] * w.abs().float() + max(_SMALLEST[value.dtype], 1e-45)
        ratio = float(((value.float() - w.float()).abs() / allowed).max())
        if not ratio <= worst:
            worst, where = ratio, f"worst in {name}"
    return worst, where


def dtype_name(saved: Checkpoint) -> str:
    """The dtype most weights were saved in: "bfloat16", "float16" or "float32"."""
    counts: dict[str, int] = {}
    for name in saved:
        tensor = saved.tensor(name)
        kind = str(tensor.dtype).removeprefix("torch.")
        counts[kind] = counts.get(kind, 0) + tensor.numel()
    return max(counts, key=lambda kind: counts[kind])
