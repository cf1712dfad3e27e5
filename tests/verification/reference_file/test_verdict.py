"""A verification against a reference file, from its making to its verdict, on a miniature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from verification_models import Family, rewrite

from so8t_core.errors import InputError
from verification import Report, decide, verify
from verification.engines.huggingface import load_hf
from verification.gate.policy import make_policy
from verification.gguf.candidate import Candidate
from verification.gguf.reader import read_gguf
from verification.logit_parity.compare import measure_file, passages_of, run_reference
from verification.logit_parity.text import Corpus
from verification.reference_file.contract import contract_of
from verification.reference_file.estimate import Means
from verification.reference_file.format import ReferenceFile, read
from verification.reference_file.make import write_reference
from verification.reference_file.measure import Measured, divergence_leg

SMALL: dict[str, Any] = {"chunks": 6, "n_ctx": 64, "threads": 1}
QUANTS = {"Q8_0": {"mean_kld": 0.2, "top1": 0.7}, "Q4_K_M": {"mean_kld": 5.0, "top1": 0.0}}
LOOSE = make_policy(
    {
        "convert": {"top1": 0.9},
        "quality": QUANTS,
        "cells": {"F16": {"mean_kld": 1e-4, "top1": 0.9}, **QUANTS},
        "evidence": {"positions": 180, "chunks": 6},
    }
)


@pytest.fixture(scope="session")
def written(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "reference.so8t"
    write_reference(family.reference, path, work_dir=family.work, **SMALL)
    return path


@pytest.fixture(scope="session")
def reference(written: Path) -> ReferenceFile:
    return read(written)


@pytest.fixture(scope="session")
def healthy(family: Family, written: Path) -> Report:
    return verify(written, list(family.files.values()), policy=LOOSE, threads=1)


def found_in(report: Report) -> dict[tuple[str, str], Any]:
    return {(check.name, check.subject): check for leg in report.legs for check in leg.checks}


def test_a_healthy_family_passes_and_the_report_says_what_needs_the_weights(healthy: Report, written: Path) -> None:
    assert healthy.verdict == "pass", healthy.summary
    assert {leg.name for leg in healthy.legs} == {"convert", "quality", "contract", "evidence", "cells"}
    assert any("need the weights: convert.rounding, quantise.tensors_differ" in note for note in healthy.notes)
    assert any("fit a GGUF file to its samples" in note for note in healthy.notes)
    assert "that need no weights" in healthy.summary
    assert [a.role for a in healthy.artefacts if a.path == str(written)] == ["reference_file"]


def test_the_estimate_is_that_of_the_full_rows(
    family: Family, healthy: Report, reference: ReferenceFile, tmp_path: Path
) -> None:
    """The same chunks with all logits: the same top-1, and a KLD within the sampling error and the codes' rounding."""
    chunks = tuple(reference.passage(place.passage) for place in reference.header.groups["corpus"])
    text = Corpus((), chunks, reference.header.text_sha256)
    rows = run_reference(
        load_hf(family.reference), passages_of(chunks), tmp_path, name="", tell=lambda stage, done, total: None
    )
    with rows.spool:
        for leg, label in (("convert", "F16"), ("quality", "Q4_K_M")):
            path = family.files[label]
            full = measure_file(label, path, text, rows, seed="", threads=1, tell=lambda *_: None).divergence
            check = found_in(healthy)[f"{leg}.mean_kld", label]
            lower, error = (float(part.rsplit(" ", 1)[1]) for part in check.detail.split("; ")[1].split(", "))
            assert abs(check.value - full.mean_kld) < 5 * error + 2e-3 * full.mean_kld, label
            assert lower <= full.mean_kld * 1.01
            assert found_in(healthy)[f"{leg}.top1", label].value == full.top1


def test_a_quant_alone_passes_without_the_leg_convert(family: Family, written: Path) -> None:
    report = verify(written, [family.files["Q8_0"]], policy=LOOSE, threads=1)
    assert report.verdict == "pass", report.summary
    assert "evidence.noise_floor" not in {name for name, _ in found_in(report)}
    strict = decide(report, LOOSE.model_copy(update={"required": ["convert", "contract", "quantise"]}))
    assert strict.verdict == "incomplete"  # a leg that only the weights give is a gap where the policy asks for it


@pytest.mark.parametrize(
    ("tensors", "fields", "caught"),
    [
        ({"blk.0.attn_norm.weight": lambda w: w * 1.01}, None, {"contract.tensor_statistics"}),
        ({"blk.0.attn_q.weight": lambda w: w[::-1]}, None, {"contract.tensor_statistics"}),
        ({"blk.0.ffn_up.weight": lambda w: np.full_like(w, np.nan)}, None, {"contract.finite_weights"}),
        (None, {"llama.attention.layer_norm_rms_epsilon": 1e-6}, {"contract.metadata"}),
        (None, {"llama.rope.freq_base": 5e4}, {"contract.metadata", "contract.oracle_metadata"}),
        (None, {"tokenizer.ggml.eos_token_id": 5}, {"contract.special_ids"}),
        (None, {"tokenizer.ggml.add_bos_token": False}, {"contract.added_specials", "contract.token_ids"}),
        (None, {"tokenizer.chat_template": "{{ messages[0].content }}"}, {"contract.chat_render"}),
    ],
    ids=["norm", "rows", "nan", "epsilon", "theta", "eos", "bos", "template"],
)
def test_a_fault_of_the_contract_is_named_without_inference(
    tensors: Any, fields: Any, caught: set[str], family: Family, reference: ReferenceFile, tmp_path: Path
) -> None:
    path = rewrite(family.files["F16"], tmp_path / "fault.gguf", tensors=tensors, fields=fields)
    checks, _ = contract_of(Candidate("F16", read_gguf(path)), reference)
    assert caught <= {check.name for check in checks if check.value}


def test_the_contract_of_healthy_files_finds_nothing_but_fallbacks(healthy: Report) -> None:
    contract = next(leg for leg in healthy.legs if leg.name == "contract")
    assert [(c.name, c.subject) for c in contract.checks if c.value and c.name != "contract.fallback_types"] == []


def test_a_transposed_tensor_fails_by_logits_and_by_statistics(family: Family, written: Path, tmp_path: Path) -> None:
    path = rewrite(family.files["F16"], tmp_path / "f.gguf", tensors={"blk.1.attn_output.weight": lambda w: w.T})
    report = verify(written, [path], policy=LOOSE, threads=1)
    failed = {check.name for leg in report.legs for check in leg.checks if check.status == "fail"}
    assert report.verdict == "fail"
    assert {"convert.mean_kld", "contract.tensor_statistics", "cells.chat.mean_kld"} <= failed


def test_the_gate_calls_for_every_check_that_needs_no_weights(healthy: Report) -> None:
    """A report without one of them was cut; one that lost its marker calls for the weights' checks again."""
    for name in ("contract.tensor_statistics", "contract.inventory", "quality.mean_kld", "cells.decode.top1"):
        legs = [leg.model_copy(update={"checks": [c for c in leg.checks if c.name != name]}) for leg in healthy.legs]
        assert decide(healthy.model_copy(update={"legs": legs}), LOOSE).verdict == "incomplete", name
    roles = [a.model_copy(update={"role": a.role.removesuffix("_file")}) for a in healthy.artefacts]
    assert decide(healthy.model_copy(update={"artefacts": roles}), LOOSE).verdict == "incomplete"


@pytest.mark.parametrize(
    ("label", "means", "decided"),
    [
        ("F16", Means(2e-6, 1e-6, 9e-6), True),
        ("F16", Means(2e-6, 1e-6, 2e-5), False),
        ("F16", Means(0.5, 0.4, 1e-3), True),  # the lower bound alone is far outside
        ("Q8_0", Means(2e-3, 1e-3, 2e-4), True),  # its bound is not the conversion's; the interval holds the error
    ],
)
def test_a_float_file_that_the_samples_cannot_decide_needs_the_weights(
    label: str, means: Means, decided: bool, healthy: Report, family: Family
) -> None:
    divergence = next(d for d in healthy.divergences if d.candidate == label)
    candidate = Candidate(label, read_gguf(family.files[label]))
    kld = divergence_leg(candidate, Measured(divergence, means, None, []))[0]
    assert (kld.value is not None) == decided
    assert ("needs the weights" in kld.detail) != decided


def test_what_is_of_use_with_the_weights_only_is_refused(family: Family, written: Path) -> None:
    with pytest.raises(InputError, match="--base is of use with the weights only"):
        verify(written, [family.files["F16"]], base=family.base)
    with pytest.raises(InputError, match="is not a reference file"):
        verify(family.files["F16"], [family.files["F16"]])


def test_the_same_checkpoint_gives_the_same_bytes(family: Family, written: Path, tmp_path: Path) -> None:
    write_reference(family.reference, tmp_path / "again.so8t", work_dir=family.work, **SMALL)
    assert (tmp_path / "again.so8t").read_bytes() == written.read_bytes()


def test_chats_with_tools_and_thinking_are_recorded(reference: ReferenceFile) -> None:
    names = {chat.name: chat for chat in reference.header.chats}
    assert names["a tool called"].tools
    assert (names["thinking on"].enable_thinking, names["thinking off"].enable_thinking) == (True, False)
    assert all(chat.ids for chat in reference.header.chats if chat.name.startswith("user"))
