"""Codes that are not the nearest: none in a healthy file, whatever its matrix, and some wherever other weights are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from verification.engines.quantise import quantised_bytes
from verification.gguf.reader import GGUFTensor
from verification.weight_parity import judge as judging
from verification.weight_parity.judge import judge
from verification.weight_parity.own_quantiser import log_normal
from verification.weight_parity.places import Heads
from verification.weight_parity.structure.rounding import STORED_OTHERWISE, nearest_values, rounding

Change = Callable[[np.ndarray], np.ndarray]
W = (0.05 * np.random.default_rng(1).standard_t(5, (256, 512))).astype(np.float16).astype(np.float32)
NOISE = np.random.default_rng(2).standard_normal(W.shape).astype(np.float32)
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
CELLS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", *K_QUANTS, "IQ4_NL", "IQ4_XS", "MXFP4")
SLOW = ("IQ1_S", "IQ1_M", "IQ2_S")  # llama.cpp first builds a grid: 4 to 8 seconds each
LATTICES = ("IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ3_S", *(pytest.param(kind, marks=pytest.mark.soak) for kind in SLOW))
UNKNOWN = log_normal(W.shape[1], 1.2, 99)


def tensor(values: np.ndarray, kind: str, matrix: np.ndarray | None = UNKNOWN) -> GGUFTensor:
    raw = quantised_bytes(np.ascontiguousarray(values, dtype=np.float32), kind, matrix)
    assert raw is not None
    return GGUFTensor("blk.0.ffn_up.weight", values.shape, kind, raw)


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("scale", [1.0, 1e-3])  # scales below float16's normal numbers
@pytest.mark.parametrize("spread", [0.0, 1.0, 2.0])
def test_llama_cpp_rounds_to_nearest_under_any_matrix(kind: str, spread: float, scale: float) -> None:
    values = np.float32(scale) * W
    made = tensor(values, kind, log_normal(W.shape[1], spread, 7) if spread else None)
    found = rounding(made, made.values(), values)
    assert found is not None
    if kind in STORED_OTHERWISE and spread:  # rounded with one scale, stored with another
        assert found.share < 0.02
        assert found.unexplained == 0
    else:
        assert found.count == 0


@pytest.mark.parametrize("kind", CELLS)
def test_other_weights_leave_the_nearest_codes(kind: str) -> None:
    made = tensor(W + np.float32(0.02 * W.std()) * NOISE, kind)
    found = rounding(made, made.values(), W)
    assert found is not None
    assert found.share > 0.005
    if kind in STORED_OTHERWISE:
        assert found.unexplained > 0.1
    nearest = nearest_values(made, made.values(), W)
    assert nearest is not None
    assert np.linalg.norm(nearest - W) < np.linalg.norm(made.values() - W)
    ideal = rounding(made, nearest, W)
    assert ideal is not None
    assert ideal.count == 0


def test_a_lattices_codes_have_no_cells() -> None:
    made = tensor(W, "IQ3_S")
    assert rounding(made, made.values(), W) is None
    assert nearest_values(made, made.values(), W) is None


def _scaled(part: tuple[slice, slice], factor: float) -> Change:
    def change(w: np.ndarray) -> np.ndarray:
        out = w.copy()
        out[part] *= np.float32(factor)
        return out

    return change


def _row_noise(w: np.ndarray) -> np.ndarray:
    out = w.copy()
    out[9] += np.float32(0.2 * w.std()) * NOISE[9]
    return out


ALL = slice(None)
PLACES: dict[str, tuple[Change, str]] = {
    "a row with 20 % of noise": (_row_noise, "a row damaged"),
    "the columns of one head x 1.05": (_scaled((ALL, slice(128, 192)), 1.05), "a head's columns"),
    "the rows of one head x 1.05": (_scaled((slice(64, 128), ALL), 1.05), "a head"),
    "a row x 1.03": (_scaled((slice(9, 10), ALL), 1.03), "a row"),
    "rows x 1.03": (_scaled((slice(0, 256, 7), ALL), 1.03), "a row"),
    "all x 1.01": (lambda w: w * np.float32(1.01), "scaled by 1.0"),
}


@pytest.mark.parametrize("fault", PLACES)
@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "IQ4_XS", "Q5_0"])
def test_a_part_with_other_weights_behind_an_unknown_matrix_is_named(fault: str, kind: str) -> None:
    change, words = PLACES[fault]
    if kind == "Q5_0" and fault in ("all x 1.01", "rows x 1.03"):
        pytest.skip("a matrix moves scales of Q5_0 as much, and its codes know no scale")
    made = tensor(change(W), kind)
    (finding,) = judge(made, made.values(), W, heads=Heads(rows=64, columns=64)).findings
    assert words in finding.cause


@pytest.mark.parametrize("kind", LATTICES)
def test_a_superblock_of_zeros_is_refused(kind: str) -> None:
    made = tensor(W, kind)
    assert judge(made, made.values(), W).findings == ()
    raw = made.raw.copy()
    size = raw.size // (W.size // 256)
    raw[30 * size : 31 * size] = 0
    zeroed = GGUFTensor(made.name, W.shape, kind, raw)
    (finding,) = judge(zeroed, zeroed.values(), W).findings
    assert finding.cause in ("a row damaged", "damaged block")


@pytest.mark.parametrize("kind", [*CELLS, *LATTICES])
def test_heavy_tailed_rows_raise_no_alarm_under_a_wide_matrix(kind: str) -> None:
    """Columns of Q2_K did: under a wide matrix a column of little weight loses its scale."""
    heavy = W * np.exp(np.random.default_rng(5).standard_normal((len(W), 1))).astype(np.float32)
    made = tensor(heavy, kind, log_normal(W.shape[1], 2.0, 3))
    judged = judge(made, made.values(), heavy, heads=Heads(rows=32, columns=64))
    assert judged.findings == ()


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "IQ4_XS", "Q4_0"])
def test_a_close_fine_tune_is_left_to_the_layers_output(kind: str) -> None:
    made = tensor(W + np.float32(0.01 * W.std()) * NOISE, kind)
    judged = judge(made, made.values(), W)
    assert judged.findings == ()
    assert "not the nearest" in judged.open
    assert judged.ratio < 1.2


@pytest.mark.parametrize(("rows", "heads"), [((9, 77), Heads()), ((0, 64), Heads(rows=64))])
def test_rows_that_hold_each_others_weights_are_named(rows: tuple[int, int], heads: Heads) -> None:
    other, (one, two) = W.copy(), rows
    other[one : one + heads.rows], other[two : two + heads.rows] = W[two : two + heads.rows], W[one : one + heads.rows]
    made = tensor(other, "Q4_K")
    (finding,) = judge(made, made.values(), W, heads=heads).findings
    assert (finding.cause, finding.code) == ("the reference's rows in another order", "row_order")


def test_cells_prove_little_of_a_reference_on_a_grid() -> None:
    """A row scaled by 1.02 keeps its codes there, each far inside its cell: its scale still stands out."""
    grid = tensor(W, "Q4_K", None).values()
    for spread in (1.0, 1.5):
        healthy = tensor(grid, "Q4_K", log_normal(W.shape[1], spread, 5))
        assert judge(healthy, healthy.values(), grid).findings == ()
    row = grid.copy()
    row[9] *= np.float32(1.02)
    scaled = tensor(row, "Q4_K")
    (finding,) = judge(scaled, scaled.values(), grid).findings
    assert finding.cause == "a row scaled"


def worse_search(amount: float) -> tuple[GGUFTensor, np.ndarray, np.ndarray]:
    """Weights on a grid, rounded to nearest on scales that were searched for other weights: (tensor, values, weights).

    Another build misses the grid in this way.
    """
    grid = tensor(W, "Q4_K", None).values()
    made = tensor(grid + np.float32(amount * W.std()) * NOISE, "Q5_K", None)
    values = nearest_values(made, made.values(), grid)
    assert values is not None
    return made, values, grid


def test_a_search_that_misses_the_grid_is_rounding_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    found = judge(*worse_search(0.03))
    assert (found.nearest, found.open, found.findings) == (True, "", ())
    assert 1.2 < found.allowed < found.ratio < 1.6
    monkeypatch.setattr(judging, "_off_grid", lambda kind, W: 0.0)
    assert "times the own quantiser's" in judge(*worse_search(0.03)).open


def test_an_error_above_the_types_own_is_not_excused_by_a_grid() -> None:
    found = judge(*worse_search(0.2))
    assert found.ratio > 1.9
    assert found.open or found.findings
