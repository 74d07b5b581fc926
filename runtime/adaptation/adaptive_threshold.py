"""Adapts the exit threshold to the labels that sync passes give while a session decodes.

In mode "free", a sync pass shows for each of its rows whether both decoders predict the same token.
The rows are the tokens that exited since the last pass, the token below the threshold that caused
it, and tokens forced by a full stack. The labels therefore cover both sides of the threshold,
except for one group: the rows that are still stacked when a sequence ends.

- These rows are more confident than the threshold. Ignoring them would make confident tokens look
  rarer than they are. They are counted as unlabelled, and EM assigns them the labels of tokens with
  equal confidence. This is unbiased if being left over depends only on the confidence.
- It may depend on more. And if sequences are short and all tokens exit, no pass ever runs, so a
  threshold that is too low would never be corrected. After AUDIT_TOKENS such rows, the stack of the
  next request that ends is checked by one more pass, an audit, which does not change the request's
  tokens.

If nothing may exit, or exits are too rare to save time, requests are decoded as in mode "full",
without the shallow head. Occasionally one runs the head anyway, a probe, whose tokens are all
labelled. This is how exits return.

Requests with their own threshold are ignored, because their passes would select other tokens.
Evidence decays exponentially. The state is a function of the completed requests in the order of
completion, and a request depends only on the state at its start.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np

from runtime.bundle.beta import (
    EPSILON,
    NEVER_EXIT,
    Beta,
    BetaMixture,
    LogSums,
    most_likely,
    threshold_at,
)
from runtime.bundle.calibration import Calibration
from runtime.bundle.costs import Costs
from runtime.bundle.manifest import ConfidenceMeasure, Manifest
from runtime.bundle.schema import Range, Reader
from runtime.errors import BundleError, CalibrationError, OptionError

STATE_VERSION = 1
AUDIT_TOKENS = 256
# New tokens after which the mixture is refitted, which takes half a millisecond.
REFIT_TOKENS = 64
# Share of decoding time that labels may cost. They need the deep head at every row of a pass.
LABEL_SHARE = 0.01
# Rows of a typical pass, for estimating the cost of labels.
TYPICAL_ROWS = 4
# Exits are disabled if their predicted speedup over mode full is lower. Predictions were up to 17 %
# too low.
LEAST_SPEEDUP = 0.95
# If nothing exits and costs are unknown, every n-th request is a probe.
PROBE_EVERY = 20
# Bounds of the target implied by a calibrated threshold: P(agree | c) at the threshold.
LEAST_TARGET = 0.5
MOST_TARGET = 0.9999
# Without calibration: the target of `freeexport calibrate`, and a typical mixture of shallow
# decoders, whose first threshold is 0.94. Its weight is only that of every prior (PRIOR_TOKENS).
UNCALIBRATED_TARGET = 0.95
UNCALIBRATED = BetaMixture(Beta(2.0, 0.5), Beta(1.0, 1.5), 0.7)
# Bins of equal width in the logit for unlabelled tokens, whose distribution EM needs.
BINS = 56
# Weight of the calibrated mixture in every refit, in tokens per component. It does not decay.
PRIOR_TOKENS = 10.0
# EM iterations per refit, each with one Newton step. The next refit continues from the result.
ROUNDS = 3

_LIMIT = math.log(1 - EPSILON) - math.log(EPSILON)

StateT = TypeVar("StateT", bound="LearnedState")
Count = Annotated[int, Range(0, 1 << 62)]


class RequestLabels:
    """Labels that one request collects. Used by one thread.

    Args:
        threshold: Threshold at the start of the request.
        learns: The request's labels are used.
        audits: Check the rows that remain stacked at the end.
    """

    def __init__(self, threshold: float, learns: bool, audits: bool) -> None:
        self.threshold = threshold
        self.learns = learns
        self._audits = audits
        self.labelled: list[tuple[float, bool]] = []
        self.unlabelled: list[float] = []
        self.audited = False

    def label(self, rows: Sequence[tuple[float, bool]]) -> None:
        """Add rows of a sync pass: confidence, and whether both decoders predict the same token."""
        self.labelled.extend(rows)

    def leave(self, confidences: Sequence[float], at_rest: bool = True) -> bool:
        """Add rows that remain stacked when the sequence ends.

        Returns True to request an audit: a pass over these rows, which are then added by `label`.

        Args:
            confidences: Confidences of the rows.
            at_rest: No engine call is running. An audit needs this.
        """
        if self._audits and at_rest and confidences:
            self.audited = True
            return True
        self.unlabelled.extend(confidences)
        return False


@dataclass(frozen=True)
class LearnedState:
    """A saved state in JSON types. These fields identify the model."""

    schema_version: int
    source_sha256: str
    exit_layer: int
    confidence: ConfidenceMeasure


@dataclass(frozen=True)
class AdaptiveState(LearnedState):
    """State of an AdaptiveThreshold.

    Attributes:
        requests: Number of completed requests.
        left: Unlabelled tokens since the last audit.
        fresh: Tokens since the last refit.
        agree: Weight and sums of ln c and ln(1 - c) of agreeing tokens.
        disagree: The same for disagreeing tokens.
        unlabelled: The same for each bin of unlabelled tokens.
        mixture: Fitted mixture.
    """

    requests: Count
    left: Count
    fresh: Count
    agree: tuple[float, ...]
    disagree: tuple[float, ...]
    unlabelled: tuple[tuple[float, ...], ...]
    mixture: BetaMixture


class Learner:
    """Base of adaptive thresholds, shared by the requests of a session. Thread-safe.

    `threshold` is the current threshold, used by requests that begin now.
    """

    threshold: float

    def __init__(self, manifest: Manifest) -> None:
        # Reentrant: garbage collection inside `complete` may complete a stream that was not closed.
        self._lock = threading.RLock()
        self._model: dict[str, Any] = {
            "schema_version": STATE_VERSION,
            "source_sha256": manifest.source_sha256,
            "exit_layer": manifest.exit_layer,
            "confidence": manifest.confidence,
        }

    def begin(self) -> RequestLabels:
        """Begin a request."""
        raise NotImplementedError

    def complete(self, labels: RequestLabels) -> None:
        """Learn from a request that has ended."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Return the learned state in JSON types."""
        with self._lock:
            return dataclasses.asdict(self._state())

    def _state(self) -> LearnedState:
        raise NotImplementedError

    def _read(self, given: Mapping[str, Any], kind: type[StateT]) -> StateT:
        """Parse a saved state.

        Raises:
            OptionError: If it is invalid or belongs to another model.
        """
        try:
            listed = {name: _listed(value) for name, value in dict(given).items()}
            state: StateT = Reader("start without a state").read(kind, listed, "adaptive_state")
        except (BundleError, CalibrationError, TypeError, ValueError) as error:
            raise OptionError(str(error)) from None
        for name, expected in self._model.items():
            value = getattr(state, name)
            if value != expected:
                raise OptionError(
                    f"adaptive_state: {name} is {value!r}, this bundle has {expected!r}; "
                    "start without a state"
                )
        return state


def check_sums(sums: Iterable[Sequence[float]], most: float = math.inf) -> None:
    """Check that each row is a weight of at least 0 and two sums of at most `most`.

    Raises:
        OptionError: If one is not.
    """
    if not all(len(row) == 3 and row[0] >= 0 and max(row[1:]) <= most for row in sums):
        raise OptionError("adaptive_state holds sums that no tokens have; start without a state")


class AdaptiveThreshold(Learner):
    """Threshold from a Beta mixture that is refitted by EM.

    The threshold is NEVER_EXIT while exits do not pay, according to `costs`.

    Args:
        manifest: Manifest of the bundle.
        calibration: Its mixture is the first estimate, with the weight of its tokens, at most
            `memory`. Default: UNCALIBRATED, as in the paper, which needs no calibration set.
        memory: Number of tokens after which a token's weight has decayed to 1/e.
        state: State to continue from, as returned by `state()`.
        costs: Costs on this machine. They determine how many requests are learned from, and whether
            exits pay. None if unknown.
        target: P(agree | c) required for an exit. Default: the calibration's, or
            UNCALIBRATED_TARGET.

    Raises:
        OptionError: If `state` is invalid or belongs to another model.
    """

    def __init__(
        self,
        manifest: Manifest,
        calibration: Calibration | None,
        memory: int,
        state: Mapping[str, Any] | None = None,
        costs: Costs | None = None,
        target: float | None = None,
    ) -> None:
        super().__init__(manifest)
        self._memory = memory
        self._costs = costs
        self._max_pending = manifest.tuned_max_pending or manifest.max_pending
        self._every = label_every(costs)
        self._probe_every = max(self._every, probe_every(costs))
        mixture = None if calibration is None else calibration.mixture
        self._prior = self.mixture = mixture or UNCALIBRATED
        self.target = _target(calibration) if target is None else target
        calibrated = 0 if calibration is None or mixture is None else calibration.positions
        self._evidence = LabelStatistics.of_mixture(self._prior, min(calibrated, memory))
        self._requests = self._left = self._fresh = 0
        if state is not None:
            found = self._read(state, AdaptiveState)
            # Logarithms of numbers in (0, 1) are negative.
            check_sums([found.agree, found.disagree, *found.unlabelled], most=0)
            agree = LogSums(*found.agree)
            disagree = LogSums(*found.disagree)
            self._evidence = LabelStatistics(agree, disagree, found.unlabelled)
            self.mixture = found.mixture
            self._requests = found.requests
            self._left = found.left
            self._fresh = found.fresh
        self.threshold = self._paying_threshold()

    def begin(self) -> RequestLabels:
        with self._lock:
            every = self._every if self.threshold < NEVER_EXIT else self._probe_every
            learns = self._requests % every == 0
            return RequestLabels(self.threshold, learns, learns and self._left >= AUDIT_TOKENS)

    def complete(self, labels: RequestLabels) -> None:
        with self._lock:
            self._requests += 1
            if labels.audited:
                self._left = 0
            self._left += len(labels.unlabelled)
            seen = len(labels.labelled) + len(labels.unlabelled)
            if seen:
                self._evidence.add(labels.labelled, labels.unlabelled, self._memory)
            self._fresh += seen
            if self._fresh >= REFIT_TOKENS:
                self._fresh = 0
                self.mixture = self._evidence.refit(self.mixture, self._prior)
                self.threshold = self._paying_threshold()

    def _paying_threshold(self) -> float:
        threshold = threshold_at(self.mixture, self.target)
        if threshold < NEVER_EXIT and self._costs is not None:
            exits = self.mixture.above(threshold)
            if self._costs.speedup(exits, self._max_pending) < LEAST_SPEEDUP:
                return NEVER_EXIT
        return threshold

    def _state(self) -> AdaptiveState:
        evidence = self._evidence
        return AdaptiveState(
            **self._model,
            requests=self._requests,
            left=self._left,
            fresh=self._fresh,
            agree=tuple(evidence.agree),
            disagree=tuple(evidence.disagree),
            unlabelled=tuple(tuple(row) for row in evidence.unlabelled.tolist()),
            mixture=self.mixture,
        )


def label_every(costs: Costs | None) -> int:
    """Return n such that learning from every n-th request costs LABEL_SHARE of the time.

    Labels need the head for all rows of a pass instead of the last. Its cost is assumed to grow
    with the rows like that of the pass. 1 if costs are unknown.
    """
    if costs is None:
        return 1
    several = costs.deep_pass(TYPICAL_ROWS)
    extra = costs.head * max(0.0, several / costs.deep[1] - 1)
    return max(1, math.ceil(extra / (TYPICAL_ROWS * costs.shallow + several) / LABEL_SHARE))


def probe_every(costs: Costs | None) -> int:
    """Return n such that running the shallow head for every n-th request costs LABEL_SHARE of the
    time.

    For requests that otherwise run without it, because nothing exits. PROBE_EVERY if costs are
    unknown.
    """
    if costs is None:
        return PROBE_EVERY
    return max(1, math.ceil((1 / costs.speedup(0.0, 1) - 1) / LABEL_SHARE))


def _target(calibration: Calibration | None) -> float:
    if calibration is None:
        return UNCALIBRATED_TARGET
    if calibration.method == "bmm" and calibration.target is not None:
        target = calibration.target
    elif calibration.mixture is None:
        return UNCALIBRATED_TARGET
    else:
        target = float(calibration.mixture.posterior(calibration.threshold))
    return min(max(target, LEAST_TARGET), MOST_TARGET)


def _listed(value: Any) -> Any:
    """Convert tuples to lists, recursively, as in JSON."""
    return [_listed(item) for item in value] if isinstance(value, (list, tuple)) else value


class LabelStatistics:
    """Exponentially decaying statistics of labels, of constant size.

    A token's weight is exp(-n / memory) after n more tokens.

    Args:
        agree: Statistics of agreeing tokens.
        disagree: Statistics of disagreeing tokens.
        unlabelled: Statistics of each bin of unlabelled tokens, [BINS, 3].

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
        """Add the tokens of a request.

        Args:
            labelled: Confidence and agreement of each token.
            unlabelled: Confidences of tokens without a label.
            memory: Number of tokens after which weights have decayed to 1/e.
        """
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


ZETA = 0.4
FIRST_THRESHOLD = 0.9  # of bundles without calibration, until there are labels
MOST_REFITS = 300
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


def paper_threshold(agree: Moments, disagree: Moments, zeta: float = ZETA) -> float:
    """Return the threshold for labelled tokens.

    It is the highest of the grid if no ratio exceeds `zeta`.
    """
    shapes = [_shapes(agree.plus(disagree, OTHER)), _shapes(disagree.plus(agree, OTHER))]
    if None in shapes:
        return float(GRID[-1])
    # The class with the larger mean is treated as the agreeing one.
    (a, b), (other_a, other_b) = sorted(filter(None, shapes), key=_mean, reverse=True)
    odds = (a - other_a) * np.log(GRID) + (b - other_b) * np.log1p(-GRID)
    odds += _log_beta(other_a, other_b) - _log_beta(a, b)
    above = int(np.sum(odds > math.log(zeta / (1 - zeta))))
    return float(GRID[min(len(GRID) - above, len(GRID) - 1)])


@dataclass(frozen=True)
class PaperState(LearnedState):
    """State of a PaperThreshold. `agree` and `disagree` are moments."""

    refits: Count
    agree: tuple[float, ...]
    disagree: tuple[float, ...]
    threshold: Annotated[float, Range(0, 1)]


class PaperThreshold(Learner):
    """Rule that FREE's authors run (arXiv 2310.05424 and their published code), for comparison.

    Confidences of agreeing and disagreeing tokens follow Beta distributions, fitted by moments to
    all labels so far. The labels are almost one-hot. The threshold is the lowest on a grid of ten
    from which the likelihood ratio of the two, without their shares of the tokens, exceeds zeta. It
    is refitted after each sequence, at most 300 times. Tokens without a label are ignored.

    Args:
        manifest: Manifest of the bundle.
        calibration: Its threshold is the first one. Default: FIRST_THRESHOLD.
        state: State to continue from, as returned by `state()`.
        zeta: Limit of the ratio. Default: ZETA.

    Raises:
        OptionError: If `state` is invalid or belongs to another model.
    """

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
            self._agree = Moments(*found.agree)
            self._disagree = Moments(*found.disagree)
            self._refits = found.refits
            self.threshold = found.threshold

    def begin(self) -> RequestLabels:
        with self._lock:
            return RequestLabels(self.threshold, learns=self._refits < MOST_REFITS, audits=False)

    def complete(self, labels: RequestLabels) -> None:
        """Refit to all labels so far, including those of a request that has ended."""
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
        return PaperState(
            **self._model,
            refits=self._refits,
            agree=tuple(self._agree),
            disagree=tuple(self._disagree),
            threshold=self.threshold,
        )


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
