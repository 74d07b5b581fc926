"""Beta distributions of confidences: fits to sufficient statistics, and thresholds of mixtures.

A token agrees if the shallow and the deep prediction are equal. A mixture has one Beta distribution
for the confidences of agreeing tokens and one for those of disagreeing tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from runtime.errors import CalibrationError, shown

NEVER_EXIT = 1.0
# Confidences are clipped to [EPSILON, 1 - EPSILON], because 0 and 1 have no finite logarithms.
EPSILON = 1e-6
# Limits of fitted shapes. The likelihood of equal confidences grows without bound.
MIN_SHAPE = 1e-2
MAX_CONCENTRATION = 1e4
# Above this, logarithms of Gamma functions overflow.
MAX_SHAPE = 1e9


class LogSums(NamedTuple):
    """Sufficient statistics of a fit.

    Attributes:
        weight: Total weight of the tokens.
        log: Weighted sum of ln c over the confidences c.
        log_rest: Weighted sum of ln(1 - c).
    """

    weight: float = 0.0
    log: float = 0.0
    log_rest: float = 0.0

    @classmethod
    def of(cls, confidences: np.ndarray) -> LogSums:
        """Sum over confidences [n], each with weight 1."""
        inside = clipped(confidences)
        return cls(float(inside.size), float(np.log(inside).sum()), float(np.log1p(-inside).sum()))

    def __add__(self, other: LogSums) -> LogSums:  # type: ignore[override]
        return LogSums(
            weight=self.weight + other.weight,
            log=self.log + other.log,
            log_rest=self.log_rest + other.log_rest,
        )

    def scaled(self, factor: float) -> LogSums:
        return LogSums(self.weight * factor, self.log * factor, self.log_rest * factor)


@dataclass(frozen=True)
class Beta:
    """Beta distribution Beta(a, b) on [0, 1].

    Raises:
        CalibrationError: If a shape is not in (0, MAX_SHAPE].
    """

    a: float
    b: float

    def __post_init__(self) -> None:
        for name, shape in (("a", self.a), ("b", self.b)):
            if not 0 < shape <= MAX_SHAPE:
                raise CalibrationError(
                    f"{name} = {shown(shape)} is not a valid shape of a Beta distribution; "
                    f"give a number above 0, at most {MAX_SHAPE:g}"
                )

    @property
    def log_normalizer(self) -> float:
        """ln B(a, b)."""
        return math.lgamma(self.a) + math.lgamma(self.b) - math.lgamma(self.a + self.b)

    def log_density(self, confidence: np.ndarray | float) -> np.ndarray:
        """Return the log density in nats, of confidences clipped to [EPSILON, 1 - EPSILON]."""
        inside = clipped(confidence)
        logs = (self.a - 1) * np.log(inside) + (self.b - 1) * np.log1p(-inside)
        return np.asarray(logs - self.log_normalizer)

    def density(self, confidence: np.ndarray | float) -> np.ndarray:
        return np.exp(self.log_density(confidence))

    def log_likelihood(self, sums: LogSums) -> float:
        """Return the log-likelihood, in nats, of the tokens in `sums`."""
        return (
            (self.a - 1) * sums.log
            + (self.b - 1) * sums.log_rest
            - sums.weight * self.log_normalizer
        )

    def above(self, threshold: float) -> float:
        """Return P(c > threshold), by numerical integration over the logit."""
        a = self.a
        b = self.b
        deviation = math.sqrt(trigamma(a) + trigamma(b))
        logits = digamma(a) - digamma(b) + deviation * np.linspace(-12, 12, 1001)
        logs = -a * np.logaddexp(0, -logits) - b * np.logaddexp(0, logits)
        density = np.exp(logs - np.max(logs))
        inside = float(clipped(threshold))
        logit = math.log(inside) - math.log1p(-inside)
        below = np.interp(logit, logits, np.cumsum(density) - density / 2)
        return max(0.0, 1 - float(below / density.sum()))

    def expected(self, weight: float) -> LogSums:
        """Return the expected statistics of `weight` tokens of this distribution."""
        total = digamma(self.a + self.b)
        log = weight * (digamma(self.a) - total)
        log_rest = weight * (digamma(self.b) - total)
        return LogSums(weight, log, log_rest)


UNIFORM = Beta(1.0, 1.0)


def clipped(confidence: np.ndarray | float) -> np.ndarray:
    return np.clip(np.asarray(confidence, np.float64), EPSILON, 1 - EPSILON)


def most_likely(sums: LogSums, start: Beta, steps: int = 30) -> Beta:
    """Return the maximum-likelihood Beta, by at most `steps` Newton steps from `start`."""
    best = start
    likelihood = start.log_likelihood(sums)
    for _ in range(steps):
        before = likelihood
        step_a, step_b = _newton_step(best, sums)
        for _ in range(30):  # halve the step until the likelihood increases
            a = best.a + step_a
            b = best.b + step_b
            if min(a, b) > 0:
                # Stay within bounds, with the same mean if possible.
                scale = min(1.0, MAX_CONCENTRATION / (a + b))
                tried = Beta(max(a * scale, MIN_SHAPE), max(b * scale, MIN_SHAPE))
                if (gained := tried.log_likelihood(sums)) > likelihood:
                    best = tried
                    likelihood = gained
                    break
            step_a /= 2
            step_b /= 2
        if likelihood - before <= 1e-12 * (1 + abs(likelihood)):
            break
    return best


def _newton_step(beta: Beta, sums: LogSums) -> tuple[float, float]:
    """Return the next step. It always points uphill, because the likelihood is concave."""
    weight = sums.weight
    total = beta.a + beta.b
    slope_a = sums.log - weight * (digamma(beta.a) - digamma(total))
    slope_b = sums.log_rest - weight * (digamma(beta.b) - digamma(total))
    both = trigamma(total)
    bend_a = trigamma(beta.a) - both
    bend_b = trigamma(beta.b) - both
    determinant = weight * (bend_a * bend_b - both * both)
    if determinant <= 0:
        return slope_a, slope_b
    return (bend_b * slope_a + both * slope_b) / determinant, (
        both * slope_a + bend_a * slope_b
    ) / determinant


def digamma(x: float) -> float:
    """Return the derivative of ln Gamma(x) for x > 0."""
    result = 0.0
    while x < 8:
        result -= 1 / x
        x += 1
    inverse = 1 / (x * x)
    series = inverse * (
        1 / 12 - inverse * (1 / 120 - inverse * (1 / 252 - inverse * (1 / 240 - inverse / 132)))
    )
    return result + math.log(x) - 0.5 / x - series


def trigamma(x: float) -> float:
    """Return the second derivative of ln Gamma(x) for x > 0."""
    result = 0.0
    while x < 8:
        result += 1 / (x * x)
        x += 1
    inverse = 1 / (x * x)
    series = 1 / 6 - inverse * (1 / 30 - inverse * (1 / 42 - inverse * (1 / 30 - inverse * 5 / 66)))
    return result + 1 / x + inverse / 2 + inverse / x * series


@dataclass(frozen=True)
class BetaMixture:
    """Mixture of the confidences of agreeing and disagreeing tokens.

    Attributes:
        agree: Distribution of agreeing tokens.
        disagree: Distribution of disagreeing tokens.
        weight_agree: Share of tokens that agree, in (0, 1).

    Raises:
        CalibrationError: If `weight_agree` is out of range.
    """

    agree: Beta
    disagree: Beta
    weight_agree: float

    def __post_init__(self) -> None:
        if not 0 < self.weight_agree < 1:
            raise CalibrationError(
                f"weight_agree = {shown(self.weight_agree)} is not a share of tokens; "
                "give a number in (0, 1)"
            )

    def log_odds(self, confidence: np.ndarray | float) -> np.ndarray:
        """Return ln P(agree | c) - ln P(disagree | c)."""
        prior = math.log(self.weight_agree) - math.log1p(-self.weight_agree)
        return prior + self.agree.log_density(confidence) - self.disagree.log_density(confidence)

    def posterior(self, confidence: np.ndarray | float) -> np.ndarray:
        """Return P(agree | c), for confidences of any shape."""
        odds = self.log_odds(confidence)
        return np.where(odds >= 0, 1.0, np.exp(np.minimum(odds, 0.0))) / (
            1.0 + np.exp(-np.abs(odds))
        )

    def above(self, threshold: float) -> float:
        """Return the share of tokens whose confidence is above `threshold`."""
        share = self.weight_agree
        return share * self.agree.above(threshold) + (1 - share) * self.disagree.above(threshold)

    def density(self, confidence: np.ndarray | float) -> np.ndarray:
        """Return the density over all tokens."""
        agree = self.agree.density(confidence)
        disagree = self.disagree.density(confidence)
        return np.asarray(self.weight_agree * agree + (1 - self.weight_agree) * disagree)


def threshold_at(mixture: BetaMixture, target: float) -> float:
    """Return the smallest confidence from which P(agree | c) >= `target` holds up to 1.

    Returns 0 if it always holds, and NEVER_EXIT if it does not hold at 1.

    Raises:
        CalibrationError: If `target` is not in (0, 1).
    """
    if not 0 < target < 1:
        raise CalibrationError(
            f"target = {shown(target)} is not a probability; give a number in (0, 1)"
        )
    agree = mixture.agree
    disagree = mixture.disagree
    wanted = math.log(target) - math.log1p(-target)
    constant = math.log(mixture.weight_agree) - math.log1p(-mixture.weight_agree)
    constant += disagree.log_normalizer - agree.log_normalizer
    rise = agree.a - disagree.a
    fall = agree.b - disagree.b

    def holds(confidence: float) -> bool:
        return constant + rise * math.log(confidence) + fall * math.log1p(-confidence) >= wanted

    low = EPSILON
    high = 1 - EPSILON
    if not holds(high):
        return NEVER_EXIT
    # The odds of two Beta distributions have at most one extremum in (0, 1).
    turn = rise / (rise + fall) if rise + fall else math.nan
    if not low < turn < high:
        return 0.0 if holds(low) else _bisect(holds, low, high)
    if not holds(turn):
        return _bisect(holds, turn, high)
    return 0.0 if holds(low) else _bisect(holds, low, turn)


def _bisect(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Return the smallest number where `holds` is true. It is false at `low`, true at `high`."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
