"""How sure the shallow decoder must be: a mixture of two Betas over the confidences of agreeing and disagreeing tokens.

A token agrees where the shallow prediction is the deep decoder's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from runtime.bundle.beta import EPSILON, UNIFORM, Beta, LogSums, clipped, from_moments, most_likely
from runtime.errors import CalibrationError

NEVER_EXIT = 1.0
# Where EM without labels begins: so many of the tokens, the surest, taken as agreeing.
FIRST_SHARES = (0.3, 0.6, 0.9)


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

    def density(self, confidence: np.ndarray | float) -> np.ndarray:
        """Of all tokens."""
        agree, disagree = self.agree.density(confidence), self.disagree.density(confidence)
        return np.asarray(self.weight_agree * agree + (1 - self.weight_agree) * disagree)


def threshold_at(mixture: BetaMixture, target: float) -> float:
    """The smallest confidence from which P(agree | c) >= `target` stays true up to 1.

    0 where it holds everywhere; 1, "never exit", where it does not hold at 1. `target` in (0, 1).
    """
    if not 0 < target < 1:
        raise CalibrationError(f"target = {target!r} is no probability of agreeing; give one in (0, 1)")
    agree, disagree = mixture.agree, mixture.disagree
    wanted = math.log(target) - math.log1p(-target)
    constant = math.log(mixture.weight_agree) - math.log1p(-mixture.weight_agree)
    constant += disagree.log_normalizer - agree.log_normalizer

    def holds(confidence: float) -> bool:
        slopes = (agree.a - disagree.a) * math.log(confidence) + (agree.b - disagree.b) * math.log1p(-confidence)
        return constant + slopes >= wanted

    low, high, turn = EPSILON, 1 - EPSILON, _turning_point(agree, disagree)
    if not holds(high):
        return NEVER_EXIT
    if turn is not None and not holds(turn):
        return _bisect(holds, turn, high)
    return 0.0 if holds(low) else _bisect(holds, low, high if turn is None else turn)


def _turning_point(agree: Beta, disagree: Beta) -> float | None:
    """The odds of two Betas turn at most once between 0 and 1: where, or None."""
    rise, fall = agree.a - disagree.a, agree.b - disagree.b
    turn = rise / (rise + fall) if rise + fall else math.nan
    return turn if EPSILON < turn < 1 - EPSILON else None


def _bisect(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The smallest number at which `holds` is true, where it is false at `low`, true at `high` and turns once."""
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return high
        low, high = (low, middle) if holds(middle) else (middle, high)


class MixtureFit(NamedTuple):
    """`objective` after each round of EM, in nats: the log-likelihood, and that of the prior's tokens. It never falls.
    `converged`: the last round gained no more than the tolerance."""

    mixture: BetaMixture
    objective: tuple[float, ...]
    converged: bool


def em(
    confidences: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    prior_tokens: float = 1.0,
    rounds: int = 1000,
    tolerance: float = 1e-9,
) -> MixtureFit:
    """Fit a mixture to `confidences` [n] in [0, 1]. `labels` [n]: 1 agrees, 0 disagrees, NaN unknown; None is all
    unknown, and then the component with the higher mean is that of the agreeing ones.

    Labels must be missing at random given the confidence. Each component also sees `prior_tokens` of a uniform
    distribution, so that a class that is missing, equal confidences, or ten tokens give a mixture that can be used; 0
    is plain maximum likelihood, within the bounds of shapes. `tolerance`: nats a token that end the rounds.
    Deterministic. Raises CalibrationError.
    """
    tokens = _Tokens.of(confidences, labels)
    if not (math.isfinite(prior_tokens) and prior_tokens >= 0):
        raise CalibrationError(f"prior_tokens = {prior_tokens!r}; give a number from 0")
    fits = [_climb(tokens, start, prior_tokens, rounds, tolerance) for start in _starts(tokens, prior_tokens)]
    best = max(fits, key=lambda fit: fit.objective[-1])
    if tokens.known.any() or best.mixture.agree.mean >= best.mixture.disagree.mean:
        return best
    mixture = best.mixture
    return best._replace(mixture=BetaMixture(mixture.disagree, mixture.agree, 1 - mixture.weight_agree))


class _Tokens(NamedTuple):
    """Confidences [n] with their logarithms; `agrees` [n] is NaN where not `known`."""

    confidence: np.ndarray
    log: np.ndarray
    log_rest: np.ndarray
    agrees: np.ndarray
    known: np.ndarray

    @classmethod
    def of(cls, confidences: np.ndarray, labels: np.ndarray | None) -> _Tokens:
        given = np.asarray(confidences, np.float64)
        agrees = np.full(given.shape, np.nan) if labels is None else np.asarray(labels, np.float64)
        if given.ndim != 1 or not len(given):
            raise CalibrationError(f"confidences have shape {given.shape}; give one row of at least one")
        if agrees.shape != given.shape:
            raise CalibrationError(f"there are {agrees.shape} labels for {given.shape} confidences; give one for each")
        wrong = given[~((given >= 0) & (given <= 1))]
        if len(wrong):
            raise CalibrationError(f"{len(wrong)} confidences are not in [0, 1], the first is {wrong[0]}")
        wrong = agrees[~(np.isnan(agrees) | (agrees == 0) | (agrees == 1))]
        if len(wrong):
            raise CalibrationError(f"{len(wrong)} labels are not 0, 1 or NaN, the first is {wrong[0]}")
        inside = clipped(given)
        return cls(inside, np.log(inside), np.log1p(-inside), agrees, ~np.isnan(agrees))

    def sums(self, weights: np.ndarray) -> LogSums:
        return LogSums(float(weights.sum()), float(weights @ self.log), float(weights @ self.log_rest))

    def densities(self, beta: Beta) -> np.ndarray:
        """Logarithms [n], as Beta.log_density."""
        return (beta.a - 1) * self.log + (beta.b - 1) * self.log_rest - beta.log_normalizer

    def moments(self, weights: np.ndarray) -> Beta:
        """The Beta of the weighted mean and variance."""
        if weights.sum() <= 0:
            return UNIFORM
        mean = float(np.average(self.confidence, weights=weights))
        return from_moments(mean, float(np.average((self.confidence - mean) ** 2, weights=weights)))


def _starts(tokens: _Tokens, prior_tokens: float) -> Iterator[BetaMixture]:
    if tokens.known.any():
        agrees = np.where(tokens.known, tokens.agrees, 0.0)
        yield _start(tokens, agrees, tokens.known - agrees)
    if not tokens.known.all():
        for share in FIRST_SHARES:
            sure = (tokens.confidence >= np.quantile(tokens.confidence, 1 - share)).astype(np.float64)
            agrees = np.where(tokens.known, tokens.agrees, sure)
            yield _start(tokens, agrees, 1 - agrees)


def _start(tokens: _Tokens, agree: np.ndarray, disagree: np.ndarray) -> BetaMixture:
    weight = (agree.sum() + 1) / (agree.sum() + disagree.sum() + 2)
    return BetaMixture(tokens.moments(agree), tokens.moments(disagree), float(weight))


def _climb(tokens: _Tokens, start: BetaMixture, prior_tokens: float, rounds: int, tolerance: float) -> MixtureFit:
    mixture, agree = start, np.empty(0)
    objective: list[float] = []
    for _ in range(rounds + 1):
        likelihood, agree = _expect(tokens, mixture)
        objective.append(likelihood + _of_prior(mixture, prior_tokens))
        if len(objective) > 1 and objective[-1] - objective[-2] <= tolerance * len(agree):
            return MixtureFit(mixture, tuple(objective), True)
        if len(objective) <= rounds:
            mixture = maximize(tokens.sums(agree), tokens.sums(1 - agree), mixture, prior_tokens)
    return MixtureFit(mixture, tuple(objective), False)


def _expect(tokens: _Tokens, mixture: BetaMixture) -> tuple[float, np.ndarray]:
    """The log-likelihood, and the responsibilities [n] of the agreeing component: the labels where they are known."""
    agree = math.log(mixture.weight_agree) + tokens.densities(mixture.agree)
    disagree = math.log1p(-mixture.weight_agree) + tokens.densities(mixture.disagree)
    both = np.logaddexp(agree, disagree)
    likelihood = np.where(tokens.known, np.where(tokens.agrees == 1, agree, disagree), both)
    return float(likelihood.sum()), np.where(tokens.known, tokens.agrees, np.exp(agree - both))


def maximize(agree: LogSums, disagree: LogSums, mixture: BetaMixture, prior_tokens: float) -> BetaMixture:
    """The mixture that makes these tokens most likely, found from `mixture`, and no less likely than that is."""
    prior = UNIFORM.expected(prior_tokens)
    share, rest = agree.weight + prior_tokens, disagree.weight + prior_tokens
    # Both components stay possible: a share of exactly 0 or 1 could never be left again.
    weight = min(max(share / (share + rest), EPSILON), 1 - EPSILON)
    return BetaMixture(
        most_likely(agree + prior, mixture.agree), most_likely(disagree + prior, mixture.disagree), weight
    )


def _of_prior(mixture: BetaMixture, prior_tokens: float) -> float:
    prior = UNIFORM.expected(prior_tokens)
    shares = prior_tokens * (math.log(mixture.weight_agree) + math.log1p(-mixture.weight_agree))
    return mixture.agree.log_likelihood(prior) + mixture.disagree.log_likelihood(prior) + shares
