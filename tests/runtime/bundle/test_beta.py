"""The Beta distribution against scipy-free truths: integrals, known values, and fits to its own expectations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.bundle.beta import (
    EPSILON,
    LEAST_SHAPE,
    MOST_CONCENTRATION,
    UNIFORM,
    Beta,
    LogSums,
    digamma,
    most_likely,
    trigamma,
)
from runtime.errors import CalibrationError

shapes = st.floats(0.05, 200)


@pytest.mark.parametrize("beta", [Beta(1, 1), Beta(2, 3), Beta(8, 0.5), Beta(0.3, 0.3), Beta(500, 20)])
def test_a_density_integrates_to_one(beta: Beta) -> None:
    # In the logit, where the ends of [0, 1] are far apart.
    logit = np.linspace(-30, 30, 60_001)
    confidence = 1 / (1 + np.exp(-logit))
    inside = (confidence > EPSILON) & (confidence < 1 - EPSILON)
    mass = (beta.density(confidence) * confidence * (1 - confidence))[inside].sum() * (logit[1] - logit[0])
    tail = 0.05 if min(beta.a, beta.b) < 1 else 1e-3
    assert 1 - tail <= mass <= 1 + 1e-6
    assert float(beta.log_density(0.5)) == pytest.approx(math.log(float(beta.density(0.5))))


def test_derivatives_of_the_gamma_function() -> None:
    assert digamma(1.0) == pytest.approx(-0.5772156649015329, abs=1e-12)
    assert digamma(0.5) == pytest.approx(-0.5772156649015329 - 2 * math.log(2), abs=1e-12)
    assert trigamma(1.0) == pytest.approx(math.pi**2 / 6, abs=1e-12)
    for x in (0.01, 0.3, 2.0, 7.9, 8.1, 1e4):
        h = 1e-5 * x
        assert digamma(x) == pytest.approx((math.lgamma(x + h) - math.lgamma(x - h)) / (2 * h), rel=1e-6, abs=1e-6)
        assert trigamma(x) == pytest.approx((digamma(x + h) - digamma(x - h)) / (2 * h), rel=1e-6)


@given(a=shapes, b=shapes, start_a=shapes, start_b=shapes)
def test_the_expected_sums_of_a_beta_give_it_back_from_any_start(
    a: float, b: float, start_a: float, start_b: float
) -> None:
    found = most_likely(Beta(a, b).expected(100.0), Beta(start_a, start_b), steps=200)
    assert found.a == pytest.approx(a, rel=1e-3)
    assert found.b == pytest.approx(b, rel=1e-3)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), shapes, shapes)
def test_a_fit_is_never_less_likely_than_its_start(confidences: list[float], a: float, b: float) -> None:
    sums, start = LogSums.of(np.array(confidences)), Beta(a, b)
    for steps in (1, 2, 50):
        found = most_likely(sums, start, steps)
        assert found.log_likelihood(sums) >= start.log_likelihood(sums)
        assert min(found.a, found.b) >= LEAST_SHAPE
        assert found.a + found.b <= MOST_CONCENTRATION * 1.001


def test_log_sums_are_all_that_a_likelihood_needs() -> None:
    confidences = np.array([0.0, 0.2, 0.9, 1.0])
    beta = Beta(3, 0.7)
    assert beta.log_likelihood(LogSums.of(confidences)) == pytest.approx(float(beta.log_density(confidences).sum()))
    halves = LogSums.of(confidences[:2]) + LogSums.of(confidences[2:])
    assert beta.log_likelihood(halves.scaled(2.0)) == pytest.approx(2 * beta.log_likelihood(LogSums.of(confidences)))
    assert UNIFORM.expected(3.0) == pytest.approx((3.0, -3.0, -3.0))


@pytest.mark.parametrize("shape", [0.0, -1.0, math.nan, math.inf])
def test_a_shape_is_a_number_above_zero(shape: float) -> None:
    with pytest.raises(CalibrationError, match="a = "):
        Beta(shape, 1.0)
    with pytest.raises(CalibrationError, match="b = "):
        Beta(1.0, shape)
