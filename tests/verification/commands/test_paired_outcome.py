"""A file with judged tensors is held to llama.cpp's own quantisation of the same tensors, chunk by chunk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from verification_models import Family

from verification import decide, verify
from verification.commands.paired_outcome import ratio_check
from verification.engines.quantise import quantise
from verification.gate.decide import _decide_check
from verification.gate.policy import make_policy
from verification.gate.report import Check, Report
from verification.gguf.reader import read_gguf
from verification.weight_parity.own_quantiser import log_normal

RNG = np.random.default_rng(0)
OWN = np.stack([RNG.lognormal(size=8) * 20, np.full(8, 20.0)], axis=1)  # (chunks, 2)


def of(mine: np.ndarray, own: np.ndarray = OWN, left: tuple[str, ...] = ()) -> Check:
    return ratio_check("Q4_K_M", mine, own, 3, list(left), "seed")


def test_the_ratio_is_the_means_and_pairing_narrows_its_interval() -> None:
    mine = OWN.copy()
    mine[:, 0] *= 1.1 + 0.02 * RNG.standard_normal(8)
    found = of(mine)
    assert isinstance(found.value, float)
    assert found.value == pytest.approx(mine[:, 0].sum() / OWN[:, 0].sum())
    assert found.interval is not None
    low, high = found.interval
    assert 1 < low <= found.value <= high < 1.25  # single chunks' KLDs differ by a factor of ten
    assert of(OWN).value == 1


@pytest.mark.parametrize(
    ("mine", "own", "left"),
    [
        (OWN[:1], OWN[:1], ()),  # one chunk has no interval
        (OWN[:4], OWN, ()),
        (OWN, OWN * [0, 1], ()),  # nothing to be compared with
        (OWN, OWN, ("blk.0.ffn_up.weight",)),  # a type that this build cannot make
    ],
)
def test_what_cannot_be_paired_is_not_evaluated(mine: np.ndarray, own: np.ndarray, left: tuple[str, ...]) -> None:
    assert of(mine, own, left).value is None


def test_a_worse_outcome_fails_and_an_equal_one_passes() -> None:
    """The upper end decides: a KLD of 1.2 times the own passes only where the text can tell it from 1.25."""
    scatter = 1 + 0.02 * RNG.standard_normal(8)
    statuses = [_status(of(OWN * np.stack([factor * scatter, np.ones(8)], axis=1))) for factor in (0.7, 1.0, 1.1, 1.6)]
    assert statuses == ["pass", "pass", "pass", "fail"]
    wild = OWN * np.stack([np.where(np.arange(8) % 2, 0.2, 2.0), np.ones(8)], axis=1)
    assert _status(of(wild)) != "pass"


def _status(check: Check) -> str:
    return _decide_check(check, make_policy({}), "Q4_K_M", judged=True).status


def test_a_file_with_an_unknown_matrix_is_paired_and_one_that_is_proven_is_not(family: Family, tmp_path: Path) -> None:
    floats = read_gguf(family.files["F16"])
    names = [name for name, one in floats.tensors.items() if len(one.shape) == 2 and name.startswith("blk.")]
    matrix = {name: log_normal(floats.tensors[name].shape[-1], 1.0, 7) for name in names}
    made = quantise(family.files["F16"], tmp_path / "m.gguf", "Q4_K_M", imatrix=matrix)
    files = [family.files["Q4_K_M"], made]
    report = verify(family.reference, files, work_dir=family.work, n_ctx=64, chunks=6, base_damage=False, threads=1)
    proven, judged = _ratios(report).values()
    assert proven == []
    (check,) = judged
    assert check.status == "pass", check
    assert check.value != 1
    assert not list(family.work.glob("own-*"))
    legs = [leg.model_copy(update={"checks": [c for c in leg.checks if c is not check]}) for leg in report.legs]
    (gap,) = [
        c for leg in decide(report.model_copy(update={"legs": legs})).legs for c in leg.checks if "complete" in c.name
    ]
    assert "quantise.kld_ratio" in gap.detail


def _ratios(report: Report) -> dict[str, list[Check]]:
    checks = [check for leg in report.legs for check in leg.checks if check.name == "quantise.kld_ratio"]
    labels = [artefact.label for artefact in report.artefacts if artefact.role == "candidate"]
    return {label: [check for check in checks if check.subject == label] for label in labels}
