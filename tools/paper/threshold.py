"""The threshold rule that FREE's authors run (arXiv 2310.05424 and their published code).

Offline, `paper_choice` applies it to traces. Online, `PaperSession` refits it after each request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np

from freeexport.calibrate.threshold import Choice, Rule, able, fit_mixture
from freeexport.calibrate.traces import Traces
from runtime import Session
from runtime.adaptation.learner import Count, LearnedState, Learner, RequestLabels, check_sums
from runtime.bundle.beta import NEVER_EXIT
from runtime.bundle.manifest import Manifest
from runtime.bundle.schema import Range

ZETA = 0.4  # limit of the likelihood ratio, as a share of both
FIRST_THRESHOLD = 0.9  # until there are labels
MAX_REFITS = 300
GRID = np.linspace(0.3, 0.9, 10)
# Confidences of exactly 0 and 1 have no density.
EDGE = 1e-4
# Weight of a label in the other class, relative to its own: 1e-4 to 0.2.
OTHER = 1e-4 / 0.2


class Moments(NamedTuple):
    """Moments of the confidences of a class of tokens.

    Attributes:
        weight: Number of tokens.
        total: Sum of the confidences.
        squares: Sum of their squares.
    """

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


def paper_threshold(agree: Moments, disagree: Moments) -> float:
    """Return the threshold for labelled tokens.

    It is the highest of the grid if no ratio exceeds ZETA.
    """
    shapes = [_shapes(agree.plus(disagree, OTHER)), _shapes(disagree.plus(agree, OTHER))]
    if None in shapes:
        return float(GRID[-1])
    # The class with the larger mean is treated as the agreeing one.
    (a, b), (other_a, other_b) = sorted(filter(None, shapes), key=_mean, reverse=True)
    odds = (a - other_a) * np.log(GRID) + (b - other_b) * np.log1p(-GRID)
    odds += _log_beta(other_a, other_b) - _log_beta(a, b)
    above = int(np.sum(odds > math.log(ZETA / (1 - ZETA))))
    return float(GRID[min(len(GRID) - above, len(GRID) - 1)])


def paper_choice(traces: Traces) -> Choice:
    """Choose a threshold from traces.

    Raises:
        CalibrationError: If confidences are not in [0, 1].
    """
    mixture = fit_mixture(traces.confidence, traces.agrees, Rule.agreement).mixture
    agree, disagree = (
        Moments.of(able(traces.confidence[traces.agrees == agrees])) for agrees in (True, False)
    )
    threshold = paper_threshold(agree, disagree)
    # No data support a threshold above the largest confidence.
    beyond = threshold >= float(np.max(traces.confidence, initial=0.0))
    return Choice(NEVER_EXIT if beyond else threshold, mixture)


@dataclass(frozen=True)
class PaperState(LearnedState):
    """State of a PaperThreshold. `agree` and `disagree` are moments."""

    refits: Count
    agree: tuple[float, ...]
    disagree: tuple[float, ...]
    threshold: Annotated[float, Range(0, 1)]


class StackLabels(RequestLabels):
    """Labels of passes with a stack: with one token that exited, at least."""

    def label(self, rows: Sequence[tuple[float, bool]]) -> None:
        """Add rows of a sync pass, unless it has a single row."""
        if len(rows) > 1:
            super().label(rows)


class PaperThreshold(Learner):
    """Adaptive threshold by the authors' rule.

    Confidences of agreeing and disagreeing tokens follow Beta distributions, fitted by moments to
    all labels so far. The labels are almost one-hot. The threshold begins at FIRST_THRESHOLD. Then
    it is the lowest on a grid of ten from which the likelihood ratio of the two, without their
    shares of the tokens, exceeds ZETA. It is refitted after each sequence, at most 300 times.
    Labels come from passes with a stack. Tokens without a label are ignored.

    Args:
        state: State to continue from, as returned by `state()`.

    Raises:
        OptionError: If `state` is invalid or belongs to another model.
    """

    def __init__(self, manifest: Manifest, state: Mapping[str, Any] | None = None) -> None:
        super().__init__(manifest)
        self.threshold = FIRST_THRESHOLD
        self._agree = self._disagree = Moments()
        self._refits = 0
        if state is not None:
            found = self._read(state, PaperState)
            check_sums((found.agree, found.disagree))
            self._agree = Moments(*found.agree)
            self._disagree = Moments(*found.disagree)
            self._refits = found.refits
            self.threshold = found.threshold

    def begin(self) -> RequestLabels:
        with self._lock:
            return StackLabels(self.threshold, learns=self._refits < MAX_REFITS, audits=False)

    def complete(self, labels: RequestLabels) -> None:
        """Refit to all labels so far, including those of a request that has ended."""
        with self._lock:
            if self._refits >= MAX_REFITS:
                return
            confidences = np.array([confidence for confidence, _ in labels.labelled])
            agrees = np.array([agrees for _, agrees in labels.labelled], np.bool_)
            self._agree = self._agree.plus(Moments.of(confidences[agrees]))
            self._disagree = self._disagree.plus(Moments.of(confidences[~agrees]))
            if self._agree.weight or self._disagree.weight:
                self._refits += 1
                self.threshold = paper_threshold(self._agree, self._disagree)

    def _state(self) -> PaperState:
        return PaperState(
            **self._model,
            refits=self._refits,
            agree=tuple(self._agree),
            disagree=tuple(self._disagree),
            threshold=self.threshold,
        )


class PaperSession(Session):
    """Session whose threshold adapts by the authors' rule in mode "free".

    Args:
        state: State to continue from, as returned by `adaptive_state()`.
        options: Other options of a session.

    Raises:
        OptionError: If an option is invalid, or if `state` belongs to another model or rule.
    """

    def __init__(
        self,
        bundle: Path | str,
        state: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(bundle, **{**options, "threshold": "adaptive"})
        self._state.thresholds.adaptive = PaperThreshold(self.manifest, state)


def _shapes(moments: Moments) -> tuple[float, float] | None:
    """Return the shapes of the Beta distribution with these moments. None if there is none."""
    if not moments.weight:
        return None
    mean = moments.total / moments.weight
    variance = moments.squares / moments.weight - mean * mean
    if variance <= 1e-12:  # equal confidences have no Beta distribution
        return None
    a = mean * (mean * (1 - mean) / variance - 1)
    return (a, a * (1 - mean) / mean) if a > 0 else None


def _mean(shapes: tuple[float, float]) -> float:
    return shapes[0] / (shapes[0] + shapes[1])


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
