"""round_once against an oracle of exact fractions that searches among all values of the target type."""

from __future__ import annotations

from bisect import bisect_left
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from so8t_core import round_once

TARGETS = {torch.bfloat16: (8, -133), torch.float16: (11, -24)}  # bits of precision, exponent of the smallest subnormal
targets = pytest.mark.parametrize("dtype", list(TARGETS), ids=str)
BITS = torch.arange(0, 2**15, dtype=torch.int16)  # all non-negative patterns, in the order of their values


def all_values(dtype: torch.dtype) -> list[float]:
    values = BITS.view(dtype).double()
    return values[torch.isfinite(values)].tolist()


VALUES = {dtype: all_values(dtype) for dtype in TARGETS}


def oracle(x: float, dtype: torch.dtype) -> float:
    """Nearest finite value of `dtype`, ties to the even pattern; |x| must lie within its range."""
    values = VALUES[dtype]
    above = bisect_left(values, abs(x))
    if values[above] == abs(x):
        nearest = above
    else:
        exact, low, high = Fraction(abs(x)), Fraction(values[above - 1]), Fraction(values[above])
        below_wins = exact - low < high - exact or (exact - low == high - exact and above % 2 == 1)
        nearest = above - 1 if below_wins else above
    return float(torch.tensor(values[nearest]).copysign(torch.tensor(x, dtype=torch.float64)))


def rounded(x: float, dtype: torch.dtype) -> float:
    return round_once(torch.tensor([x], dtype=torch.float64), dtype).double().item()


@targets
@given(data=st.data())
def test_rounding_is_to_the_nearest_even(dtype, data):
    limit = torch.finfo(dtype).max
    x = data.draw(st.floats(-limit, limit))
    assert rounded(x, dtype) == oracle(x, dtype)


@targets
@given(index=st.integers(0, 2**15 - 2), nudge=st.integers(-2, 2), negative=st.booleans())
@example(index=0, nudge=0, negative=True)  # half of the smallest subnormal: a tie with zero
@example(index=0, nudge=1, negative=False)
def test_midpoints_and_their_neighbours_are_rounded_right(dtype, index, nudge, negative):
    values = VALUES[dtype]
    index = min(index, len(values) - 2)
    x = torch.tensor((values[index] + values[index + 1]) / 2, dtype=torch.float64)  # exact in float64
    for _ in range(abs(nudge)):
        x = torch.nextafter(x, torch.tensor(float("inf") if nudge > 0 else 0.0, dtype=torch.float64))
    x = -x if negative else x
    assert rounded(x.item(), dtype) == oracle(x.item(), dtype)


@targets
def test_the_plain_cast_rounds_twice_and_is_wrong_there(dtype):
    bits, _ = TARGETS[dtype]
    x = torch.tensor([1 + 2.0**-bits + 2.0**-40, -1 - 2.0**-bits - 2.0**-40], dtype=torch.float64)  # just over a tie
    want = torch.tensor([1 + 2.0 ** (1 - bits), -1 - 2.0 ** (1 - bits)], dtype=torch.float64)
    assert torch.equal(round_once(x, dtype).double(), want)
    assert torch.equal(x.to(dtype).double(), want.sign())


def rounded_to_odd_first(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Boldo and Melquiond: truncate to float32, set its last bit if anything was lost, then round once."""
    single = x.to(torch.float32)
    truncated = single.view(torch.int32) - (single.double().abs() > x.abs()).to(torch.int32)
    return (truncated | (single.double() != x).to(torch.int32)).view(torch.float32).to(dtype)


@targets
def test_a_million_values_around_ties_agree_with_rounding_to_odd(dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor(VALUES[dtype], dtype=torch.float64)
    ties = ((values[1:] + values[:-1]) / 2).repeat(32)
    steps = torch.randint(-3, 4, ties.shape, generator=generator)
    x = ties * (1 + steps * 2.0 ** torch.randint(-52, -22, ties.shape, generator=generator).double())
    x = torch.cat([x, -x, torch.randn(2**16, dtype=torch.float64, generator=generator)])
    got, want = round_once(x, dtype), rounded_to_odd_first(x, dtype)
    assert torch.equal(got.view(torch.int16), want.view(torch.int16))  # the signs of zeros too
    assert (x.to(dtype) != want).sum() > 1000  # planted: the plain cast


@targets
def test_every_value_of_the_type_is_kept(dtype):
    values = torch.tensor(VALUES[dtype], dtype=torch.float64)
    assert torch.equal(round_once(values, dtype).double(), values)
    assert torch.equal(round_once(-values, dtype).double(), -values)
    assert torch.signbit(round_once(torch.tensor([-0.0, -1e-300], dtype=torch.float64), dtype)).all()


def test_float32_and_float64_are_single_roundings_already():
    x = torch.randn(100, dtype=torch.float64)
    assert torch.equal(round_once(x, torch.float32), x.float())
    assert torch.equal(round_once(x, torch.float64), x)


@targets
def test_infinities_and_nan_pass_through(dtype):
    x = torch.tensor([float("inf"), -float("inf"), float("nan")], dtype=torch.float64)
    assert torch.equal(round_once(x, dtype).double()[:2], x[:2])
    assert torch.isnan(round_once(x, dtype)[2])


@pytest.mark.parametrize("dtype", [*TARGETS, torch.float32], ids=str)
def test_the_largest_value_is_kept_and_the_next_one_is_refused(dtype):
    largest = torch.finfo(dtype).max
    half_step = (largest - torch.nextafter(torch.tensor(largest, dtype=dtype), torch.zeros((), dtype=dtype)).item()) / 2
    inside = torch.nextafter(
        torch.tensor(largest + half_step, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    )
    assert rounded(inside.item(), dtype) == largest
    for sign in (1, -1):
        with pytest.raises(ValueError, match=r"does not fit .*largest .*choose a wider dtype"):
            round_once(torch.tensor([0.0, sign * (largest + half_step)], dtype=torch.float64), dtype)


def test_shapes_are_kept():
    assert round_once(torch.zeros((), dtype=torch.float64), torch.bfloat16).shape == ()
    assert round_once(torch.zeros(0, 3, dtype=torch.float64), torch.float16).shape == (0, 3)


def test_other_types_are_refused():
    with pytest.raises(ValueError, match=r"not torch.int32"):
        round_once(torch.zeros(1, dtype=torch.int32), torch.bfloat16)
    with pytest.raises(ValueError, match=r"not torch.float8_e4m3fn"):
        round_once(torch.zeros(1, dtype=torch.float64), torch.float8_e4m3fn)
