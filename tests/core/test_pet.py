"""PET: zero on straight lines, blind to padding, three phases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from so8t_core import PETSchedule, pet_penalty

BAD = [0.0, 1e4, float("nan"), float("inf")]


@given(seed=st.integers(0, 2**32 - 1), T=st.integers(0, 12))
def test_a_straight_line_costs_nothing(seed, T):
    generator = torch.Generator().manual_seed(seed)
    start, slope = (
        torch.randint(-8, 9, (2, 1, 4), generator=generator),
        torch.randint(-8, 9, (2, 1, 4), generator=generator),
    )
    h = (start + slope * torch.arange(T).view(1, T, 1)).float()  # integers: exact in float32
    assert pet_penalty(h).item() == 0


def test_a_bend_costs_the_mean_square_of_the_second_difference():
    h = torch.tensor([0.0, 0.0, 1.0, 4.0]).view(1, 4, 1)  # d2 = 1, 2
    assert pet_penalty(h).item() == pytest.approx((1 + 4) / 2)
    assert pet_penalty(h, huber_delta=1.0).item() == pytest.approx(
        (0.5 + 1.5) / 2
    )  # 1/2 d^2, then delta (|d| - delta/2)
    assert pet_penalty(h.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("huber", [None, 0.5])
@given(seed=st.integers(0, 2**32 - 1), left=st.integers(0, 4), right=st.integers(0, 4))
def test_padding_changes_neither_the_value_nor_the_gradient(bad, huber, seed, left, right):
    h = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(seed))
    padded = torch.full((2, 6 + left + right, 3), bad)
    padded[:, left : left + 6] = h
    mask = torch.zeros(2, 6 + left + right, dtype=torch.long)
    mask[:, left : left + 6] = 1
    h.requires_grad_()
    padded.requires_grad_()
    plain, masked = pet_penalty(h, huber_delta=huber), pet_penalty(padded, mask, huber_delta=huber)
    plain.backward()
    masked.backward()
    assert masked.item() == pytest.approx(plain.item(), rel=1e-6)
    torch.testing.assert_close(padded.grad[:, left : left + 6], h.grad)
    outside = padded.grad * (1 - mask).unsqueeze(-1)
    assert torch.equal(outside, torch.zeros_like(outside))


def test_without_the_mask_padding_would_show():
    h = torch.randn(1, 6, 3)
    h[:, 4:] = 1e4
    assert pet_penalty(h).item() > 1e3 * pet_penalty(h, torch.tensor([[1, 1, 1, 1, 0, 0]])).item()


def test_a_triple_across_two_packed_sequences_does_not_count():
    line = torch.arange(5.0).view(1, 5, 1)
    packed = torch.cat([line, 100 - line], dim=1)
    segments = torch.tensor([[0] * 5 + [1] * 5])
    assert pet_penalty(packed, segments_BT=segments).item() == 0
    assert pet_penalty(packed).item() > 1


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("T", [0, 1, 2, 5])
def test_no_valid_triple_gives_zero_with_a_graph(bad, T):
    h = torch.full((2, T, 3), bad, requires_grad=True)
    penalty = pet_penalty(h, torch.zeros(2, T))
    penalty.backward()
    assert penalty.item() == 0
    assert torch.equal(h.grad, torch.zeros_like(h))


def test_a_nan_in_a_real_token_is_not_hidden():
    h = torch.zeros(1, 4, 2)
    h[0, 1, 0] = torch.nan
    assert torch.isnan(pet_penalty(h, torch.ones(1, 4)))


def test_wrong_shapes_and_deltas_are_refused():
    h = torch.zeros(2, 5, 3)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 4\), the hidden states need \(2, 5\)"):
        pet_penalty(h, torch.ones(2, 4))
    with pytest.raises(ValueError, match="segments has shape"):
        pet_penalty(h, segments_BT=torch.ones(5, 2))
    with pytest.raises(ValueError, match="huber_delta must be positive, got 0"):
        pet_penalty(h, huber_delta=0)


@pytest.mark.parametrize("total", [5, 10, 15, 100, 1000])
def test_the_phases_take_20_40_and_40_percent_of_the_run(total):
    lambdas = [PETSchedule()(step, total) for step in range(total)]
    assert lambdas == [0.01] * (total // 5) + [0.05] * (2 * total // 5) + [0.1] * (2 * total // 5)


def test_the_schedule_survives_odd_runs_and_refuses_bad_weights():
    assert PETSchedule()(0, 0) == 0.01
    assert PETSchedule()(7, 5) == 0.1
    for weight in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite and >= 0"):
            PETSchedule(main=weight)
    with pytest.raises(ValueError, match="in order"):
        PETSchedule(shares=(0.7, 0.6))
