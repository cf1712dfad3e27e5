"""The least-squares estimate finds the rotation that was put in, through noise, and is silent without one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from so8t_core.folding import rotate_rows
from so8t_core.rotation import exp_so8
from verification.weight_parity.hypotheses import EXPECTED, Known, Other, nearest, rotated, sample_rows
from verification.weight_parity.structure.rotation import residual_rotation


def weights(out: int = 512, width: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((out, width)).astype(np.float32)


def turn(W: np.ndarray, angle: float, seed: int = 1) -> tuple[np.ndarray, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    R = exp_so8(angle * torch.randn(W.shape[1] // 8, 28, generator=generator, dtype=torch.float64))
    return rotate_rows(torch.from_numpy(W).double(), R).numpy(), R


@pytest.mark.parametrize("angle", [1e-4, 1e-3, 1e-2])
def test_a_small_rotation_is_measured_to_second_order(angle: float) -> None:
    """exp(A) = I + A + A^2/2: the estimate misses by the order of angle^2; a plane of 28 has unit variance."""
    W = weights()
    residual = residual_rotation(W, turn(W, angle)[0] - W)
    assert residual is not None
    assert residual.detected
    assert residual.rms == pytest.approx(angle, rel=0.05)  # 896 angles: a standard error of 1 / sqrt(2 * 896) = 2.4 %


def test_the_standard_error_is_the_noise_over_the_root_of_the_rows() -> None:
    """Independent noise r on unit weights: an angle has the standard error r / sqrt(2 out)."""
    W, r = weights(out=2048), 0.06
    noise = r * np.random.default_rng(2).standard_normal(W.shape).astype(np.float32)
    residual = residual_rotation(W, noise)
    assert residual is not None
    assert residual.standard_error == pytest.approx(r / np.sqrt(2 * 2048), rel=0.05)
    assert not residual.detected
    assert abs(residual.z_together) < 4


def test_a_rotation_far_below_the_noise_of_one_weight_is_detected() -> None:
    W = weights(out=2048)
    noise = 0.06 * np.random.default_rng(2).standard_normal(W.shape).astype(np.float32)
    found = residual_rotation(W, turn(W, 2e-3)[0] - W + noise)
    assert found is not None
    assert found.detected
    assert found.rms == pytest.approx(2e-3, rel=0.15)


def test_a_common_factor_is_no_rotation() -> None:
    W = weights()
    residual = residual_rotation(W, 0.05 * W)
    assert residual is not None
    assert residual.rms < 1e-9


def test_widths_that_are_no_multiple_of_eight_are_left_out() -> None:
    assert residual_rotation(weights(width=255), weights(width=255)) is None


@pytest.mark.parametrize("angle", [3e-3, 0.1, 2.0])
@pytest.mark.parametrize("noise", [0.0, 5e-3, 0.07])
def test_the_nearest_hypothesis_is_the_truth_at_every_noise(angle: float, noise: float) -> None:
    """The noise of a float file, of Q8_0 and of a 4-bit type."""
    W, R = turn(weights(out=256), angle)
    W = W.astype(np.float32)
    known = Known("o", W, rotation=R)
    back = rotated(W, R, transposed=True)
    truths = {
        EXPECTED: W,
        "not rotated (R missing)": back,
        "rotated back (R^T in place of R)": rotated(back, R, transposed=True),
        "rotated twice": rotated(W, R),
    }
    generator = np.random.default_rng(3)
    for name, values in truths.items():
        found = nearest("t", values + noise * generator.standard_normal(W.shape).astype(np.float32), known)
        assert found.best == name
        assert found.is_fault == (name != EXPECTED)


def test_another_layers_tensor_wins_only_when_it_is_nearer() -> None:
    W, other = weights(), weights(seed=9)
    others = [Other("the tensor of blk.7", sample_rows(other), lambda: other)]
    assert nearest("t", W, Known("v", W), others).best == EXPECTED
    found = nearest("t", other, Known("v", W), others)
    assert (found.best, found.is_fault) == ("the tensor of blk.7", True)
