"""Fits and extrapolations of `benchmarks.scaling` on data whose law is known, and every job once at a tiny shape."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.scaling import _MEMORY, _TIME, PHI35, analyse, exponent, fit, page
from benchmarks.scaling_jobs import JOBS, Point, Shape, resized

TINY = Shape(layers=1, width=256, inner=256, kv_width=256, vocab=512, context=64, files=1)


def made_up(job: str, seconds: float = 1e-3) -> list[Point]:
    """Points whose time is the sum of the job's terms and whose memory is 4 bytes a weight and a megabyte."""
    _, base, axes = JOBS[job]
    points = []
    for axis, values in axes.items():
        for value in values:
            shape = resized(base, axis, value)
            time = seconds * sum(term(shape) for term in _TIME[job].values())
            points.append(Point(job, axis, value, time, 1 + 4e-6 * shape.weights, shape))
    return points


@given(st.floats(-2, 3), st.floats(1e-6, 1e6))
def test_exponent_of_a_power_law_is_its_power(power: float, factor: float) -> None:
    x = [1.0, 2.0, 4.0, 8.0]
    found = exponent(x, [factor * v**power for v in x])
    assert found.slope == pytest.approx(power, abs=1e-9)
    assert found.low == pytest.approx(found.high, abs=1e-6)


def test_interval_of_an_exponent_holds_a_noisy_law() -> None:
    x = [1.0, 2.0, 4.0, 8.0, 16.0]
    noisy = exponent(x, [v**2 * e for v, e in zip(x, (1.1, 0.9, 1.05, 0.95, 1.02), strict=True)])
    assert noisy.low < 2 < noisy.high
    assert noisy.high - noisy.low > 0.05
    assert exponent(x[:2], [1.0, 4.0])[1:] == (-math.inf, math.inf)


@pytest.mark.parametrize("job", list(JOBS))
def test_cost_model_finds_the_law_that_made_the_points(job: str) -> None:
    points = made_up(job)
    shapes = [point.shape for point in points]
    model = fit(shapes, [point.seconds for point in points], _TIME[job])
    assert model.largest_error < 1e-6
    for shape in shapes:
        assert model(_TIME[job], shape) == pytest.approx(1e-3 * sum(t(shape) for t in _TIME[job].values()), rel=1e-5)
    memory = fit(shapes, [point.megabytes for point in points], _MEMORY[job])
    assert memory(_MEMORY[job], PHI35) == pytest.approx(1 + 4e-6 * PHI35.weights, rel=1e-3)


def test_a_law_that_the_terms_cannot_make_shows_in_the_error() -> None:
    points = made_up("train step")
    wrong = [p.seconds * (10.0 if p.axis == "context" and p.value == 1024 else 1.0) for p in points]
    assert fit([p.shape for p in points], wrong, _TIME["train step"]).largest_error > 0.3


def test_shapes_hold_the_published_numbers_of_weights() -> None:
    assert PHI35.weights == pytest.approx(3.82e9, rel=0.01)
    from benchmarks.scaling import LLAMA70

    assert LLAMA70.weights == pytest.approx(70.6e9, rel=0.01)


def test_numbers_for_large_models_follow_from_the_models_and_the_page_shows_them() -> None:
    points = [point for job in JOBS for point in made_up(job)]
    document = {"machine": "M <1>", "date": "D", "seconds": 1.0, **analyse(points)}
    numbers = document["extrapolated"]["3.8B"]
    expected = 1e-3 * sum(term(PHI35) for term in _TIME["train step"].values())
    assert numbers["train step of 2048 tokens, s"] == pytest.approx(expected, rel=1e-3)
    logits = 12 * 255 * 32064 * 4e-9
    assert numbers["verify: logits on the disk, GB"] == pytest.approx(logits)
    alone = numbers["verify: one candidate more, s"] + numbers["verify: its re-quantised oracle, s"]
    threads = numbers["1000 candidates a day, one reference: threads"]
    assert threads == pytest.approx((1000 * alone + numbers["verify: the reference once, s"]) / 86400)
    assert document["extrapolated"]["70B"]["bake, s"] > 10 * numbers["bake, s"]
    json.dumps(document)
    html = page(document, points)
    assert html.count("<svg") == 2 * len(JOBS)
    assert "<1>" not in html
    assert "http" not in html


@pytest.mark.parametrize("job", list(JOBS))
def test_every_job_runs(job: str) -> None:
    work, _, axes = JOBS[job]
    assert 0 < work(TINY) < 60
    for axis in axes:
        assert getattr(resized(TINY, axis, 512), axis) == 512
