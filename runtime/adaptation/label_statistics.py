"""Decaying statistics of labelled and unlabelled tokens, and the Beta mixture fitted to them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from runtime.bundle.beta import EPSILON, BetaMixture, LogSums, most_likely
from runtime.errors import OptionError

# Bins of equal width in the logit for unlabelled tokens, whose distribution EM needs.
BINS = 56
# Weight of the calibrated mixture in every refit, in tokens per component. It does not decay.
PRIOR_TOKENS = 10.0
# EM iterations per refit, each with one Newton step. The next refit continues from the result.
ROUNDS = 3

_LIMIT = math.log(1 - EPSILON) - math.log(EPSILON)


class LabelStatistics:
    """Exponentially decaying statistics of labels, of constant size.

    A token's weight is exp(-n / memory) after n more tokens.

    Raises:
        OptionError: If `unlabelled` has another shape.
    """

    def __init__(
        self, agree: LogSums, disagree: LogSums, unlabelled: Sequence[Sequence[float]] = ()
    ) -> None:
        self.agree = agree
        self.disagree = disagree
        # Weight, sum of ln c and sum of ln(1 - c) of each bin.
        self.unlabelled = np.zeros((BINS, 3))
        if len(unlabelled):
            self.unlabelled = np.array(unlabelled, np.float64)
        if self.unlabelled.shape != (BINS, 3):
            raise OptionError(
                f"unlabelled has shape {self.unlabelled.shape}, not {(BINS, 3)}; "
                "start without a state"
            )

    @classmethod
    def of_mixture(cls, mixture: BetaMixture, tokens: float) -> LabelStatistics:
        """Return the expected statistics of `tokens` tokens of a mixture."""
        share = mixture.weight_agree
        agree = mixture.agree.expected(tokens * share)
        disagree = mixture.disagree.expected(tokens * (1 - share))
        return cls(agree, disagree)

    @property
    def weight(self) -> float:
        return self.agree.weight + self.disagree.weight + float(self.unlabelled[:, 0].sum())

    def add(
        self, labelled: Sequence[tuple[float, bool]], unlabelled: Sequence[float], memory: float
    ) -> None:
        """Add the tokens of a request."""
        decay = math.exp(-(len(labelled) + len(unlabelled)) / memory)
        agree = _sums(confidence for confidence, agrees in labelled if agrees)
        disagree = _sums(confidence for confidence, agrees in labelled if not agrees)
        self.agree = self.agree.scaled(decay) + agree
        self.disagree = self.disagree.scaled(decay) + disagree
        self.unlabelled *= decay
        for confidence in unlabelled:
            sums = _sums([confidence])
            place = (sums.log - sums.log_rest + _LIMIT) / (2 * _LIMIT)
            self.unlabelled[min(int(place * BINS), BINS - 1)] += sums

    def refit(self, mixture: BetaMixture, prior: BetaMixture) -> BetaMixture:
        """Refit by EM, from `mixture`.

        `prior` has a weight of PRIOR_TOKENS for each component.
        """
        rows = self.unlabelled[self.unlabelled[:, 0] > EPSILON]  # [n, 3]
        means = rows[:, 1:] / rows[:, :1]
        prior_weight = 2 * PRIOR_TOKENS
        for _ in range(ROUNDS):
            # BetaMixture.log_odds, limited to avoid overflow in exp.
            first = mixture.agree
            second = mixture.disagree
            odds = math.log(mixture.weight_agree) - math.log1p(-mixture.weight_agree)
            odds += second.log_normalizer - first.log_normalizer
            odds = odds + means @ np.array([first.a - second.a, first.b - second.b])
            odds = np.clip(odds, -500, 500)
            agreeing = 1 / (1 + np.exp(-odds))
            agree = self.agree + LogSums(*(agreeing @ rows).tolist())
            disagree = self.disagree + LogSums(*((1 - agreeing) @ rows).tolist())
            total = agree.weight + disagree.weight + prior_weight
            share = (agree.weight + prior_weight * prior.weight_agree) / total
            agree += prior.agree.expected(PRIOR_TOKENS)
            disagree += prior.disagree.expected(PRIOR_TOKENS)
            mixture = BetaMixture(
                agree=most_likely(agree, mixture.agree, steps=1),
                disagree=most_likely(disagree, mixture.disagree, steps=1),
                weight_agree=min(max(share, EPSILON), 1 - EPSILON),
            )
        return mixture


def _sums(confidences: Iterable[float]) -> LogSums:
    weight = log = log_rest = 0.0
    for confidence in confidences:
        # Ignore NaN, which would never decay, and 0, which exits at no threshold.
        if 0 < confidence < math.inf:
            inside = min(max(confidence, EPSILON), 1 - EPSILON)
            weight += 1.0
            log += math.log(inside)
            log_rest += math.log1p(-inside)
    return LogSums(weight, log, log_rest)
