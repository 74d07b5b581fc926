from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from runtime.adaptation.label_statistics import BINS, LabelStatistics
from runtime.bundle.beta import UNIFORM, Beta, BetaMixture, LogSums

MIXTURE = BetaMixture(Beta(8.0, 0.5), Beta(1.5, 2.5), 0.85)
VAGUE = BetaMixture(UNIFORM, Beta(1.0, 2.0), 0.5)
FOREVER = 1e12

confidences = st.lists(st.floats(0, 1) | st.sampled_from([0.0, 1.0]), max_size=20)


def nothing() -> LabelStatistics:
    return LabelStatistics(LogSums(), LogSums())


def drawn(count: int, seed: int = 0) -> tuple[list[float], list[bool]]:
    random = np.random.default_rng(seed)
    agrees = random.random(count) < MIXTURE.weight_agree
    values = np.where(agrees, random.beta(8.0, 0.5, count), random.beta(1.5, 2.5, count))
    return values.tolist(), agrees.tolist()


def most_likely_mixture(values: list[float], agrees: list[bool], known: list[bool]) -> BetaMixture:
    """By a general optimizer, of labelled tokens and of those whose label is not known."""
    confidence, label, labelled = np.array(values), np.array(agrees), np.array(known)

    def mixture_of(point: np.ndarray) -> BetaMixture:
        agree_a, agree_b, disagree_a, disagree_b = np.exp(point[:4])
        return BetaMixture(Beta(agree_a, agree_b), Beta(disagree_a, disagree_b), 1 / (1 + math.exp(-point[4])))

    def loss(point: np.ndarray) -> float:
        mixture = mixture_of(point)
        agree = math.log(mixture.weight_agree) + mixture.agree.log_density(confidence)
        disagree = math.log1p(-mixture.weight_agree) + mixture.disagree.log_density(confidence)
        return -float(np.where(labelled, np.where(label, agree, disagree), np.logaddexp(agree, disagree)).mean())

    found = minimize(loss, np.zeros(5), method="L-BFGS-B", options={"ftol": 1e-13, "gtol": 1e-9})
    return mixture_of(found.x)


@given(st.lists(st.tuples(confidences, confidences), max_size=40))
def test_evidence_weight_is_bounded(requests: list[tuple[list[float], list[float]]]) -> None:
    evidence = nothing()
    for labelled, unlabelled in requests:
        evidence.add([(c, c > 0.5) for c in labelled], unlabelled, memory=50)
        newest = len(labelled) + len(unlabelled)
        assert evidence.weight <= 50 + 2 * max(newest, 40)
        assert evidence.unlabelled.shape == (BINS, 3)
        mixture = evidence.refit(VAGUE, VAGUE)
        assert np.isfinite(mixture.posterior(np.linspace(0, 1, 5))).all()


def test_refits_with_all_labels_converge_to_the_fit_of_all_data() -> None:
    values, agrees = drawn(3000)
    evidence, mixture = nothing(), VAGUE
    evidence.add(list(zip(values, agrees, strict=True)), [], FOREVER)
    for _ in range(20):
        mixture = evidence.refit(mixture, MIXTURE)
    fitted = most_likely_mixture(values, agrees, [True] * 3000)
    assert mixture.weight_agree == pytest.approx(fitted.weight_agree, abs=0.002)
    assert (mixture.agree.a, mixture.agree.b) == pytest.approx((fitted.agree.a, fitted.agree.b), rel=0.02)
    assert (mixture.disagree.a, mixture.disagree.b) == pytest.approx((fitted.disagree.a, fitted.disagree.b), rel=0.05)


def test_binned_unlabelled_tokens_count_like_individual_tokens() -> None:
    values, agrees = drawn(6000)
    known = [c < 0.8 for c in values]
    evidence, mixture = nothing(), MIXTURE
    labelled = [(c, a) for c, a, k in zip(values, agrees, known, strict=True) if k]
    evidence.add(labelled, [c for c, k in zip(values, known, strict=True) if not k], FOREVER)
    for _ in range(60):
        mixture = evidence.refit(mixture, MIXTURE)
    fitted = most_likely_mixture(values, agrees, known)
    assert mixture.weight_agree == pytest.approx(fitted.weight_agree, abs=0.01)
    assert (mixture.agree.a, mixture.agree.b) == pytest.approx((fitted.agree.a, fitted.agree.b), rel=0.05)


def test_non_finite_confidences_are_ignored() -> None:
    evidence = nothing()
    evidence.add([(math.nan, True), (0.5, True)], [math.inf, math.nan, 0.4], FOREVER)
    assert evidence.agree.weight == 1
    assert evidence.unlabelled[:, 0].sum() == 1
    assert math.isfinite(evidence.refit(MIXTURE, MIXTURE).weight_agree)
