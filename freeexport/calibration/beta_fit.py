"""The Beta mixture of labelled confidences by maximum likelihood, and the confidence from which it reaches a target."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.optimize import brentq, minimize
from scipy.special import betaln, digamma

from runtime.bundle.beta import EPSILON, LEAST_SHAPE, MOST_CONCENTRATION, Beta, clipped
from runtime.bundle.beta_mixture import NEVER_EXIT, BetaMixture
from runtime.errors import CalibrationError

# A token that disagrees is expected once in three times its number at most, with 95 % probability, where none did.
RULE_OF_THREE = 3.0


@dataclass(frozen=True)
class Fit:
    """`mixture` is None where a class is missing; `note` says in a sentence what the user should know, or is ""."""

    threshold: float
    mixture: BetaMixture | None
    note: str = ""


def fit(confidence: np.ndarray, agrees: np.ndarray, target: float) -> Fit:
    """The threshold from which P(agree | confidence) is at least `target`, in (0, 1), on tokens [n].

    Raises CalibrationError for confidences that are not in [0, 1].
    """
    check_confidences(confidence)
    agreeing, disagreeing = confidence[agrees], confidence[~agrees]
    if not len(agreeing):
        return Fit(NEVER_EXIT, None, f"none of the {len(agrees)} tokens agrees: the exit cannot be used")
    if not len(disagreeing):
        return _without_disagreeing(confidence, target)
    mixture = BetaMixture(most_likely(agreeing), most_likely(disagreeing), len(agreeing) / len(agrees))
    few = min(len(agreeing), len(disagreeing))
    which = "agreeing" if len(agreeing) <= len(disagreeing) else "disagreeing"
    note = f"only {few} {which} tokens: their distribution is rough; give more samples" if few < 30 else ""
    return Fit(threshold_at(mixture, target), mixture, note)


def check_confidences(confidence: np.ndarray) -> None:
    """Raises CalibrationError."""
    wrong = int(np.sum(~((confidence >= 0) & (confidence <= 1))))  # NaN too
    if wrong:
        raise CalibrationError(
            f"{wrong} of {len(confidence)} confidences are not numbers from 0 to 1: the model computes NaN or "
            "infinity; check it with freeexport verify"
        )


def _without_disagreeing(confidence: np.ndarray, target: float) -> Fit:
    count = len(confidence)
    share = RULE_OF_THREE / count
    if share > 1 - target:
        needed = math.ceil(RULE_OF_THREE / (1 - target))
        return Fit(NEVER_EXIT, None, f"all {count} tokens agree, which are too few to trust; give {needed} or more")
    # Below the smallest confidence nothing is known.
    lowest = max(0.0, math.nextafter(float(np.min(confidence)), 0.0))
    note = f"all {count} tokens agree, so the threshold is the smallest confidence among them, not a fit"
    return Fit(lowest, None, note)


def most_likely(confidence: np.ndarray) -> Beta:
    """The Beta of greatest likelihood of confidences [n], n > 0, within the bounds of shapes."""
    inside = clipped(confidence)
    logs = float(np.mean(np.log(inside))), float(np.mean(np.log1p(-inside)))

    def loss(shapes: np.ndarray) -> tuple[float, np.ndarray]:
        """Negative log-likelihood a token and its gradient, by the logarithms of the shapes."""
        a, b = np.exp(shapes)
        value = betaln(a, b) - (a - 1) * logs[0] - (b - 1) * logs[1]
        both = digamma(a + b)
        return float(value), np.array([a * (digamma(a) - both - logs[0]), b * (digamma(b) - both - logs[1])])

    bounds = [(math.log(LEAST_SHAPE), math.log(MOST_CONCENTRATION))] * 2
    found = [
        minimize(loss, np.log(start), jac=True, bounds=bounds, method="L-BFGS-B", options={"ftol": 1e-13})
        for start in _starts(inside)
    ]
    a, b = np.exp(min(found, key=lambda one: one.fun).x)
    return Beta(float(a), float(b))


def _starts(inside: np.ndarray) -> Iterator[tuple[float, float]]:
    mean, variance = float(np.mean(inside)), float(np.var(inside))
    concentration = mean * (1 - mean) / variance - 1 if variance > 0 else MOST_CONCENTRATION
    for scale in (1.0, 0.1):
        total = min(max(scale * concentration, 3 * LEAST_SHAPE), MOST_CONCENTRATION)
        yield max(mean * total, LEAST_SHAPE), max((1 - mean) * total, LEAST_SHAPE)
    yield 1.0, 1.0


def threshold_at(mixture: BetaMixture, target: float) -> float:
    """The smallest confidence from which P(agree | confidence) >= `target` stays true up to 1; NEVER_EXIT if none.

    The odds of two Betas turn at most once, so that they cross the target's at most twice: a root is sought in each of
    the two intervals.
    """
    wanted = math.log(target) - math.log1p(-target)

    def surplus(confidence: float) -> float:
        return float(mixture.log_odds(confidence)) - wanted

    ends = [EPSILON, *_turning_points(mixture), 1 - EPSILON]
    if surplus(ends[-1]) < 0:
        return NEVER_EXIT
    for low, high in reversed(list(pairwise(ends))):
        if surplus(low) < 0:
            return float(brentq(surplus, low, high, xtol=1e-14))
    return 0.0


def _turning_points(mixture: BetaMixture) -> list[float]:
    rise, fall = mixture.agree.a - mixture.disagree.a, mixture.agree.b - mixture.disagree.b
    turn = rise / (rise + fall) if rise + fall else math.nan
    return [turn] if EPSILON < turn < 1 - EPSILON else []
