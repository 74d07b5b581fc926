from __future__ import annotations

import math

import numpy as np
import pytest

from freeexport.calibration.beta_fit import fit
from runtime.bundle.beta import Beta
from runtime.bundle.beta_mixture import BetaMixture, threshold_at
from runtime.errors import CalibrationError

AGREE = [(8.0, 1.0), (20.0, 2.0), (2.0, 0.5), (5.0, 0.3)]
DISAGREE = [(1.0, 2.0), (2.0, 5.0), (0.7, 1.0)]


def drawn(mixture: BetaMixture, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    agrees = random.random(count) < mixture.weight_agree
    ours, others = mixture.agree, mixture.disagree
    confidence = np.where(agrees, random.beta(ours.a, ours.b, count), random.beta(others.a, others.b, count))
    return confidence, agrees


# Relative error of shapes, and error of P(agree) at the threshold found, by tokens of the smaller class (about).
TOLERANCES = {300: (0.35, 0.06), 3000: (0.10, 0.02), 30000: (0.04, 0.008)}


@pytest.mark.parametrize("agree", AGREE)
@pytest.mark.parametrize("disagree", DISAGREE)
@pytest.mark.parametrize("smaller", TOLERANCES)
@pytest.mark.parametrize("weight", [0.7, 0.9])
def test_a_known_mixture_is_recovered(
    agree: tuple[float, float], disagree: tuple[float, float], smaller: int, weight: float
) -> None:
    true = BetaMixture(Beta(*agree), Beta(*disagree), weight)
    found = fit(*drawn(true, int(smaller / (1 - weight)), seed=int(smaller + 10 * weight)), target=0.95)
    shapes, chance = TOLERANCES[smaller]
    assert found.mixture is not None
    for ours, theirs in ((found.mixture.agree, true.agree), (found.mixture.disagree, true.disagree)):
        assert ours.a == pytest.approx(theirs.a, rel=shapes)
        assert ours.b == pytest.approx(theirs.b, rel=shapes)
    assert found.mixture.weight_agree == pytest.approx(weight, abs=0.05)
    if 0 < found.threshold < 1:
        assert float(true.posterior(found.threshold)) == pytest.approx(0.95, abs=chance)


@pytest.mark.parametrize("shapes", [(0.05, 3.0), (1.0, 1.0), (40.0, 0.5), (300.0, 200.0)])
def test_the_fit_is_the_most_likely_one(shapes: tuple[float, float]) -> None:
    values = np.random.default_rng(3).beta(*shapes, 500)
    found = fit(np.append(values, 0.5), np.append(np.ones(500, np.bool_), False), 0.95)
    assert found.mixture is not None
    best = found.mixture.agree

    def likelihood(beta: Beta) -> float:
        return float(np.sum(beta.log_density(values)))

    for a, b in ((1.01, 1.0), (0.99, 1.0), (1.0, 1.01), (1.0, 0.99)):
        assert likelihood(best) >= likelihood(Beta(best.a * a, best.b * b)) - 1e-6


@pytest.mark.parametrize("agree", [*AGREE, (1.0, 1.0), (3.0, 4.0)])
@pytest.mark.parametrize("disagree", [*DISAGREE, (9.0, 3.0), (0.5, 0.2)])
@pytest.mark.parametrize("target", [0.5, 0.95, 0.999])
def test_the_threshold_is_the_smallest_from_which_the_target_holds(
    agree: tuple[float, float], disagree: tuple[float, float], target: float
) -> None:
    mixture = BetaMixture(Beta(*agree), Beta(*disagree), 0.8)
    threshold = threshold_at(mixture, target)
    above = np.linspace(max(threshold, 1e-6) + 1e-9, 1 - 1e-6, 2001)
    if threshold >= 1:
        assert float(mixture.posterior(1 - 1e-6)) < target
        return
    assert (mixture.posterior(above) >= target - 1e-9).all()
    if threshold > 0:
        assert float(mixture.posterior(threshold - 1e-6)) < target


def test_confidences_of_exactly_0_and_1_and_equal_ones_give_finite_fits() -> None:
    agrees = np.array([True] * 20 + [False] * 20)
    found = fit(np.where(agrees, 1.0, 0.0), agrees, 0.95)
    assert found.mixture is not None
    assert 0 < found.threshold < 1
    equal = fit(np.full(40, 0.7), agrees, 0.95)
    assert equal.mixture is not None
    assert equal.threshold == 1  # they say nothing


def test_few_tokens_of_a_class_are_said() -> None:
    confidence, agrees = np.linspace(0.1, 0.9, 60), np.arange(60) >= 4
    note = fit(confidence, agrees, 0.95).note
    assert "only 4 disagreeing tokens" in note


def test_no_agreeing_token_never_exits_and_says_so() -> None:
    found = fit(np.linspace(0, 1, 80), np.zeros(80, np.bool_), 0.95)
    assert (found.threshold, found.mixture) == (1.0, None)
    assert "none of the 80 tokens agrees" in found.note


def test_no_disagreeing_token_exits_above_the_smallest_confidence_and_says_so() -> None:
    confidence = np.linspace(0.25, 1, 100)
    found = fit(confidence, np.ones(100, np.bool_), 0.95)
    assert found.threshold < 0.25 < math.nextafter(found.threshold, 1) + 1e-12
    assert (confidence > found.threshold).all()
    assert "all 100 tokens agree" in found.note
    assert "not a fit" in found.note


def test_too_few_tokens_without_disagreeing_ones_are_not_trusted() -> None:
    found = fit(np.linspace(0.2, 1, 59), np.ones(59, np.bool_), 0.95)
    assert found.threshold == 1
    assert "give 60 or more" in found.note


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1, 1.5])
def test_confidences_that_are_no_share_are_refused(bad: float) -> None:
    with pytest.raises(CalibrationError, match="1 of 3 confidences are not numbers from 0 to 1"):
        fit(np.array([0.5, bad, 0.7]), np.array([True, False, True]), 0.95)
