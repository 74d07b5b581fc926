"""Mixtures that are known, and thresholds that can be checked on a fine grid."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.bundle.beta import EPSILON, Beta, BetaMixture, threshold_at
from runtime.errors import CalibrationError

SHARP = BetaMixture(Beta(8.0, 0.5), Beta(1.5, 2.5), 0.85)
SURE = BetaMixture(Beta(4.0, 0.25), Beta(2.0, 1.0), 0.92)

shapes = st.floats(0.1, 30)
mixtures = st.builds(
    BetaMixture, st.builds(Beta, shapes, shapes), st.builds(Beta, shapes, shapes), st.floats(0.02, 0.98)
)


def test_the_posterior_is_bayes_rule() -> None:
    confidences = np.array([[0.1, 0.5], [0.9, 0.999]])
    agree = SHARP.weight_agree * SHARP.agree.density(confidences)
    assert SHARP.posterior(confidences) == pytest.approx(agree / SHARP.density(confidences))
    assert float(SHARP.posterior(1.0)) == float(SHARP.posterior(1 - EPSILON))
    extreme = BetaMixture(Beta(1e4, 1e-2), Beta(1e-2, 1e4), 0.5)
    assert extreme.posterior(np.array([0.0, 1.0])).tolist() == [0.0, 1.0]


@given(mixture=mixtures, target=st.floats(0.05, 0.999))
def test_the_threshold_is_where_the_posterior_begins_to_hold(mixture: BetaMixture, target: float) -> None:
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


def test_an_island_below_is_no_threshold() -> None:
    # Agreeing tokens are either very unsure or very sure: P(agree | c) falls, then rises.
    mixture = BetaMixture(Beta(0.4, 0.4), Beta(6.0, 6.0), 0.7)
    assert float(mixture.posterior(0.01)) > 0.95
    assert 0.8 < threshold_at(mixture, 0.95) < 1.0


def test_a_posterior_that_falls_at_the_end_never_lets_exit() -> None:
    # P(agree | c) holds in the middle, and not where confidence is highest.
    mixture = BetaMixture(Beta(20.0, 6.0), Beta(2.0, 0.5), 0.9)
    assert float(mixture.posterior(0.75)) > 0.95
    assert threshold_at(mixture, 0.95) == 1.0


def test_the_ends_of_thresholds() -> None:
    same = Beta(2.0, 2.0)
    assert threshold_at(BetaMixture(same, same, 0.96), 0.95) == 0.0
    assert threshold_at(BetaMixture(same, same, 0.94), 0.95) == 1.0
    for target in (0.0, 1.0, math.nan, -1.0):
        with pytest.raises(CalibrationError, match="target"):
            threshold_at(SHARP, target)


def test_a_higher_target_never_lowers_the_threshold() -> None:
    thresholds = [threshold_at(SURE, target) for target in (0.5, 0.9, 0.95, 0.99, 0.999)]
    assert thresholds == sorted(thresholds)
    assert len(set(thresholds)) == 5


@pytest.mark.parametrize("weight", [0.0, 1.0, math.nan, 1.5])
def test_a_weight_leaves_both_classes_possible(weight: float) -> None:
    with pytest.raises(CalibrationError, match="weight_agree"):
        BetaMixture(Beta(1, 1), Beta(1, 1), weight)
