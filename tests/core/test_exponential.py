"""Laws of the exponential at research grade: against scipy's float64 expm, at the angles where others fail."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from so8t_core import exp_so8, skew
from so8t_core.exponential import TERMS, evaluate, plans

PLANES = {"one plane": 1, "two equal planes": 2, "four equal planes": 4}
ANGLES = [0.0, 1e-310, 1e-40, 1e-3, 1.0, 1.99, math.pi, math.nextafter(math.pi, 4), 4.0, 6.49, 50.0]


def sample(kind: str, angle: float, count: int = 64) -> torch.Tensor:
    """theta (count, 28) float64 whose largest plane angle is `angle`."""
    generator = torch.Generator().manual_seed(0)
    if kind == "generic":
        theta = torch.randn(count, 28, dtype=torch.float64, generator=generator)
        return theta / torch.linalg.matrix_norm(skew(theta), 2)[:, None] * angle
    Q = torch.linalg.qr(torch.randn(count, 8, 8, dtype=torch.float64, generator=generator))[0]
    J = torch.zeros(8, 8, dtype=torch.float64)
    for plane in range(PLANES[kind]):
        J[2 * plane, 2 * plane + 1], J[2 * plane + 1, 2 * plane] = angle, -angle
    i, j = torch.triu_indices(8, 8, 1)
    return (Q @ J @ Q.mT)[:, i, j]


def oracle(theta: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.stack([scipy.linalg.expm(A) for A in skew(theta.detach().double()).numpy()]))


def orthogonality(R: torch.Tensor) -> float:
    return (R.mT @ R - torch.eye(8, dtype=R.dtype)).abs().max().item()


def oracle_gradient(theta: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Gradient of <weight, exp(A)>: adjoint of scipy's Frechet derivative, which is that of the transposed matrix."""
    i, j = torch.triu_indices(8, 8, 1)
    out = []
    for A, W in zip(skew(theta.detach().double()).numpy(), weight.double().numpy(), strict=True):
        L = scipy.linalg.expm_frechet(A.T, W, compute_expm=False)
        out.append(torch.from_numpy(L - L.T)[i, j])
    return torch.stack(out)


@pytest.mark.parametrize("angle", ANGLES)
@pytest.mark.parametrize("kind", ["generic", *PLANES])
def test_float32_rotation_is_the_rounded_exact_one(kind: str, angle: float) -> None:
    theta = sample(kind, angle).float()
    R = exp_so8(theta)
    # An entry of R is at most 1, so correct rounding errs by 2^-25 = 3.0e-8; scipy's own error adds 1e-13 at angle 50.
    assert (R.double() - oracle(theta)).abs().max().item() <= 3.1e-8
    # Eight products of rounded entries: measured 1.2e-7 to 2.4e-7; the bar is 5e-7 up to pi and 1e-6 up to 50.
    assert orthogonality(R) <= 5e-7


@pytest.mark.parametrize("angle", ANGLES)
@pytest.mark.parametrize("kind", ["generic", *PLANES])
def test_float64_rotation_is_orthogonal_to_rounding(kind: str, angle: float) -> None:
    assert orthogonality(exp_so8(sample(kind, angle))) <= 2e-15


@pytest.mark.parametrize("angle", ANGLES)
@pytest.mark.parametrize("kind", ["generic", *PLANES])
def test_float64_is_as_good_as_scipy(kind: str, angle: float) -> None:
    """Of 40 digits ours errs by 1e-15 up to 6.5 and 3e-15 at 50; scipy by 1e-15 below 2, up to 2e-14 at 4."""
    theta = sample(kind, angle, count=16).requires_grad_(True)
    bound = 2e-15 if angle < 2 else 1e-14 * angle
    R = exp_so8(theta)
    assert (R.detach() - oracle(theta)).abs().max().item() <= bound
    weight = torch.randn(16, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad(R, theta, weight)
    expected = oracle_gradient(theta, weight)
    assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max().item() <= 3 * bound


@pytest.mark.parametrize("angle", [0.0, 1e-310, 1e-40, 1e-3, 1.0, 1.99, math.pi, 4.0, 6.49, 20.0])
@pytest.mark.parametrize("kind", ["generic", *PLANES])
def test_float32_gradient_is_accurate(kind: str, angle: float) -> None:
    theta = sample(kind, angle, count=16).float().requires_grad_(True)
    weight = torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad(exp_so8(theta), theta, weight)
    expected = oracle_gradient(theta, weight)
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max().item() <= 2e-7  # computed in float64, rounded once (6e-8); the bar is 2e-6


def test_plain_float32_would_miss_the_bars() -> None:
    """The bars bite: PyTorch's own float32 exponential does not meet them."""
    theta = sample("four equal planes", math.pi).float()
    assert (torch.matrix_exp(skew(theta)).double() - oracle(theta)).abs().max().item() > 5e-7
    theta = sample("generic", 50.0).float()
    assert orthogonality(torch.matrix_exp(skew(theta))) > 5e-6


@pytest.mark.parametrize("angle", [0.0, 0.5, 1.9, math.pi, 7.0])
def test_gradcheck(angle: float) -> None:
    theta = sample("generic", angle, count=2).requires_grad_(True)
    assert torch.autograd.gradcheck(exp_so8, (theta,))


@pytest.mark.parametrize("dtype", TERMS)
def test_squarings_bring_every_angle_within_reach(dtype: torch.dtype) -> None:
    for angle in (0.3, 1.0, 3.0, 50.0):
        for kind in PLANES:
            theta = sample(kind, angle).to(dtype)
            largest = torch.linalg.matrix_norm(skew(theta), 2).max().item()
            (plan,) = plans([theta])
            reach = next(far for far, terms in TERMS[dtype] if terms == plan.terms)
            assert largest * 0.5**plan.squarings <= reach * (1 + torch.finfo(dtype).eps)
    assert plans([torch.zeros(3, 28, dtype=dtype)])[0].squarings == 0


def test_angles_up_to_pi_need_no_squaring() -> None:
    for kind in PLANES:
        assert plans([sample(kind, math.pi).float()])[0].squarings == 0
    assert plans([sample("one plane", 7.0).float()])[0].squarings == 1


def test_a_block_does_not_feel_its_neighbours_angles() -> None:
    """A scale for each block, undone with as many squarings as the largest block needs, is wrong for all others."""
    theta = torch.cat([sample("generic", angle, 4) for angle in (0.1, 0.9, 3.0, 50.0)])
    want = oracle(theta)
    assert (exp_so8(theta) - want).abs().max().item() <= 1e-12  # float64's own error at angle 50 is the largest part
    A = skew(theta)
    scale = torch.ceil(torch.log2(torch.linalg.matrix_norm(A))).clamp(min=0)
    wrong = torch.linalg.matrix_exp(A / 2 ** scale[:, None, None])
    for _ in range(int(scale.max())):
        wrong = wrong @ wrong
    assert orthogonality(wrong) < 1e-10  # still rotations, so that no check of orthogonality can see it
    assert (wrong - want)[-4:].abs().max().item() <= 1e-10  # the largest blocks alone are right
    assert (wrong - want)[:-4].abs().amax(dim=(1, 2)).min().item() > 0.1


def test_a_batch_of_several_is_each_of_them_alone() -> None:
    """Whatever their lengths, dtypes and sizes: the pieces find their owners again."""
    thetas = [
        sample("generic", angle, count).float() for angle, count in [(0.1, 700), (1.0, 700), (3.0, 2500), (0.1, 900)]
    ]
    thetas += [sample("one plane", 50.0, 3), torch.zeros(0, 28), sample("generic", 1.9, 5).float()]
    weights = [torch.randn(len(theta), 8, 8, dtype=theta.dtype) for theta in thetas]
    known = evaluate(thetas, workings=True)
    for theta in thetas:
        theta.requires_grad_(True)
    together = known.connected(thetas)
    at_once = torch.autograd.grad(together, thetas, weights)
    for k, (theta, weight) in enumerate(zip(thetas, weights, strict=True)):
        alone = exp_so8(theta)
        eps = torch.finfo(theta.dtype).eps  # the last bit may depend on the size of a batch
        assert together[k].shape == alone.shape
        assert torch.allclose(together[k], alone, rtol=0, atol=eps)
        want = torch.autograd.grad(alone, theta, weight)[0]
        for found in (at_once[k], torch.autograd.grad(together[k], theta, weight)[0]):  # once more, by itself
            assert torch.allclose(found, want, rtol=4 * eps, atol=64 * eps)


def test_thetas_that_are_not_trained_are_left_out() -> None:
    thetas = [sample("generic", 0.5, 5).float().requires_grad_(k != 1) for k in range(3)]
    known = evaluate(thetas, workings=True)
    R = known.connected([thetas[0], thetas[1], None])
    sum(part.square().sum() + part[:, 0].sum() for part in R).backward()
    assert thetas[0].grad is not None
    assert thetas[1].grad is None
    assert thetas[2].grad is None


def test_a_bad_theta_among_several_is_named() -> None:
    bad = torch.zeros(2, 28)
    bad[0, 0] = math.nan
    with pytest.raises(ValueError, match="second: theta has a NaN or Inf"):
        evaluate([torch.zeros(2, 28), bad], workings=False, names=["first", "second"])


def test_shapes_and_chunks() -> None:
    assert exp_so8(torch.zeros(0, 28)).shape == (0, 8, 8)
    assert exp_so8(torch.zeros(2, 3, 28)).shape == (2, 3, 8, 8)
    theta = sample("generic", 1.0, count=2500).float()  # two chunks
    parts = torch.cat([exp_so8(theta[:1]), exp_so8(theta[1:])])
    # The number of squarings may differ between the calls; the rounded result may then differ in its last bit.
    assert (exp_so8(theta) - parts).abs().max().item() <= 6e-8


@pytest.mark.parametrize(
    ("bad", "words"), [(math.nan, "a NaN or Inf"), (math.inf, "a NaN or Inf"), (2e4, "limit is 10000")]
)
def test_nan_infinity_and_absurd_angles_never_become_a_rotation(bad: float, words: str) -> None:
    theta = torch.ones(2, 28)
    theta[1, 3] = bad
    with pytest.raises(ValueError, match=words):
        exp_so8(theta)
