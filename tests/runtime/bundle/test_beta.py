"""The Beta distribution against known values and fits to its own expectations; thresholds on a fine grid."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.bundle.beta import (
    EPSILON,
    MAX_CONCENTRATION,
    MIN_SHAPE,
    Beta,
    BetaMixture,
    LogSums,
    digamma,
    most_likely,
    threshold_at,
    trigamma,
)
from runtime.errors import CalibrationError

shapes = st.floats(0.05, 200)


def test_digamma_and_trigamma_match_known_values_and_differences() -> None:
    assert digamma(1.0) == pytest.approx(-0.5772156649015329, abs=1e-12)
    assert digamma(0.5) == pytest.approx(-0.5772156649015329 - 2 * math.log(2), abs=1e-12)
    assert trigamma(1.0) == pytest.approx(math.pi**2 / 6, abs=1e-12)
    for x in (0.01, 0.3, 2.0, 7.9, 8.1, 1e4):
        h = 1e-5 * x
        assert digamma(x) == pytest.approx((math.lgamma(x + h) - math.lgamma(x - h)) / (2 * h), rel=1e-6, abs=1e-6)
        assert trigamma(x) == pytest.approx((digamma(x + h) - digamma(x - h)) / (2 * h), rel=1e-6)


@given(a=shapes, b=shapes, start_a=shapes, start_b=shapes)
def test_beta_is_recovered_from_its_expected_sums_from_any_start(
    a: float, b: float, start_a: float, start_b: float
) -> None:
    found = most_likely(Beta(a, b).expected(100.0), Beta(start_a, start_b), steps=200)
    assert found.a == pytest.approx(a, rel=1e-3)
    assert found.b == pytest.approx(b, rel=1e-3)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), shapes, shapes)
def test_fit_is_at_least_as_likely_as_its_start(confidences: list[float], a: float, b: float) -> None:
    sums, start = LogSums.of(np.array(confidences)), Beta(a, b)
    for steps in (1, 2, 50):
        found = most_likely(sums, start, steps)
        assert found.log_likelihood(sums) >= start.log_likelihood(sums)
        assert min(found.a, found.b) >= MIN_SHAPE
        assert found.a + found.b <= MAX_CONCENTRATION * 1.001


@pytest.mark.parametrize("shape", [0.0, -1.0, math.nan, math.inf])
def test_shapes_that_are_not_positive_numbers_are_refused(shape: float) -> None:
    with pytest.raises(CalibrationError, match="a = "):
        Beta(shape, 1.0)
    with pytest.raises(CalibrationError, match="b = "):
        Beta(1.0, shape)


SHARP = BetaMixture(Beta(8.0, 0.5), Beta(1.5, 2.5), 0.85)
mild = st.floats(0.1, 30)
mixtures = st.builds(BetaMixture, st.builds(Beta, mild, mild), st.builds(Beta, mild, mild), st.floats(0.02, 0.98))


def test_posterior_follows_bayes_rule() -> None:
    confidences = np.array([[0.1, 0.5], [0.9, 0.999]])
    agree = SHARP.weight_agree * SHARP.agree.density(confidences)
    assert SHARP.posterior(confidences) == pytest.approx(agree / SHARP.density(confidences))
    assert float(SHARP.posterior(1.0)) == float(SHARP.posterior(1 - EPSILON))
    extreme = BetaMixture(Beta(1e4, 1e-2), Beta(1e-2, 1e4), 0.5)
    assert extreme.posterior(np.array([0.0, 1.0])).tolist() == [0.0, 1.0]


@given(mixture=mixtures, target=st.floats(0.05, 0.999))
def test_posterior_reaches_the_target_above_the_threshold(mixture: BetaMixture, target: float) -> None:
    threshold = threshold_at(mixture, target)
    logit = np.linspace(-13.8, 13.8, 4001)
    grid = np.append(1 / (1 + np.exp(-logit)), 1 - EPSILON)
    wanted, odds = math.log(target / (1 - target)), mixture.log_odds(grid)
    assert (odds[grid >= threshold] >= wanted - 1e-6).all()
    if threshold == 1.0:
        assert odds[-1] < wanted + 1e-6
    elif threshold > 0.0:
        assert float(mixture.log_odds(threshold)) == pytest.approx(wanted, abs=1e-4)
        below = threshold - 1e-6 * min(threshold, 1 - threshold)
        assert float(mixture.log_odds(below)) <= wanted + 1e-9


def test_posterior_that_falls_near_1_disables_exits() -> None:
    # P(agree | c) holds in the middle, and not where confidence is highest.
    mixture = BetaMixture(Beta(20.0, 6.0), Beta(2.0, 0.5), 0.9)
    assert float(mixture.posterior(0.75)) > 0.95
    assert threshold_at(mixture, 0.95) == 1.0


def test_threshold_is_0_or_1_if_the_target_is_always_or_never_met() -> None:
    same = Beta(2.0, 2.0)
    assert threshold_at(BetaMixture(same, same, 0.96), 0.95) == 0.0
    assert threshold_at(BetaMixture(same, same, 0.94), 0.95) == 1.0
    for target in (0.0, 1.0, math.nan, -1.0):
        with pytest.raises(CalibrationError, match="target"):
            threshold_at(SHARP, target)


@pytest.mark.parametrize("weight", [0.0, 1.0, math.nan, 1.5])
def test_weights_not_strictly_between_0_and_1_are_refused(weight: float) -> None:
    with pytest.raises(CalibrationError, match="weight_agree"):
        BetaMixture(Beta(1, 1), Beta(1, 1), weight)
