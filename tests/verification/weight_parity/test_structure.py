"""Each estimator of structure finds what it is made for, at its standard error, and nothing in rounding."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_elsewhere import gptq, q4_grid

from benchmarks.elsewhere import FAULTS, KNOWN_DIRECTION, causes, table
from verification.engines.quantise import quantised_bytes
from verification.gguf.reader import GGUFTensor
from verification.weight_parity.judge import CHOSEN, judge
from verification.weight_parity.own_quantiser import SAMPLED
from verification.weight_parity.structure.direction import Direction, direction, together
from verification.weight_parity.structure.low_rank import low_rank
from verification.weight_parity.structure.scale import group_scale, scale
from verification.weight_parity.structure.shift import shift
from verification.weight_parity.values import Start, Wanted, compared

RNG = np.random.default_rng(0)
W = (0.05 * RNG.standard_t(5, (384, 512))).astype(np.float32)
MATRIX = np.exp(np.random.default_rng(7).standard_normal(512)).astype(np.float32)


def tensor(values: np.ndarray, kind: str, matrix: np.ndarray | None = MATRIX) -> GGUFTensor:
    raw = quantised_bytes(np.ascontiguousarray(values, dtype=np.float32), kind, matrix)
    assert raw is not None
    return GGUFTensor("blk.0.ffn_up.weight", values.shape, kind, raw)


def lora(size: float, rank: int = 8) -> np.ndarray:
    rng = np.random.default_rng(2)
    low = rng.standard_normal((len(W), rank)) @ rng.standard_normal((rank, W.shape[1]))
    return (size * np.linalg.norm(W) / np.linalg.norm(low) * low).astype(np.float32)


def test_a_scale_is_its_factor_and_its_standard_error_covers_it() -> None:
    noise = 0.003 * RNG.standard_normal(W.shape).astype(np.float32)
    values = np.float32(1.02) * W + noise
    found = scale(values, values - W)
    assert found.value == pytest.approx(1 - 1 / 1.02, abs=6 * found.standard_error + 0.003**2 / 0.05**2)
    assert 0 < found.standard_error < 1e-3
    empty = scale(np.zeros((4, 4), dtype=np.float32), np.zeros((4, 4), dtype=np.float32))
    assert (empty.value, empty.standard_error) == (0, 0)


@pytest.mark.parametrize(("axis", "size"), [(0, 1), (1, 1), (0, 32)])
def test_the_group_that_stands_out_is_found(axis: int, size: int) -> None:
    values = W + 0.003 * RNG.standard_normal(W.shape).astype(np.float32)
    part = slice(3 * size, 4 * size)
    values[part if axis == 0 else slice(None), part if axis == 1 else slice(None)] *= np.float32(1.1)
    found = group_scale(values, values - W, axis=axis, size=size)
    assert found.index == 3
    assert found.value == pytest.approx(1 - 1 / 1.1, abs=0.02)
    assert found.z > 14
    assert group_scale(W, 0.003 * RNG.standard_normal(W.shape).astype(np.float32), axis=axis, size=size).z < 6


def test_a_shift_is_in_the_references_rms() -> None:
    rms = float(np.sqrt(np.mean(W**2)))
    found = shift(W, np.full_like(W, 0.01) + 0.001 * RNG.standard_normal(W.shape).astype(np.float32))
    assert found.value == pytest.approx(0.01 / rms, rel=1e-3)
    assert found.standard_error == pytest.approx(0.01 / rms / np.sqrt(W.size), rel=0.1)


@pytest.mark.parametrize("share", [-1.0, 1.0, 0.5])
def test_the_known_direction_is_the_share_that_is_missing_or_too_much(share: float) -> None:
    change = lora(0.01)
    values = tensor(W + share * change, "Q8_0", None).values()
    found = direction(values, values - W, change, block=32)
    assert found is not None
    assert found.value == pytest.approx(share, abs=6 * found.standard_error)
    assert found.detected
    healthy = tensor(W, "Q8_0", None).values()
    none = direction(healthy, healthy - W, change, block=32)
    assert none is not None
    assert not none.detected
    assert direction(values, values - W, np.zeros_like(W), block=32) is None


def test_directions_add_up_by_their_weights() -> None:
    found = together([Direction(-1.0, 0.2), Direction(-0.5, 0.4), Direction(3.0, 0.0)])
    assert found is not None
    assert found.value == pytest.approx((-25 - 0.5 * 6.25) / 31.25)
    assert found.standard_error == pytest.approx(31.25**-0.5)
    assert together([]) is None
    assert found.cause == "the change from the base scaled by 0.1"


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "Q4_K", "Q4_0", "Q3_K", "Q2_K", "IQ4_XS"])
def test_rounding_has_no_low_rank_part_and_a_missing_lora_has(kind: str) -> None:
    block = 16 if kind in ("Q6_K", "Q3_K", "Q2_K") else 32
    values = tensor(W, kind).values()
    healthy = low_rank(values, values - W, block=block)
    assert healthy is not None
    assert not healthy.detected
    assert not healthy.coloured
    size = {"Q8_0": 0.01, "Q6_K": 0.02, "Q2_K": 0.2}.get(kind, 0.06)
    values = tensor(W + lora(size), kind).values()
    faulty = low_rank(values, values - W, block=block)
    assert faulty is not None
    assert faulty.detected
    assert low_rank(values[:32], values[:32] - W[:32], block=block) is None  # too few rows for a spectrum


def test_error_feedback_colours_the_spectrum_and_is_no_low_rank_part() -> None:
    rng = np.random.default_rng(1)
    X = rng.standard_normal((1024, 32)) @ rng.standard_normal((32, 512)) + 2 * rng.standard_normal((1024, 512))
    plain = tensor(W, "Q4_0", None)
    step, least = q4_grid("Q4_0", plain.raw.tobytes(), W.shape)
    values = (gptq(W, X.astype(np.float32), (step, least)) * step + least).astype(np.float32)
    found = low_rank(values, values - W, block=32)
    assert found is not None
    assert found.leading > found.threshold
    assert found.coloured
    assert not found.detected
    judged = judge(plain, values, W)
    assert judged.findings == ()
    assert judged.open


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "Q5_0", "Q4_K", "Q4_0", "IQ4_XS", "Q3_K", "Q2_K"])
def test_the_judge_believes_a_matrix_and_refuses_other_weights(kind: str) -> None:
    healthy = tensor(W, kind)
    judged = judge(healthy, healthy.values(), W)
    assert (judged.findings, judged.open) == ((), "")
    other = tensor(W[::-1], kind)
    (finding,) = judge(other, other.values(), W).findings
    assert finding.where == healthy.name
    noisy = tensor(W + 4 * np.abs(healthy.values() - W).std() * RNG.standard_normal(W.shape), kind)
    found = judge(noisy, noisy.values(), W)
    assert found.ratio > CHOSEN
    assert found.findings


def _row_noise(w: np.ndarray) -> np.ndarray:
    out = w.copy()
    out[9] += 0.4 * w.std() * np.random.default_rng(1).standard_normal(w.shape[1])
    return out


def _noise_off_the_sample(w: np.ndarray) -> np.ndarray:
    out = w.copy()
    others = np.setdiff1d(np.arange(len(w)), np.linspace(0, len(w) - 1, SAMPLED).astype(np.int64))
    out[others] += 0.2 * w.std() * np.random.default_rng(1).standard_normal((len(others), w.shape[1]))
    return out


def _zeroed(at: tuple[object, object]) -> Callable[[np.ndarray], np.ndarray]:
    def zero(w: np.ndarray) -> np.ndarray:
        out = w.copy()
        out[at] = 0
        return out

    return zero


@pytest.mark.parametrize(
    ("kind", "change", "cause"),
    [
        ("Q4_K", _row_noise, "a row damaged"),
        ("Q6_K", _row_noise, "a row damaged"),
        ("Q4_K", _noise_off_the_sample, "a row damaged"),
        ("Q3_K", _zeroed((9, slice(None))), "a row damaged"),
        ("Q2_K", _zeroed((9, slice(None))), "a row damaged"),
        ("IQ2_XS", _zeroed((9, slice(None))), "a row damaged"),
        ("Q3_K", _zeroed((slice(None), 70)), "a column damaged"),
        ("Q2_K", _zeroed((slice(None), 70)), "a column damaged"),
    ],
)
def test_damage_in_few_rows_or_columns_does_not_drown_in_the_rest(
    kind: str, change: Callable[[np.ndarray], np.ndarray], cause: str
) -> None:
    faulty = tensor(change(W), kind)
    assert cause in {finding.cause for finding in judge(faulty, faulty.values(), W).findings}
    healthy = tensor(W, kind)
    assert judge(healthy, healthy.values(), W).findings == ()


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0"])
def test_a_reference_that_is_no_number_explains_nothing(kind: str) -> None:
    wanted = W.copy()
    wanted[5, 5] = np.nan
    found = compared(tensor(1.2 * W, kind), Wanted(wanted, lambda: iter([Start("F16", wanted)]))).result
    assert found.drawer == "unexplained"
    assert "NaN" in found.findings[0].found


def test_what_snaps_back_to_a_grid_is_not_called_missing() -> None:
    """A merge smaller than half a step of a reference's own grid is lost by every quantiser: the file is healthy."""
    grid = tensor(W, "Q4_0", None).values()
    reference = grid + lora(0.002)
    plain = tensor(reference, "Q4_0", None)
    alone = direction(plain.values(), plain.values() - reference, reference - grid, block=32)
    assert alone is not None
    assert alone.value < -0.5  # the merge is gone
    assert judge(plain, plain.values(), reference, base=grid).findings == ()


def test_the_published_strengths_are_the_measured_ones() -> None:
    """docs/detection.md holds the table of docs/elsewhere.json, which `benchmarks.elsewhere` wrote."""
    docs = Path(__file__).parents[3] / "docs"
    result = json.loads((docs / "elsewhere.json").read_text(encoding="utf-8"))
    assert table(result) in (docs / "detection.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("fault", "strength"), [(f[0], f[2][-1]) for f in FAULTS])
def test_the_strongest_published_fault_is_seen_in_eight_bits(fault: str, strength: float) -> None:
    plant = next(f[1] for f in FAULTS if f[0] == fault)
    faulty = plant(W, strength, 3)
    base = faulty if fault == KNOWN_DIRECTION else None
    assert causes(W, tensor(faulty, "Q8_0", None), base=base)


def test_experts_are_proven_each_with_its_own_importance() -> None:
    """llama.cpp quantises expert by expert with its own part of the matrix; experts exchanged are no proof."""
    rng = np.random.default_rng(3)
    values = rng.standard_normal((3, 80, 256)).astype(np.float32)
    importance = np.exp(rng.standard_normal(3 * 256)).astype(np.float32)
    parts = [quantised_bytes(w, "Q4_K", m) for w, m in zip(values, importance.reshape(3, 256), strict=True)]
    raw = np.concatenate([part for part in parts if part is not None])
    wanted = Wanted(values, lambda: iter([Start("F16", values)]), importance=importance)
    assert compared(GGUFTensor("x", values.shape, "Q4_K", raw), wanted).result.proof == "from F16 with the imatrix"
    swapped = np.concatenate([raw.reshape(3, -1)[i] for i in (0, 2, 1)])
    found = compared(GGUFTensor("x", values.shape, "Q4_K", swapped), wanted).result
    assert not found.proof
    alone = compared(GGUFTensor("x", values.shape, "Q4_K", raw), replace(wanted, importance=None)).result
    assert not alone.proof
