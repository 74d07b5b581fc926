"""The adaptive threshold as FREE's authors run it (arXiv 2310.05424, and the code they published), for comparison.

Confidences of agreeing and of disagreeing tokens are Beta distributions, fitted by moments to all labels so far, which
are as good as one-hot. The threshold is the lowest on a grid of ten from which the likelihood ratio of the two, without
their shares of the tokens, is above zeta. It is refitted once a sequence, at most 300 times; tokens that no sync pass
labelled are forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np

from runtime.adaptation.adaptive_threshold import Count, LearnedState, Learner, RequestLabels, check_sums
from runtime.bundle.beta import NEVER_EXIT
from runtime.bundle.calibration import Calibration
from runtime.bundle.manifest import Manifest
from runtime.bundle.schema import Range

ZETA = 0.4
FIRST_THRESHOLD = 0.9  # until there are labels, where a bundle is not calibrated
MOST_REFITS = 300
GRID = np.linspace(0.3, 0.9, 10)
# Confidences of exactly 0 and 1 have no density.
EDGE = 1e-4
# A label weighs 0.2, and 1e-4 in the other class.
OTHER = 1e-4 / 0.2


class Moments(NamedTuple):
    """A class of tokens: how many, and the sums of their confidences and of the squares."""

    weight: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, confidences: np.ndarray) -> Moments:
        known = np.asarray(confidences, np.float64)
        inside = np.clip(known[np.isfinite(known)], EDGE, 1 - EDGE)
        return cls(float(inside.size), float(inside.sum()), float(np.square(inside).sum()))

    def plus(self, other: Moments, times: float = 1.0) -> Moments:
        return Moments(*(mine + times * theirs for mine, theirs in zip(self, other, strict=True)))


def paper_threshold(agree: Moments, disagree: Moments, zeta: float = ZETA) -> float:
    """The threshold that labelled tokens give. The highest of the grid where no ratio is above `zeta`."""
    shapes = [_shapes(agree.plus(disagree, OTHER)), _shapes(disagree.plus(agree, OTHER))]
    if None in shapes:
        return float(GRID[-1])
    # The class of the larger mean counts as the one that agrees.
    (a, b), (other_a, other_b) = sorted(filter(None, shapes), key=lambda one: one[0] / (one[0] + one[1]), reverse=True)
    odds = (a - other_a) * np.log(GRID) + (b - other_b) * np.log1p(-GRID)
    odds += _log_beta(other_a, other_b) - _log_beta(a, b)
    above = int(np.sum(odds > math.log(zeta / (1 - zeta))))
    return float(GRID[min(len(GRID) - above, len(GRID) - 1)])


@dataclass(frozen=True)
class PaperState(LearnedState):
    """The state of a PaperThreshold; `agree` and `disagree` are moments."""

    refits: Count
    agree: tuple[float, ...]
    disagree: tuple[float, ...]
    threshold: Annotated[float, Range(0, 1)]


class PaperThreshold(Learner):
    """Begins with the calibrated threshold, or FIRST_THRESHOLD, or with `state`, as `state()` gave it. `zeta` None is
    ZETA. Raises OptionError where the state is of another model."""

    def __init__(
        self,
        manifest: Manifest,
        calibration: Calibration | None,
        state: Mapping[str, Any] | None = None,
        zeta: float | None = None,
    ) -> None:
        super().__init__(manifest)
        self._zeta = ZETA if zeta is None else zeta
        calibrated = NEVER_EXIT if calibration is None else calibration.threshold
        self.threshold = calibrated if calibrated < NEVER_EXIT else FIRST_THRESHOLD
        self._agree = self._disagree = Moments()
        self._refits = 0
        if state is not None:
            found = self._read(state, PaperState)
            check_sums((found.agree, found.disagree))
            self._agree, self._disagree = Moments(*found.agree), Moments(*found.disagree)
            self._refits, self.threshold = found.refits, found.threshold

    def begin(self) -> RequestLabels:
        with self._lock:
            return RequestLabels(self.threshold, learns=self._refits < MOST_REFITS, audits=False)

    def complete(self, labels: RequestLabels) -> None:
        """Learn from a request that has ended: a refit to all labels so far."""
        with self._lock:
            if self._refits >= MOST_REFITS:
                return
            confidences = np.array([confidence for confidence, _ in labels.labelled])
            agrees = np.array([agrees for _, agrees in labels.labelled], np.bool_)
            self._agree = self._agree.plus(Moments.of(confidences[agrees]))
            self._disagree = self._disagree.plus(Moments.of(confidences[~agrees]))
            if self._agree.weight or self._disagree.weight:
                self._refits += 1
                self.threshold = paper_threshold(self._agree, self._disagree, self._zeta)

    def _state(self) -> PaperState:
        moments = tuple(self._agree), tuple(self._disagree)
        return PaperState(*self._model, self._refits, *moments, self.threshold)


def _shapes(moments: Moments) -> tuple[float, float] | None:
    """Shapes of the Beta distribution with this mean and variance; None without any."""
    if not moments.weight:
        return None
    mean = moments.total / moments.weight
    variance = moments.squares / moments.weight - mean * mean
    if variance <= 1e-12:  # equal confidences: a peak without end
        return None
    a = mean * (mean * (1 - mean) / variance - 1)
    return (a, a * (1 - mean) / mean) if a > 0 else None


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
