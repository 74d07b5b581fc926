"""How sure the shallow decoder must be: a mixture of two Betas over the confidences of agreeing and disagreeing tokens.

A token agrees where the shallow prediction is the deep decoder's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from runtime.bundle.beta import EPSILON, Beta
from runtime.errors import CalibrationError

NEVER_EXIT = 1.0


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
        """The share among all tokens."""
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
