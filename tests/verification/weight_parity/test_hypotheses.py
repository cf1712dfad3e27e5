"""Every hypothesis is the array its name says, and the choice between them is the formula of the module's docstring."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
import torch

from so8t_core.folding import Fold, Turn
from so8t_core.gate import distant_channels
from so8t_core.rotation import exp_so8
from verification.weight_parity.hypotheses import (
    DECIDED,
    EXPECTED,
    Known,
    Nearest,
    Other,
    halves_to_pairs,
    hypotheses,
    nearest,
    rotated,
    rotation_of,
    sample_rows,
)

RNG = np.random.default_rng(0)


def weights(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def rotation(width: int, seed: int = 1) -> torch.Tensor:
    """(width / 8, 8, 8) orthogonal, far from symmetric."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([np.linalg.qr(rng.standard_normal((8, 8)))[0] for _ in range(width // 8)]))


def dense(R: torch.Tensor) -> np.ndarray:
    return torch.block_diag(*R).numpy()


def table(known: Known) -> dict[str, np.ndarray]:
    found = list(hypotheses(known))
    assert found[0][0] == EXPECTED == "expected"
    return dict(found)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal within the float32 rounding of products of 8 terms of size 1, from float64."""
    return bool(a.shape == b.shape and np.abs(a - b).max() < 1e-6)


def test_rotations_of_the_input_of_o_proj() -> None:
    W, R = weights(24, 16), rotation(16)
    Q = dense(R)
    found = table(Known("o", W, rotation=R))
    assert list(found) == [
        "expected",
        "not rotated (R missing)",
        "rotated back (R^T in place of R)",
        "rotated twice",
    ]
    assert found["expected"] is W
    assert same(found["not rotated (R missing)"], W @ Q.T)
    assert same(found["rotated back (R^T in place of R)"], W @ Q.T @ Q.T)
    assert same(found["rotated twice"], W @ Q)
    assert same(rotated(W, R), W @ Q)
    assert same(rotated(W, R, transposed=True), W @ Q.T)
    assert all(array.dtype == np.float32 and array.flags.c_contiguous for array in found.values())


def test_a_square_o_proj_may_be_rotated_on_the_wrong_side_or_transposed() -> None:
    W, R = weights(16, 16), rotation(16)
    Q = dense(R)
    found = table(Known("o", W, rotation=R))
    assert list(found)[-2:] == ["rotated on the wrong side (R @ W)", "transposed"]
    assert same(found["rotated on the wrong side (R @ W)"], Q @ (W @ Q.T))  # of the weight before its rotation
    assert same(found["transposed"], W.T)
    assert found["transposed"].flags.c_contiguous


def test_v_proj_may_be_rotated_as_well_and_nothing_else_is_rotated() -> None:
    R = rotation(16)
    V = weights(16, 24)
    found = table(Known("v", V, rotation=R))
    assert list(found) == ["expected", "rotated as well (R @ v_proj)"]
    assert same(found["rotated as well (R @ v_proj)"], dense(R) @ V)
    assert list(table(Known("v", weights(8, 24), rotation=R))) == ["expected"]  # grouped heads: R does not fit
    for role in ("q", "k", "other"):
        assert list(table(Known(role, weights(16, 24), rotation=R))) == ["expected"]  # type: ignore[arg-type]
    assert list(table(Known("o", weights(16, 24)))) == list(table(Known("v", V))) == ["expected"]


def test_the_base_and_the_layers_other_tensors_stand_as_they_are() -> None:
    W, base, q, k = (weights(16, 24, seed) for seed in range(4))
    found = table(Known("v", W, base=base, siblings=(("q_proj", q), ("k_proj", k), ("small", weights(8, 24)))))
    assert list(found) == [
        "expected",
        "the base's own weight (nothing baked)",
        "q_proj of the same layer",
        "k_proj of the same layer",
    ]
    assert found["the base's own weight (nothing baked)"] is base
    assert found["k_proj of the same layer"] is k


@pytest.mark.parametrize("role", ["q", "k"])
def test_rows_for_rope_are_permuted_both_ways(role: Any) -> None:
    W = np.arange(8, dtype=np.float32)[:, None] * np.ones((1, 3), dtype=np.float32)  # two heads of four rows
    to_pairs, to_halves = [0, 2, 1, 3, 4, 6, 5, 7], [0, 2, 1, 3, 4, 6, 5, 7]
    six = np.arange(12, dtype=np.float32)[:, None]  # two heads of six rows, where the two ways differ
    pairs, halves = [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11], [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    for values, rows, there, back in ((W, 4, to_pairs, to_halves), (six, 6, pairs, halves)):
        plain = table(Known(role, values, head_rows=rows))
        assert list(plain) == ["expected", "q/k rows un-permuted", "q/k rows permuted"]
        assert plain["q/k rows un-permuted"][:, 0].tolist() == back
        assert plain["q/k rows permuted"][:, 0].tolist() == there
        paired = table(Known(role, values, head_rows=rows, in_pairs=True))
        assert list(paired) == ["expected", "q/k rows not permuted", "q/k rows permuted twice"]
        assert paired["q/k rows not permuted"][:, 0].tolist() == back
        assert paired["q/k rows permuted twice"][:, 0].tolist() == there
    assert list(table(Known(role, six))) == ["expected"]  # no head size
    assert list(table(Known(role, six, head_rows=3))) == ["expected"]  # an odd one has no halves
    assert list(table(Known("v", six, head_rows=6))) == ["expected"]
    assert halves_to_pairs(six, 6)[:, 0].tolist() == pairs
    assert halves_to_pairs(np.arange(8.0, dtype=np.float32), 4).tolist() == to_pairs  # a bias has one axis


@pytest.mark.parametrize(("rows", "step"), [(5, 1), (31, 1), (32, 1), (63, 1), (64, 2), (100, 3)])
def test_a_sample_is_every_nth_row(rows: int, step: int) -> None:
    values = weights(rows, 3)
    assert np.array_equal(sample_rows(values), values[::step])


def by_hand(actual: np.ndarray, table: list[tuple[str, np.ndarray]]) -> Nearest:
    """The docstring's formulas, with table[0] the expectation."""
    away = [np.linalg.norm(actual - H) for _, H in table]
    order = sorted(range(len(table)), key=lambda i: away[i])
    a, b = order[0], order[1]
    s = away[a] / math.sqrt(actual.size)

    def z(other: int) -> float:
        apart = np.linalg.norm(table[a][1] - table[other][1])
        return float((away[other] ** 2 - away[a] ** 2) / (2 * s * apart)) if other != a else 0.0

    scale = np.linalg.norm(table[0][1])
    first, second, expected = (float(away[i] / scale) for i in (a, b, 0))
    return Nearest("t", table[a][0], first, table[b][0], second, z(b), expected, z(0))


def agree(found: Nearest, wanted: Nearest) -> None:
    assert (found.name, found.best, found.second) == (wanted.name, wanted.best, wanted.second)
    for field in ("distance", "second_distance", "z", "expected_distance", "z_expected"):
        assert type(getattr(found, field)) is float
        assert getattr(found, field) == pytest.approx(getattr(wanted, field), rel=1e-4), field  # norms in float32


def test_distances_and_preferences_are_the_formulas() -> None:
    W, R = weights(24, 16), rotation(16)
    noise = 0.05 * weights(24, 16, seed=9)
    known = Known("o", W, rotation=R)
    for truth in dict(hypotheses(known)).values():
        found = nearest("t", truth + noise, known)
        agree(found, by_hand(truth + noise, list(hypotheses(known))))
        assert found.is_fault == (found.best != EXPECTED)
        assert found.z > DECIDED


def test_an_exact_match_is_preferred_without_end_and_a_tie_not_at_all() -> None:
    W = weights(16, 16)
    found = nearest("t", W.copy(), Known("other", W))
    assert (found.best, found.distance, found.z, found.z_expected) == (EXPECTED, 0.0, math.inf, 0.0)
    turned = nearest("t", np.ascontiguousarray(W.T), Known("other", W))
    assert (turned.best, turned.z_expected, turned.is_fault) == ("transposed", math.inf, True)
    small = np.float32(1e-3) * W
    assert nearest("t", np.ascontiguousarray(small.T), Known("other", small)).z_expected == math.inf
    symmetric = np.ones((4, 4), dtype=np.float32)
    alone = nearest("t", symmetric + 1, Known("other", symmetric))  # its transpose is itself and drops out
    assert (alone.best, alone.second, alone.z, alone.second_distance) == (EXPECTED, "", 0.0, 1.0)
    nothing = np.zeros((2, 3), dtype=np.float32)
    zero = nearest("t", nothing + 2, Known("other", nothing))
    assert zero.distance == pytest.approx(math.sqrt(6 * 4))  # a zero expectation leaves the distance absolute


def test_a_hypothesis_of_another_shape_is_left_out() -> None:
    W, odd = weights(16, 8), weights(8, 8)
    found = nearest("t", W, Known("v", W, base=odd))
    assert (found.best, found.second) == (EXPECTED, "")


@pytest.mark.parametrize(
    ("z", "best", "fault"),
    [
        (4.0, "transposed", True),
        (3.99, "transposed", False),
        (math.inf, EXPECTED, False),
    ],
)
def test_a_fault_needs_a_preference_of_four_standard_deviations(z: float, best: str, fault: bool) -> None:
    assert DECIDED == 4.0
    assert Nearest("t", best, 0, "", 0, 9, 0, z).is_fault == fault


def others(count: int) -> list[Other]:
    arrays = [weights(64, 16, seed=20 + i) for i in range(count)]
    return [Other(f"layer {i}", sample_rows(a), lambda a=a: a) for i, a in enumerate(arrays)]


def test_the_nearest_of_the_other_layers_joins_when_it_is_nearer_or_nothing_else_is_there() -> None:
    W, near = weights(64, 16), others(3)
    found = nearest("t", near[1].load() + 0.01, Known("other", W), near)
    assert (found.best, found.second) == ("layer 1", EXPECTED)
    agree(found, by_hand(near[1].load() + 0.01, [(EXPECTED, W), ("layer 1", near[1].load())]))
    # nothing but the expectation to compare with: the nearest other layer stands second
    alone = nearest("t", W, Known("other", W), near)
    assert alone.best == EXPECTED
    assert alone.second.startswith("layer ")
    # something else is there and the other layers are farther: they stay out
    base = W + weights(64, 16, seed=5)
    assert nearest("t", W, Known("other", W, base=base), near).second == "the base's own weight (nothing baked)"
    # nearer than all that is there, one of several
    joined = nearest("t", near[1].load() + 0.01, Known("other", W, base=base), near)
    assert (joined.best, joined.is_fault) == ("layer 1", True)
    three = [(EXPECTED, W), ("the base's own weight (nothing baked)", base), ("layer 1", near[1].load())]
    agree(joined, by_hand(near[1].load() + 0.01, three))
    # another shape cannot be compared
    assert nearest("t", W, Known("other", W), [Other("odd", weights(3, 16), lambda: W)]).second == ""


def test_other_layers_are_read_in_full_only_when_they_are_needed() -> None:
    def never() -> np.ndarray:
        raise AssertionError("read although farther")

    W = weights(64, 16)
    base = W + weights(64, 16, seed=5)
    far = [Other("far", sample_rows(weights(64, 16, seed=7)), never)]
    assert nearest("t", W, Known("other", W, base=base), far).best == EXPECTED
    equal = [Other("as near", sample_rows(W), never)]  # the same distance is no reason to prefer it
    assert nearest("t", W, Known("other", W, base=base), equal).best == EXPECTED


def test_outcomes_and_inputs_cannot_be_changed() -> None:
    W = weights(8, 8)
    known = Known("other", W)
    assert (known.base, known.rotation, known.in_pairs, known.head_rows, known.siblings) == (None, None, False, 0, ())
    for thing, field in ((known, "role"), (nearest("t", W, known), "best"), (Other("o", W, lambda: W), "name")):
        with pytest.raises(FrozenInstanceError):
            setattr(thing, field, "x")


def test_what_an_adapter_does_to_an_input_is_a_rotation_or_a_fold_without_its_lora() -> None:
    rng = np.random.default_rng(3)
    theta, again = (torch.from_numpy(rng.normal(0, 0.5, (2, 28)).astype(np.float32)) for _ in range(2))
    c = torch.from_numpy(rng.normal(0, 0.3, 16).astype(np.float32))
    lora = [(torch.ones(1, 16), torch.ones(24, 1), 1.0)]
    W, Q = weights(24, 16), dense(exp_so8(theta.double()))
    assert rotation_of(Fold(loras=lora)) is None
    plain = rotation_of(Fold(loras=lora, theta=theta))
    assert isinstance(plain, torch.Tensor)
    assert same(rotated(W, plain), W @ Q)
    scaled = rotation_of(Fold(loras=lora, theta=theta, log_scale=c))
    assert isinstance(scaled, Fold)
    D = np.diag(np.exp(c.double().numpy()))
    assert same(rotated(W, scaled), W @ Q @ D)
    assert same(rotated(W, scaled, transposed=True), W @ np.linalg.inv(Q @ D))
    order = distant_channels(2)
    shuffled = rotation_of(Fold(loras=lora, theta=theta, shuffled=Turn(again), order=order))
    assert isinstance(shuffled, Fold)
    P = np.eye(16)[order.numpy()]
    assert same(rotated(W, shuffled), W @ P.T @ dense(exp_so8(again.double())) @ P @ Q)


def test_a_fold_is_undone_and_doubled_but_turns_no_rows() -> None:
    """Scale and shuffle act on the input; a square W could hold the same map on its left, which no program computes."""
    rng = np.random.default_rng(4)
    theta = torch.from_numpy(rng.normal(0, 0.5, (2, 28)).astype(np.float32))
    fold = rotation_of(Fold(loras=[], theta=theta, log_scale=torch.from_numpy(rng.normal(0, 0.3, 16))))
    W = weights(16, 16)
    found = table(Known("o", W, rotation=fold))
    assert "rotated on the wrong side (R @ W)" not in found
    assert same(rotated(found["not rotated (R missing)"], fold), W)
    assert same(found["rotated twice"], rotated(W, fold))


@pytest.mark.parametrize(
    ("best", "code"),
    [
        ("expected", ""),
        ("the base's own weight (nothing baked)", "merge"),
        ("not rotated (R missing)", "rotation"),
        ("rotated back (R^T in place of R)", "rotation"),
        ("rotated twice", "rotation"),
        ("rotated on the wrong side (R @ W)", "rotation"),
        ("rotated as well (R @ v_proj)", "rotation"),
        ("transposed", "transposed"),
        ("q/k rows not permuted", "head_rows"),
        ("q/k rows un-permuted", "head_rows"),
        ("q/k rows permuted twice", "head_rows"),
        ("q/k rows permuted", "head_rows"),
    ],
)
def test_each_hypothesis_has_the_code_of_its_finding(best: str, code: str) -> None:
    found = Nearest("a", best, 0.0, "", 0.0, 9.0, 1.0, 9.0)
    assert found.code == code
