"""Mixtures that are known, and thresholds that can be checked on a fine grid."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from runtime.bundle.beta import EPSILON, Beta
from runtime.bundle.beta_mixture import BetaMixture, em, threshold_at
from runtime.errors import CalibrationError

SHARP = BetaMixture(Beta(8.0, 0.5), Beta(1.5, 2.5), 0.85)
BROAD = BetaMixture(Beta(3.0, 1.0), Beta(1.2, 3.0), 0.6)
SURE = BetaMixture(Beta(4.0, 0.25), Beta(2.0, 1.0), 0.92)

shapes = st.floats(0.1, 30)
mixtures = st.builds(
    BetaMixture, st.builds(Beta, shapes, shapes), st.builds(Beta, shapes, shapes), st.floats(0.02, 0.98)
)


def drawn(mixture: BetaMixture, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Confidences [n] and labels [n] of a mixture."""
    random = np.random.default_rng(seed)
    agrees = random.random(count) < mixture.weight_agree
    confidences = np.where(
        agrees,
        random.beta(mixture.agree.a, mixture.agree.b, count),
        random.beta(mixture.disagree.a, mixture.disagree.b, count),
    )
    return confidences, agrees.astype(np.float64)


def hidden(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    return np.where(np.random.default_rng(seed).random(len(labels)) < share, np.nan, labels)


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


@pytest.mark.parametrize("mixture", [SHARP, BROAD, SURE])
@pytest.mark.parametrize(("count", "tolerance"), [(1000, 0.06), (20_000, 0.02)])
def test_known_labels_recover_a_mixture(mixture: BetaMixture, count: int, tolerance: float) -> None:
    for seed in range(3):
        confidences, labels = drawn(mixture, count, seed)
        fit = em(confidences, labels)
        assert fit.converged
        of_class = ((fit.mixture.agree, mixture.agree, 1), (fit.mixture.disagree, mixture.disagree, 0))
        for found, true, label in of_class:
            # The second term: confidences beyond EPSILON count as EPSILON, 3 % of those of SURE.
            relative = 4.5 / math.sqrt((labels == label).sum()) + 0.06
            assert (found.a, found.b) == pytest.approx((true.a, true.b), rel=relative)
        assert fit.mixture.weight_agree == pytest.approx(mixture.weight_agree, abs=3 / math.sqrt(count))
        assert threshold_at(fit.mixture, 0.95) == pytest.approx(threshold_at(mixture, 0.95), abs=tolerance)


@pytest.mark.parametrize("mixture", [SHARP, BROAD])
def test_a_tenth_of_the_labels_recovers_a_threshold(mixture: BetaMixture) -> None:
    for seed in range(3):
        confidences, labels = drawn(mixture, 10_000, seed)
        fit = em(confidences, hidden(labels, 0.9, seed + 100))
        assert threshold_at(fit.mixture, 0.95) == pytest.approx(threshold_at(mixture, 0.95), abs=0.05)


def test_without_labels_components_that_lie_apart_are_found() -> None:
    apart = BetaMixture(Beta(12.0, 2.0), Beta(2.0, 8.0), 0.7)
    for seed in range(3):
        found = em(drawn(apart, 5000, seed)[0]).mixture
        assert found.weight_agree == pytest.approx(0.7, abs=0.03)
        assert (found.agree.mean, found.disagree.mean) == pytest.approx((12 / 14, 0.2), abs=0.03)


def test_the_same_data_give_the_same_mixture() -> None:
    confidences, labels = drawn(BROAD, 500, 1)
    partly = hidden(labels, 0.5, 2)
    assert em(confidences, partly) == em(confidences.copy(), partly.copy())


confidence_lists = st.lists(st.floats(0, 1) | st.sampled_from([0.0, 1.0, 0.5]), min_size=1, max_size=60)


@given(data=st.data(), confidences=confidence_lists, prior=st.sampled_from([0.0, 0.1, 1.0]))
@hypothesis_settings(max_examples=60)
def test_the_likelihood_never_falls_and_the_result_can_be_used(
    data: st.DataObject, confidences: list[float], prior: float
) -> None:
    one_label = st.sampled_from([0.0, 1.0, math.nan])
    labels = data.draw(st.lists(one_label, min_size=len(confidences), max_size=len(confidences)))
    fit = em(np.array(confidences), np.array(labels), prior_tokens=prior, rounds=40)
    assert len(fit.objective) >= 2
    assert all(after >= before - 1e-7 * (1 + abs(before)) for before, after in pairwise(fit.objective))
    assert 0.0 <= threshold_at(fit.mixture, 0.9) <= 1.0
    assert np.isfinite(fit.mixture.posterior(np.linspace(0, 1, 11))).all()


def test_one_class_alone_gives_a_cautious_mixture() -> None:
    confidences, _ = drawn(SHARP, 300, 0)
    all_agree = em(confidences, np.ones(300)).mixture
    assert all_agree.weight_agree == pytest.approx(301 / 302)
    assert all_agree.disagree == Beta(1.0, 1.0)
    none_agrees = em(confidences, np.zeros(300)).mixture
    assert threshold_at(none_agrees, 0.95) == 1.0


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("labelled", [True, False])
def test_equal_confidences_can_be_fitted(value: float, labelled: bool) -> None:
    labels = np.arange(50) % 2 if labelled else None
    mixture = em(np.full(50, value), labels).mixture
    if labelled:
        assert float(mixture.posterior(value)) == pytest.approx(0.5, abs=0.02)
    assert 0.0 <= threshold_at(mixture, 0.9) <= 1.0


def test_ten_tokens_are_enough_for_an_answer() -> None:
    confidences = np.array([0.99, 0.98, 1.0, 0.9, 0.95, 0.97, 0.2, 0.3, 0.1, 0.4])
    labels = np.array([1, 1, 1, 1, 1, 1, 0, 0, 0, 0])
    threshold = threshold_at(em(confidences, labels).mixture, 0.9)
    assert 0.4 < threshold < 0.99


@pytest.mark.parametrize(
    ("confidences", "labels", "problem"),
    [
        ([], None, "at least one"),
        ([[0.5]], None, "one row"),
        ([0.5, math.nan], None, "1 confidences are not in"),
        ([0.5, 1.01, -0.1], None, "2 confidences are not in"),
        ([0.5, 0.6], [1.0], "one for each"),
        ([0.5], [0.5], "not 0, 1 or NaN"),
    ],
)
def test_data_that_cannot_be_fitted_are_refused(confidences: list, labels: list | None, problem: str) -> None:
    with pytest.raises(CalibrationError, match=problem):
        em(np.array(confidences, np.float64), None if labels is None else np.array(labels))


def test_prior_tokens_are_a_number_from_zero() -> None:
    for prior in (-1.0, math.nan, math.inf):
        with pytest.raises(CalibrationError, match="prior_tokens"):
            em(np.array([0.5]), prior_tokens=prior)


@pytest.mark.parametrize("weight", [0.0, 1.0, math.nan, 1.5])
def test_a_weight_leaves_both_classes_possible(weight: float) -> None:
    with pytest.raises(CalibrationError, match="weight_agree"):
        BetaMixture(Beta(1, 1), Beta(1, 1), weight)
