"""Twenty healthy files and forty faulty ones: what logits decide is decided alike with the weights and by the file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from verification_models import Family, rewrite

from verification import decide
from verification.engines.convert import convert
from verification.engines.huggingface import load_hf
from verification.engines.quantise import quantise
from verification.gate.policy import make_policy
from verification.gate.report import Check, Leg, Report
from verification.gguf.candidate import Candidate
from verification.gguf.reader import read_gguf
from verification.logit_parity.compare import (
    cell_checks,
    distinct,
    files_leg,
    measure_file,
    passages_of,
    run_reference,
)
from verification.logit_parity.run_modes import Cell, Passage, Plan
from verification.logit_parity.text import Corpus
from verification.reference_file.format import ReferenceFile, read
from verification.reference_file.make import write_reference
from verification.reference_file.measure import divergence_leg, measure, mode_checks

KINDS = [
    "Q8_0",
    "Q6_K",
    "Q5_K_M",
    "Q5_K_S",
    "Q5_1",
    "Q5_0",
    "Q4_K_M",
    "Q4_K_S",
    "Q4_1",
    "Q4_0",
    "IQ4_XS",
    "IQ4_NL",
    "Q3_K_L",
    "Q3_K_M",
    "Q3_K_S",
    "Q2_K",
]
FLOATS = ("F32", "F16", "BF16")
# A mode's mean by the file is the full one plus an error of known standard error e. Over 60 files x 8 modes a normal
# error exceeds 5 e with a probability of 480 x 6e-7 = 3e-4. The codes' rounding d moves a KLD by at most
# d mean |log p - log q| (`estimate.distribution`), and that mean is at most about sqrt(2 KLD).
ERRORS, CODES = 5.0, 1.5e-4
BOUNDS = {kind: {"mean_kld": 0.2, "top1": 0.7} for kind in KINDS}
POLICY = make_policy({"quality": BOUNDS, "convert": {"top1": 0.9}, "cells": BOUNDS})
FAULTS: dict[str, dict[str, Callable[[Any], Any]]] = {
    **{
        f"{name} x {factor}": {f"blk.{layer}.{name}.weight": lambda w, factor=factor: w * factor}
        for layer, name in enumerate(("attn_norm", "ffn_norm"))
        for factor in (1.003, 1.01, 1.1)
    },
    **{
        f"blk.{layer}.{name} x {factor}": {f"blk.{layer}.{name}.weight": lambda w, factor=factor: w * factor}
        for layer in (0, 1)
        for name in ("attn_q", "attn_v", "attn_output", "ffn_down", "ffn_up")
        for factor in (1.02, 1.3)
    },
    **{
        f"blk.{layer}.{name} rolled": {f"blk.{layer}.{name}.weight": lambda w: np.roll(w, 1, axis=0)}
        for layer in (0, 1)
        for name in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_down")
    },
    "blk.0.attn_output transposed": {"blk.0.attn_output.weight": lambda w: w.T},
    "blk.1.attn_output transposed": {"blk.1.attn_output.weight": lambda w: w.T},
    "output_norm x 0.9": {"output_norm.weight": lambda w: w * 0.9},
    "a layer without attention": {"blk.0.attn_output.weight": lambda w: w * 0},
}


def files(family: Family, folder: Path) -> Iterator[tuple[str, Path]]:
    """(what it is, file) of the healthy files, then of the faulty ones, a file at a time."""
    for kind in FLOATS:
        yield kind, convert(family.reference, folder / f"{kind}.gguf", outtype=kind.lower(), model_name="tiny")
    yield "F16 of another name", convert(family.reference, folder / "n.gguf", outtype="f16", model_name="other")
    for kind in KINDS:
        yield kind, quantise(folder / "F32.gguf", folder / f"{kind}.gguf", kind)
    for number, (name, change) in enumerate(FAULTS.items()):
        path = rewrite(folder / "F16.gguf", folder / "fault.gguf", tensors=change)
        if number % 4 == 3:  # a quarter of the faults through a quantisation
            path = quantise(path, folder / f"fault-{number}.gguf", ("Q8_0", "Q4_K_M")[number // 4 % 2])
        yield name, path


def decided(legs: dict[str, list[Check]]) -> dict[str, Check]:
    """Every check with its status by the policy."""
    found = [
        Leg(name=name, title="", compared="", status="not evaluated", checks=checks) for name, checks in legs.items()
    ]
    report = Report(
        verdict="incomplete",
        summary="",
        created="",
        artefacts=[],
        legs=found,
        policy=POLICY.model_dump(mode="json"),
        versions={},
        durations={},
    )
    return {check.name: check for leg in decide(report, POLICY).legs for check in leg.checks if check.subject}


def both(
    label: str, path: Path, stored: ReferenceFile, rows: Any, plan: Plan, text: Corpus
) -> tuple[dict[str, Check], dict[str, Check], dict[str, float]]:
    """The checks of what logits decide, with the weights and by the file, and the errors of the file's run modes."""
    candidate = Candidate(label, read_gguf(path))
    leg = "convert" if candidate.file.is_float else "quality"
    full = measure_file(label, path, text, rows, plan=plan, seed="s", threads=1, tell=lambda *_: None)
    own = measure(candidate, stored, seed="s", threads=1, tell=lambda *_: None)
    return (
        decided({leg: files_leg(candidate, full.divergence), "cells": cell_checks(full.cells, plan)}),
        decided({leg: divergence_leg(candidate, own), "cells": mode_checks(own, stored)}),
        own.mode_errors,
    )


def alike(full: Check, stored: Check, errors: dict[str, float]) -> bool:
    """The same status; or, of a run mode, another one where the bound lies within the error of the drawn tokens.

    A mode is held by its mean, without an interval: the drawn tokens move it.
    """
    if full.status == stored.status:
        return True
    mode = full.name.split(".")[1]
    if not full.name.endswith(".mean_kld") or mode not in errors or not isinstance(full.value, float):
        return False
    assert isinstance(full.bound, float)
    return abs(full.value - full.bound) <= ERRORS * errors[mode] + CODES * math.sqrt(2 * full.value)


def test_another_status_is_alike_within_the_drawn_tokens_error_only() -> None:
    full = Check(name="cells.short.mean_kld", title="", subject="F", status="pass", value=0.19, bound=0.2)
    other = full.model_copy(update={"value": 0.21, "status": "fail"})
    assert alike(full, other, {"short": 0.003})
    assert not alike(full, other, {"short": 0.0015})
    assert not alike(full.model_copy(update={"name": "cells.short.top1"}), other, {"short": 1.0})
    assert not alike(full.model_copy(update={"name": "quality.mean_kld.Q8_0"}), other, {"short": 1.0})


def compare_all(
    family: Family, folder: Path, chosen: Callable[[int], bool]
) -> dict[str, dict[str, tuple[Check, Check]]]:
    """The checks that differ, by file; files are made all, and measured where `chosen` says so."""
    write_reference(family.reference, folder / "r.so8t", chunks=8, n_ctx=128, threads=1, work_dir=family.work)
    stored = read(folder / "r.so8t")
    header = stored.header
    passages = {
        name: [Passage(stored.passage(place.passage), place.first) for place in places]
        for name, places in header.groups.items()
    }
    plan = Plan([Cell(**mode.model_dump()) for mode in header.modes], passages)
    text = Corpus((), tuple(p.tokens for p in passages["corpus"]), header.text_sha256)
    wanted = distinct([passages_of(text.chunks), *passages.values()])
    rows = run_reference(load_hf(family.reference), wanted, folder, name="", tell=lambda *_: None)
    differ, seen = {}, 0
    with rows.spool:
        for number, (name, path) in enumerate(files(family, folder)):
            if not chosen(number):
                continue
            seen += 1
            label = read_gguf(path).file_type
            whole, by_file, errors = both(label, path, stored, rows, plan, text)
            pairs = {key: (check, by_file[key]) for key, check in whole.items()}
            if found := {key: pair for key, pair in pairs.items() if not alike(*pair, errors)}:
                differ[f"{number} {name} ({label})"] = found
    assert seen
    return differ


@pytest.mark.soak
def test_what_logits_decide_is_decided_alike_on_sixty_files(wide_family: Family, tmp_path: Path) -> None:
    assert len(FAULTS) == 40
    assert compare_all(wide_family, tmp_path, lambda number: True) == {}
