"""What was seen of confidences lately: labelled and unlabelled tokens as sums, older ones counting less."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from runtime.bundle.beta import EPSILON, LogSums, most_likely
from runtime.bundle.beta_mixture import BetaMixture
from runtime.errors import OptionError

# Unlabelled tokens are kept in bins of equal width in the logit: EM must see how they are distributed.
BINS = 56
# The calibrated mixture never quite fades: so many of its tokens stand beside what is seen, for each component.
PRIOR_TOKENS = 10.0
# Rounds of EM at a refit, each with one Newton step; the next refit goes on from there.
ROUNDS = 3

_LIMIT = math.log(1 - EPSILON) - math.log(EPSILON)


class LabelStatistics:
    """Of bounded size. A token counts exp(-n / memory) once n tokens came after it."""

    def __init__(self, agree: LogSums, disagree: LogSums, unlabelled: Sequence[Sequence[float]] = ()) -> None:
        self.agree, self.disagree = agree, disagree
        # Weight, sum of ln c and sum of ln (1 - c) of each bin.
        self.unlabelled = np.array(unlabelled, np.float64) if len(unlabelled) else np.zeros((BINS, 3))
        if self.unlabelled.shape != (BINS, 3):
            raise OptionError(f"unlabelled has shape {self.unlabelled.shape}, not {(BINS, 3)}; start without a state")

    @classmethod
    def of_mixture(cls, mixture: BetaMixture, tokens: float) -> LabelStatistics:
        """What `tokens` labelled tokens of a mixture are on average."""
        share = mixture.weight_agree
        return cls(mixture.agree.expected(tokens * share), mixture.disagree.expected(tokens * (1 - share)))

    @property
    def weight(self) -> float:
        return self.agree.weight + self.disagree.weight + float(self.unlabelled[:, 0].sum())

    def add(self, labelled: Sequence[tuple[float, bool]], unlabelled: Sequence[float], memory: float) -> None:
        """Tokens of a request as (confidence, agrees), and confidences of those without a label."""
        faded = math.exp(-(len(labelled) + len(unlabelled)) / memory)
        self.agree = self.agree.scaled(faded) + _sums(c for c, agrees in labelled if agrees)
        self.disagree = self.disagree.scaled(faded) + _sums(c for c, agrees in labelled if not agrees)
        self.unlabelled *= faded
        for confidence in unlabelled:
            sums = _sums([confidence])
            place = (sums.log - sums.log_rest + _LIMIT) / (2 * _LIMIT)
            self.unlabelled[min(int(place * BINS), BINS - 1)] += sums

    def refit(self, mixture: BetaMixture, prior: BetaMixture) -> BetaMixture:
        """EM from `mixture`, where `prior` is believed as much as PRIOR_TOKENS of each component are."""
        rows = self.unlabelled[self.unlabelled[:, 0] > EPSILON]  # [n, 3]
        means = rows[:, 1:] / rows[:, :1]
        for _ in range(ROUNDS):
            agreeing = 1 / (1 + np.exp(-_log_odds(mixture, means)))
            agree = self.agree + LogSums(*(agreeing @ rows).tolist())
            disagree = self.disagree + LogSums(*((1 - agreeing) @ rows).tolist())
            mixture = _maximize(agree, disagree, mixture, prior)
        return mixture


def _maximize(agree: LogSums, disagree: LogSums, mixture: BetaMixture, prior: BetaMixture) -> BetaMixture:
    of_prior = 2 * PRIOR_TOKENS
    share = (agree.weight + of_prior * prior.weight_agree) / (agree.weight + disagree.weight + of_prior)
    return BetaMixture(
        most_likely(agree + prior.agree.expected(PRIOR_TOKENS), mixture.agree, steps=1),
        most_likely(disagree + prior.disagree.expected(PRIOR_TOKENS), mixture.disagree, steps=1),
        min(max(share, EPSILON), 1 - EPSILON),
    )


def _log_odds(mixture: BetaMixture, logs: np.ndarray) -> np.ndarray:
    """As BetaMixture.log_odds, of ln c and ln (1 - c) [n, 2]; within what exp can take."""
    agree, disagree = mixture.agree, mixture.disagree
    constant = math.log(mixture.weight_agree) - math.log1p(-mixture.weight_agree)
    constant += disagree.log_normalizer - agree.log_normalizer
    odds = constant + logs @ np.array([agree.a - disagree.a, agree.b - disagree.b])
    return np.clip(odds, -500, 500)


def _sums(confidences: Iterable[float]) -> LogSums:
    weight = log = log_rest = 0.0
    for confidence in confidences:
        # One that is not a number says nothing, and would never be forgotten.
        if math.isfinite(confidence):
            inside = min(max(confidence, EPSILON), 1 - EPSILON)
            weight += 1.0
            log += math.log(inside)
            log_rest += math.log1p(-inside)
    return LogSums(weight, log, log_rest)
