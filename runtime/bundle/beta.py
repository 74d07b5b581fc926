"""Beta distributions of confidences, their fit to sums that are cheap to keep, and the threshold of a mixture of two.

A token agrees where the shallow prediction is the deep decoder's: one Beta describes the confidences of agreeing
tokens, another those of disagreeing ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from runtime.errors import CalibrationError

NEVER_EXIT = 1.0
# Confidences of exactly 0 and 1 have no finite logarithm: all are taken as lying in [EPSILON, 1 - EPSILON].
EPSILON = 1e-6
# Fitted shapes stay where densities can be computed: equal confidences would have a peak without end.
LEAST_SHAPE, MOST_CONCENTRATION = 1e-2, 1e4
# Beyond it the logarithms of Gamma functions overflow.
MOST_SHAPE = 1e9


class LogSums(NamedTuple):
    """Sufficient statistics of a fit: the `weight` of tokens, and the weighted sums of ln c and of ln(1 - c)."""

    weight: float = 0.0
    log: float = 0.0
    log_rest: float = 0.0

    @classmethod
    def of(cls, confidences: np.ndarray) -> LogSums:
        """Sum over tokens [n], each of weight 1."""
        inside = clipped(confidences)
        return cls(float(inside.size), float(np.log(inside).sum()), float(np.log1p(-inside).sum()))

    def __add__(self, other: LogSums) -> LogSums:  # type: ignore[override]
        return LogSums(self.weight + other.weight, self.log + other.log, self.log_rest + other.log_rest)

    def scaled(self, factor: float) -> LogSums:
        return LogSums(self.weight * factor, self.log * factor, self.log_rest * factor)


@dataclass(frozen=True)
class Beta:
    """Beta(a, b) on [0, 1]. Raises CalibrationError unless both shapes are in (0, MOST_SHAPE]."""

    a: float
    b: float

    def __post_init__(self) -> None:
        for name, shape in (("a", self.a), ("b", self.b)):
            if not 0 < shape <= MOST_SHAPE:
                raise CalibrationError(f"{name} = {shape!r} is no shape of a Beta distribution; give a number above 0")

    @property
    def log_normalizer(self) -> float:
        """ln B(a, b)."""
        return math.lgamma(self.a) + math.lgamma(self.b) - math.lgamma(self.a + self.b)

    def log_density(self, confidence: np.ndarray | float) -> np.ndarray:
        """The log density in nats, for confidences of any shape, clipped to [EPSILON, 1 - EPSILON]."""
        inside = clipped(confidence)
        logs = (self.a - 1) * np.log(inside) + (self.b - 1) * np.log1p(-inside)
        return np.asarray(logs - self.log_normalizer)

    def density(self, confidence: np.ndarray | float) -> np.ndarray:
        return np.exp(self.log_density(confidence))

    def log_likelihood(self, sums: LogSums) -> float:
        """The log-likelihood, in nats, of the tokens that `sums` were taken over."""
        return (self.a - 1) * sums.log + (self.b - 1) * sums.log_rest - sums.weight * self.log_normalizer

    def above(self, threshold: float) -> float:
        """P(c > threshold), by adding up the density of the logit."""
        a, b = self.a, self.b
        deviation = math.sqrt(trigamma(a) + trigamma(b))
        logits = digamma(a) - digamma(b) + deviation * np.linspace(-12, 12, 1001)
        logs = -a * np.logaddexp(0, -logits) - b * np.logaddexp(0, logits)
        density = np.exp(logs - logs.max())
        inside = float(clipped(threshold))
        at = np.interp(math.log(inside) - math.log1p(-inside), logits, np.cumsum(density) - density / 2)
        return max(0.0, 1 - float(at / density.sum()))

    def expected(self, weight: float) -> LogSums:
        """The sums that `weight` tokens of this distribution have on average."""
        total = digamma(self.a + self.b)
        return LogSums(weight, weight * (digamma(self.a) - total), weight * (digamma(self.b) - total))


UNIFORM = Beta(1.0, 1.0)


def clipped(confidence: np.ndarray | float) -> np.ndarray:
    return np.clip(np.asarray(confidence, np.float64), EPSILON, 1 - EPSILON)


def most_likely(sums: LogSums, start: Beta, steps: int = 30) -> Beta:
    """The Beta of greatest likelihood, by Newton steps from `start`: never less likely than that."""
    best, likelihood = start, start.log_likelihood(sums)
    for _ in range(steps):
        before = likelihood
        step_a, step_b = _newton_step(best, sums)
        for _ in range(30):  # halve the step until it gains
            a, b = best.a + step_a, best.b + step_b
            if min(a, b) > 0:
                scale = min(1.0, MOST_CONCENTRATION / (a + b))  # within bounds, at the same mean where possible
                tried = Beta(max(a * scale, LEAST_SHAPE), max(b * scale, LEAST_SHAPE))
                if (gained := tried.log_likelihood(sums)) > likelihood:
                    best, likelihood = tried, gained
                    break
            step_a, step_b = step_a / 2, step_b / 2
        if likelihood - before <= 1e-12 * (1 + abs(likelihood)):
            break
    return best


def _newton_step(beta: Beta, sums: LogSums) -> tuple[float, float]:
    """The likelihood is concave in both shapes, so the step always points uphill."""
    weight, total = sums.weight, beta.a + beta.b
    slope_a = sums.log - weight * (digamma(beta.a) - digamma(total))
    slope_b = sums.log_rest - weight * (digamma(beta.b) - digamma(total))
    both = trigamma(total)
    bend_a, bend_b = trigamma(beta.a) - both, trigamma(beta.b) - both
    determinant = weight * (bend_a * bend_b - both * both)
    if determinant <= 0:
        return slope_a, slope_b
    return (bend_b * slope_a + both * slope_b) / determinant, (both * slope_a + bend_a * slope_b) / determinant


def digamma(x: float) -> float:
    """The derivative of ln Gamma, for x > 0."""
    result = 0.0
    while x < 8:
        result -= 1 / x
        x += 1
    inverse = 1 / (x * x)
    series = inverse * (1 / 12 - inverse * (1 / 120 - inverse * (1 / 252 - inverse * (1 / 240 - inverse / 132))))
    return result + math.log(x) - 0.5 / x - series


def trigamma(x: float) -> float:
    """The second derivative of ln Gamma, for x > 0."""
    result = 0.0
    while x < 8:
        result += 1 / (x * x)
        x += 1
    inverse = 1 / (x * x)
    series = 1 / 6 - inverse * (1 / 30 - inverse * (1 / 42 - inverse * (1 / 30 - inverse * 5 / 66)))
    return result + 1 / x + inverse / 2 + inverse / x * series


@dataclass(frozen=True)
class BetaMixture:
    """Confidences of tokens that `agree` and that `disagree`, and the share of all tokens that agree, in (0, 1)."""

    agree: Beta
    disagree: Beta
    weight_agree: float

    def __post_init__(self) -> None:
        if not 0 < self.weight_agree < 1:
            raise CalibrationError(f"weight_agree = {self.weight_agree!r} is no share of tokens; give one in (0, 1)")

    def log_odds(self, confidence: np.ndarray | float) -> np.ndarray:
        """ln P(agree | c) - ln P(disagree | c)."""
        prior = math.log(self.weight_agree) - math.log1p(-self.weight_agree)
        return prior + self.agree.log_density(confidence) - self.disagree.log_density(confidence)

    def posterior(self, confidence: np.ndarray | float) -> np.ndarray:
        """P(agree | c), for confidences of any shape."""
        odds = self.log_odds(confidence)
        return np.where(odds >= 0, 1.0, np.exp(np.minimum(odds, 0.0))) / (1.0 + np.exp(-np.abs(odds)))

    def above(self, threshold: float) -> float:
        """The share of all tokens whose confidence is above `threshold`."""
        share = self.weight_agree
        return share * self.agree.above(threshold) + (1 - share) * self.disagree.above(threshold)

    def density(self, confidence: np.ndarray | float) -> np.ndarray:
        """The density of all tokens."""
        agree, disagree = self.agree.density(confidence), self.disagree.density(confidence)
        return np.asarray(self.weight_agree * agree + (1 - self.weight_agree) * disagree)


def threshold_at(mixture: BetaMixture, target: float) -> float:
    """The smallest confidence from which P(agree | c) >= `target` stays true up to 1.

    0 where it holds everywhere; NEVER_EXIT where it does not hold at 1. `target` in (0, 1).
    """
    if not 0 < target < 1:
        raise CalibrationError(f"target = {target!r} is no probability of agreeing; give one in (0, 1)")
    agree, disagree = mixture.agree, mixture.disagree
    wanted = math.log(target) - math.log1p(-target)
    constant = math.log(mixture.weight_agree) - math.log1p(-mixture.weight_agree)
    constant += disagree.log_normalizer - agree.log_normalizer
    rise, fall = agree.a - disagree.a, agree.b - disagree.b

    def holds(confidence: float) -> bool:
        return constant + rise * math.log(confidence) + fall * math.log1p(-confidence) >= wanted

    low, high = EPSILON, 1 - EPSILON
    if not holds(high):
        return NEVER_EXIT
    # The odds of two Betas turn at most once between 0 and 1.
    turn = rise / (rise + fall) if rise + fall else math.nan
    if not low < turn < high:
        return 0.0 if holds(low) else _bisect(holds, low, high)
    if not holds(turn):
        return _bisect(holds, turn, high)
    return 0.0 if holds(low) else _bisect(holds, low, turn)


def _bisect(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The smallest number at which `holds` is true, where it is false at `low`, true at `high` and turns once."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
