"""exp and log of SO(8), their block-wise application, and the metrics on them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import expm
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from so8t_core import exp_so8, log_so8, orthogonality_error, plane_angles, rotate_blocks, skew

EYE = torch.eye(8)
# torch.matrix_exp in float64 is only this good where |A| is about 0.05: measured up to 1e-11 against scipy.
EXP64 = 1e-10
seeds = st.integers(0, 2**32 - 1)
angles = st.floats(0, 3.0)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def draw(seed: int, scale: float, n: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, 28, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale


def planes(*turns: float, seed: int = 0) -> torch.Tensor:
    """A rotation by the given angles in four orthogonal planes of a random orthonormal basis, float64."""
    A = torch.zeros(8, 8, dtype=torch.float64)
    for k, turn in enumerate(turns):
        A[2 * k, 2 * k + 1], A[2 * k + 1, 2 * k] = -turn, turn
    Q = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q
    return Q @ torch.linalg.matrix_exp(A) @ Q.T


@dtypes
@given(seed=seeds, scale=angles)
def test_exp_is_a_rotation(dtype, seed, scale):
    R = exp_so8(draw(seed, scale, dtype=dtype))
    # Scaling and squaring at |A| <= 3 * 16: at most 6 squarings, each may double an error of a few eps.
    bound = max(2**6 * 8 * torch.finfo(dtype).eps, EXP64)
    assert R.dtype == dtype
    assert orthogonality_error(R).max() <= bound
    assert (torch.linalg.det(R.double()) - 1).abs().max() <= 8 * bound


def test_the_orthogonality_error_sees_a_matrix_that_is_no_rotation():
    A = skew(draw(0, 0.5))
    cut_series = torch.eye(8, dtype=A.dtype) + A + A @ A / 2
    assert orthogonality_error(cut_series).min() > 1e-3


@dtypes
def test_exp_of_zero_is_exactly_the_identity(dtype):
    theta = torch.zeros(4, 28, dtype=dtype)
    assert torch.equal(exp_so8(theta), EYE.to(dtype).expand(4, 8, 8))
    theta[1] = draw(0, 3.0, n=1, dtype=dtype)[0]  # a neighbour's size must not matter
    assert torch.equal(exp_so8(theta)[[0, 2, 3]], EYE.to(dtype).expand(3, 8, 8))
    assert not torch.equal(exp_so8(theta)[1], EYE.to(dtype))


@given(seed=seeds, scale=angles)
def test_exp_agrees_with_scipy(seed, scale):
    theta = draw(seed, scale, n=1)
    A = np.zeros((8, 8))
    A[np.triu_indices(8, 1)] = theta[0].numpy()
    assert np.abs(exp_so8(theta)[0].numpy() - expm(A - A.T)).max() < EXP64
    if np.abs(A).max() > 1e-3:  # the other sign convention is another function
        assert np.abs(exp_so8(theta)[0].numpy() - expm(A.T - A)).max() > 1e-4


def test_the_first_parameter_turns_channel_1_into_channel_0():
    theta = torch.zeros(28, dtype=torch.float64)
    theta[0] = 0.1  # A[0, 1] = +theta
    R = exp_so8(theta)
    assert R[0, 1].item() == pytest.approx(np.sin(0.1))
    assert R[1, 0].item() == pytest.approx(-np.sin(0.1))


@given(seed=seeds, scale=st.floats(0, 30))
def test_exp_inverts_log(seed, scale):
    R = exp_so8(draw(seed, scale))
    theta = log_so8(R)
    assert (exp_so8(theta) - R).abs().max() < EXP64
    assert plane_angles(theta).max() <= np.pi + 1e-9


@given(seed=seeds)
def test_log_inverts_exp_below_pi(seed):
    theta = draw(seed, 1.0)
    theta *= 3.1 / plane_angles(theta).amax(-1, keepdim=True)
    assert (log_so8(exp_so8(theta)) - theta).abs().max() < EXP64


@dtypes
@pytest.mark.parametrize(
    "turns",
    [
        (0, 0, 0, 0),
        (1e-15, 0, 0, 0),
        (1e-9, 1e-5, 0, 0),
        (1.0, 1.0, 1.0, 1.0),
        (np.pi, 0, 0, 0),
        (np.pi, 1.0, 1.0, 0),
        (np.pi, np.pi, np.pi, np.pi),
        (np.pi - 1e-9, np.pi - 1e-9, 0.5, 0),
        (np.pi - 1e-4, np.pi, 0, 0),
        (3.0, 3.0, 3.0, 3.0),
    ],
)
def test_exp_inverts_log_at_the_degenerate_rotations(turns, dtype):
    R = torch.stack([planes(*turns, seed=seed) for seed in range(5)]).to(dtype)
    theta = log_so8(R)
    assert theta.dtype == dtype
    assert (exp_so8(theta) - R).abs().max() < max(100 * torch.finfo(dtype).eps, EXP64)
    want = torch.tensor(sorted(turns, reverse=True), dtype=torch.float64).expand(5, 4)
    # An eigenvalue's phase is as accurate as R; where the planes coincide LAPACK may split them by sqrt(eps).
    assert (plane_angles(theta) - want).abs().max() < 100 * torch.finfo(dtype).eps ** 0.5


def test_log_keeps_leading_dimensions_and_takes_none():
    assert log_so8(exp_so8(torch.randn(2, 3, 28) * 0.1)).shape == (2, 3, 28)
    assert log_so8(torch.zeros(0, 8, 8)).shape == (0, 28)


@pytest.mark.parametrize(
    ("R", "message"),
    [
        (2 * EYE, "not orthogonal: max .* = 3, bound 0.000119"),
        (EYE * torch.nan, "not orthogonal"),
        (torch.diag(torch.tensor([-1.0, 1, 1, 1, 1, 1, 1, 1])), "determinant -1"),
        (torch.eye(7), r"shape \(..., 8, 8\), got \(7, 7\)"),
    ],
)
def test_log_refuses_what_is_no_rotation(R, message):
    with pytest.raises(ValueError, match=message):
        log_so8(R)


def test_exp_refuses_another_number_of_parameters():
    with pytest.raises(ValueError, match=r"\(..., 28\), got \(2, 27\)"):
        exp_so8(torch.zeros(2, 27))


def test_the_gradient_of_exp_is_right():
    theta = draw(0, 1.0, n=2).requires_grad_()
    assert torch.autograd.gradcheck(exp_so8, (theta,), atol=1e-6)


@given(seed=seeds, scale=angles)
def test_rotating_blocks_is_the_dense_block_diagonal_product_and_keeps_the_norm(seed, scale):
    R = exp_so8(draw(seed, scale, n=3))
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    dense = torch.block_diag(*R)
    y = rotate_blocks(x, R)
    assert (y - x @ dense.T).abs().max() < 1e-12
    assert (y.norm(dim=-1) - x.norm(dim=-1)).abs().max() < 10 * EXP64
    if scale > 0.1:  # the other direction is another function
        assert (y - x @ dense).abs().max() > 1e-3


@pytest.mark.parametrize("rows", [1, 2, 300])
@pytest.mark.parametrize("n", [1, 2, 4, 6])
@pytest.mark.parametrize("angle", [1e-3, 0.3, np.pi])
def test_rotating_bfloat16_loses_no_small_angle(angle, n, rows):
    """Within 2^-8 (|y| + 2 |R - I| |x|): rounding y, the product and R - I once each (bfloat16 has 8 bits)."""
    theta = draw(0, 1.0, n=n)
    R = exp_so8(theta * angle / plane_angles(theta).max()).float()
    dense = torch.block_diag(*R.double())
    deviation = (dense - torch.eye(8 * n)).abs()
    x = torch.randn(rows, 8 * n, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    g = torch.randn(rows, 8 * n, generator=torch.Generator().manual_seed(2)).bfloat16()
    y = rotate_blocks(x, R)
    assert y.dtype == torch.bfloat16
    (x_bar,) = torch.autograd.grad(y, x, g)
    for found, value, M, D in ((y, x, dense.T, deviation.T), (x_bar, g, dense, deviation)):
        exact = value.double() @ M
        bound = 2**-8 * 1.01 * (exact.abs() + 2 * value.double().abs() @ D) + 1e-9
        assert ((found.double() - exact).abs() <= bound).all()
        wrong = value.double() @ M.T  # the bound tells the two directions apart
        assert angle < 0.1 or not ((found.double() - wrong).abs() <= bound).all()


def test_bfloat16_applies_a_rotation_and_not_its_rounding():
    """The map applied, estimated over 20000 rows, is R within 2^-8 |R - I|; R rounded to bfloat16 is not."""
    theta = draw(0, 1.0, n=1)
    R = exp_so8(theta * 0.1 / plane_angles(theta).max()).float()
    x = torch.randn(20000, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    eye = torch.eye(8, dtype=torch.float64)
    for turn, close in ((R, True), (R.bfloat16().float(), False)):
        found = torch.linalg.lstsq(x.double(), rotate_blocks(x, turn).double()).solution.T
        # The rounding of 20000 y leaves 2^-7 / sqrt(12 * 20000); five times that is allowed.
        bound = 2**-8 * (R.double() - eye).abs() + 5 * 2**-7 / (12 * 20000) ** 0.5
        assert bool(((found - R[0].double()).abs() <= bound).all()) == close


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "rows"), [(3, 1), (3, 700), (4, 1), (5, 2), (48, 2500)])
def test_the_gradient_of_the_rotation_is_the_dense_one(n, rows, dtype):
    """In several parts and tiles; R's gradient is summed in float32 whatever x's dtype."""
    R = exp_so8(draw(0, 1.0, n=n)).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    x = torch.randn(rows, 8 * n).to(dtype)
    g = torch.randn(rows, 8 * n).to(dtype)
    (R_bar,) = torch.autograd.grad(rotate_blocks(x, R), R, g)
    blocks = [v.double().view(rows, n, 8) for v in (g, x)]
    exact = torch.einsum("tki,tkj->kij", *blocks)
    scale = torch.einsum("tki,tkj->kij", *(v.abs() for v in blocks))
    assert ((R_bar - exact).abs() <= rows**0.5 * 2 * torch.finfo(R.dtype).eps * scale).all()


def test_a_transposed_or_expanded_input_is_rotated_like_its_copy():
    R = exp_so8(draw(0, 1.0, n=4)).float()
    for x in (
        torch.randn(32, 6).T,
        torch.randn(1, 32).expand(6, 32),
        torch.randn(6, 64)[:, ::2],
        torch.randn(3, 2, 32).transpose(0, 1),
    ):
        assert torch.equal(rotate_blocks(x, R), rotate_blocks(x.contiguous(), R))
        assert torch.equal(rotate_blocks(x[:1], R), rotate_blocks(x[:1].contiguous(), R))


@pytest.mark.parametrize("rows", [1, 64])
def test_autocast_does_not_coarsen_the_rotation(rows):
    theta, x = draw(0, 1e-3, n=2).float().requires_grad_(), torch.randn(rows, 16, requires_grad=True)

    def found() -> list[torch.Tensor]:
        y = rotate_blocks(x, exp_so8(theta))
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, theta])]

    want = found()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x.T).dtype == torch.bfloat16  # autocast is at work
        got = found()
    assert all(map(torch.equal, got, want))


def test_rotating_refuses_a_wrong_width():
    with pytest.raises(ValueError, match="24 channels, but 2 rotations turn 16"):
        rotate_blocks(torch.zeros(1, 24), EYE.expand(2, 8, 8))
    with pytest.raises(ValueError, match=r"\(n, 8, 8\), got \(8, 8\)"):
        rotate_blocks(torch.zeros(1, 64), EYE)
    assert rotate_blocks(torch.zeros(0, 16), EYE.expand(2, 8, 8)).shape == (0, 16)


def test_plane_angles_are_the_four_turns_largest_first():
    theta = log_so8(torch.stack([planes(0.1, 3.0, 1.0, 0.0), planes(2.0, 2.0, 2.0, 2.0)]))
    want = torch.tensor([[3.0, 1.0, 0.1, 0.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    assert (plane_angles(theta) - want).abs().max() < 1e-9


def test_a_second_derivative_is_an_error_and_never_a_part_of_one():
    theta, x = draw(0, 1.0, n=2).requires_grad_(), torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    R = exp_so8(theta)
    for y, by in ((R, theta), (rotate_blocks(x, R.detach().requires_grad_()), x)):
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(y.sum(), by, create_graph=True)


def test_forward_mode_is_an_error_and_never_a_derivative_of_zero():
    theta = draw(0, 1.0)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.jvp(exp_so8, (theta,), (theta,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        exp_so8(forward_ad.make_dual(theta, theta))


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_rotated_may_be_changed_in_place(rows, dtype):
    x, R = torch.randn(rows, 16).to(dtype), exp_so8(draw(0, 1.0, n=2)).float().requires_grad_()
    rotate_blocks(x, R).mul_(2).float().square().sum().backward()
    assert R.grad is not None


@pytest.mark.parametrize("mode", [FakeTensorMode, torch.inference_mode])
def test_no_mode_leaves_its_scratch_behind(mode):
    def run() -> None:
        with mode():
            rotate_blocks(torch.randn(4, 16).half(), torch.randn(2, 8, 8))
        found.extend(turned(x, R))

    found: list[torch.Tensor] = []
    x, R = torch.randn(4, 16), exp_so8(draw(0, 1.0, n=2)).float()
    thread = threading.Thread(target=run)  # a thread of its own: no scratch is kept from before
    thread.start()
    thread.join()
    assert all(map(torch.equal, found, turned(x, R)))
    assert len(found) == 6


def test_threads_do_not_share_their_scratch():
    R = exp_so8(draw(0, 1.0, n=48)).float()
    xs = [torch.randn(3000, 384, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in range(2)]
    want = [turned(x, R) for x in xs]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda k: all(map(torch.equal, turned(xs[k], R), want[k])), [0, 1] * 10))
    assert all(found)


def turned(x: torch.Tensor, R: torch.Tensor) -> list[torch.Tensor]:
    """y and both gradients: of float32 x, whose y passes through scratch memory, and of float16 x, widened there."""
    out = []
    for dtype in (torch.float32, torch.float16):
        inputs = [x.to(dtype).requires_grad_(), R.detach().requires_grad_()]
        y = rotate_blocks(*inputs)
        out += [y.detach(), *torch.autograd.grad(y, inputs, x.to(dtype))]
    return out
