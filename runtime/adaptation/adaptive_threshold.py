"""The exit threshold refitted from what sync passes say, while a session decodes.

A sync pass of mode "free" tells for each of its rows whether both decoders predict the same: for the tokens that exited
since the last pass, for the one below the threshold that made it run, and for one that a full stack forced. So what the
threshold decides is labelled on both sides of it. Which tokens remain without a label?

- A stack that is left over when a sequence ends. Its tokens are more confident than the threshold, so leaving them out
  would make confident tokens look rarer than they are. They count as unlabelled, and EM gives them the labels that
  tokens of their confidence have, which is right as long as being left over depends on the confidence alone.
- It may depend on more; and where sequences are short and all tokens exit, no pass runs, and a threshold that is too
  low stays so. So once AUDIT_TOKENS were left over, the stack of the next request that ends is checked by one pass
  more, an audit, which changes none of its tokens.

Where nothing may exit, or so little that exits would cost time, requests are decoded as mode "full" does, without the
shallow head. Now and then one runs the head all the same, a probe, whose tokens are all labelled: so exits come back.

Requests with a threshold of their own are not learned from: their passes would choose other tokens. What is seen fades
exponentially. The state is a function of the requests in the order in which they complete; what a request does is a
function of the state at its start.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np

from runtime.bundle.beta import EPSILON, NEVER_EXIT, Beta, BetaMixture, LogSums, most_likely, threshold_at
from runtime.bundle.calibration import Calibration
from runtime.bundle.costs import Costs
from runtime.bundle.manifest import ConfidenceMeasure, Manifest
from runtime.bundle.schema import Range, Reader
from runtime.errors import BundleError, CalibrationError, OptionError

STATE_VERSION = 1
AUDIT_TOKENS = 256
# New tokens that make a refit worth its half millisecond.
REFIT_TOKENS = 64
# Labels need the deep head at every row of a pass. What that may cost, as a share of the time of decoding.
LABEL_SHARE = 0.01
# Rows of a typical pass, by which the cost of labels is judged.
TYPICAL_ROWS = 4
# Exits are left off where they are predicted to be slower than this multiple of mode full's speed. Predictions err: up
# to 17 % too low were seen.
LEAST_SPEEDUP = 0.95
# Where nothing exits, one request in so many is a probe, if costs are unknown.
PROBE_EVERY = 20
# A calibrated threshold without a target implies one: P(agree | c) there, within these bounds.
LEAST_TARGET, MOST_TARGET = 0.5, 0.9999
# Without calibration: that of `freeexport calibrate`, and confidences as shallow decoders have them, at first above a
# threshold of 0.94. It is worth no token but those that no prior loses (PRIOR_TOKENS).
UNCALIBRATED_TARGET = 0.95
UNCALIBRATED = BetaMixture(Beta(2.0, 0.5), Beta(1.0, 1.5), 0.7)
# Unlabelled tokens are kept in bins of equal width in the logit: EM must see how they are distributed.
BINS = 56
# The calibrated mixture never quite fades: so many of its tokens stand beside what is seen, for each component.
PRIOR_TOKENS = 10.0
# Rounds of EM at a refit, each with one Newton step; the next refit goes on from there.
ROUNDS = 3

_LIMIT = math.log(1 - EPSILON) - math.log(EPSILON)

StateT = TypeVar("StateT", bound="LearnedState")
Count = Annotated[int, Range(0, 1 << 62)]


class RequestLabels:
    """A request's view: the `threshold` at its start, and what its sync passes say. Of one thread."""

    def __init__(self, threshold: float, learns: bool, audits: bool) -> None:
        self.threshold, self.learns, self._audits = threshold, learns, audits
        self.labelled: list[tuple[float, bool]] = []
        self.unlabelled: list[float] = []
        self.audited = False

    def label(self, rows: Sequence[tuple[float, bool]]) -> None:
        """Rows of a sync pass: confidence, and whether both decoders predict the same."""
        self.labelled.extend(rows)

    def leave(self, confidences: Sequence[float], at_rest: bool = True) -> bool:
        """The sequence ended with these rows stacked. True asks for a pass over them, whose rows are then labelled:
        only where no call is under way (`at_rest`)."""
        if self._audits and at_rest and confidences:
            self.audited = True
            return True
        self.unlabelled.extend(confidences)
        return False


@dataclass(frozen=True)
class LearnedState:
    """A learned state, to go on from later, as JSON can hold it; these fields say of which model."""

    schema_version: int
    source_sha256: str
    exit_layer: int
    confidence: ConfidenceMeasure


@dataclass(frozen=True)
class AdaptiveState(LearnedState):
    """The state of an AdaptiveThreshold. Sums are the weight and the sums of ln c and ln (1 - c). `left`: tokens
    without label since the last audit, `fresh`: tokens since the last refit."""

    requests: Count
    left: Count
    fresh: Count
    agree: tuple[float, ...]
    disagree: tuple[float, ...]
    unlabelled: tuple[tuple[float, ...], ...]
    mixture: BetaMixture


class Learner:
    """Shared by the requests of a session; thread-safe. `threshold`: with which a request would begin now."""

    threshold: float

    def __init__(self, manifest: Manifest) -> None:
        # Reentrant: a stream that nobody closed may complete while the collector runs inside `complete`.
        self._lock = threading.RLock()
        self._model = STATE_VERSION, manifest.source_sha256, manifest.exit_layer, manifest.confidence

    def begin(self) -> RequestLabels:
        raise NotImplementedError

    def complete(self, labels: RequestLabels) -> None:
        """Learn from a request that has ended."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """All that was learned, as JSON can hold it."""
        with self._lock:
            return dataclasses.asdict(self._state())

    def _state(self) -> LearnedState:
        raise NotImplementedError

    def _read(self, given: Mapping[str, Any], kind: type[StateT]) -> StateT:
        """Raises OptionError for what `state()` cannot have given, and for the state of another model."""
        try:
            listed = {name: _listed(value) for name, value in dict(given).items()}
            state: StateT = Reader("start without a state").read(kind, listed, "adaptive_state")
        except (BundleError, CalibrationError, TypeError, ValueError) as error:
            raise OptionError(str(error)) from None
        for field, wanted in zip(dataclasses.fields(LearnedState), self._model, strict=True):
            if (value := getattr(state, field.name)) != wanted:
                raise OptionError(
                    f"adaptive_state: {field.name} is {value!r}, this bundle has {wanted!r}; start without a state"
                )
        return state


def check_sums(sums: Iterable[Sequence[float]], most: float = math.inf) -> None:
    """Raises OptionError for what is no weight and two sums of at most `most`."""
    if not all(len(row) == 3 and row[0] >= 0 and max(row[1:]) <= most for row in sums):
        raise OptionError("adaptive_state holds sums that no tokens have; start without a state")


class AdaptiveThreshold(Learner):
    """`memory`: tokens after which one counts 1/e.

    Begins with the calibrated mixture, worth as many tokens as were calibrated with, at most `memory`; without one, as
    in the paper, which needs no calibration set, with UNCALIBRATED; or with `state`, as `state()` gave it. `target` is
    the P(agree | c) of an exit: that of the calibration or UNCALIBRATED_TARGET where it is None. `costs` on this
    machine, None where unknown, decide how many requests it learns from, and whether exits pay: where they do not, the
    threshold is NEVER_EXIT. Raises OptionError where the state is of another model.
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
        self._memory, self._costs = memory, costs
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
            # Logarithms of shares are not above 0.
            check_sums([found.agree, found.disagree, *found.unlabelled], most=0)
            self._evidence = LabelStatistics(LogSums(*found.agree), LogSums(*found.disagree), found.unlabelled)
            self.mixture = found.mixture
            self._requests, self._left, self._fresh = found.requests, found.left, found.fresh
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
        unlabelled = tuple(tuple(row) for row in evidence.unlabelled.tolist())
        sums = tuple(evidence.agree), tuple(evidence.disagree), unlabelled
        return AdaptiveState(*self._model, self._requests, self._left, self._fresh, *sums, self.mixture)


def label_every(costs: Costs | None) -> int:
    """From every how many-th request to learn, so that labels cost LABEL_SHARE of the time; every one where costs are
    unknown.

    The head over all rows of a pass, instead of the last alone, is taken to grow with the rows as the pass does.
    """
    if costs is None:
        return 1
    several = costs.deep_pass(TYPICAL_ROWS)
    extra = costs.head * max(0.0, several / costs.deep[1] - 1)
    return max(1, math.ceil(extra / (TYPICAL_ROWS * costs.shallow + several) / LABEL_SHARE))


def probe_every(costs: Costs | None) -> int:
    """Every how many-th request to run the shallow head for, where nothing exits, so that it costs LABEL_SHARE of the
    time."""
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
    """Tuples as the lists that JSON has."""
    return [_listed(item) for item in value] if isinstance(value, (list, tuple)) else value


class LabelStatistics:
    """Labels of bounded size. A token counts exp(-n / memory) once n tokens came after it."""

    def __init__(self, agree: LogSums, disagree: LogSums, unlabelled: Sequence[Sequence[float]] = ()) -> None:
        self.agree, self.disagree = agree, disagree
        # Weight, sum of ln c and sum of ln (1 - c) of each bin.
        self.unlabelled = np.array(unlabelled, np.float64) if len(unlabelled) else np.zeros((BINS, 3))
        if self.unlabelled.shape != (BINS, 3):
            raise OptionError(f"unlabelled has shape {self.unlabelled.shape}, not {(BINS, 3)}; start without a state")

    @classmethod
    def of_mixture(cls, mixture: BetaMixture, tokens: float) -> LabelStatistics:
        """The expected labels of `tokens` tokens of a mixture."""
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
        of_prior = 2 * PRIOR_TOKENS
        for _ in range(ROUNDS):
            # As BetaMixture.log_odds, within what exp can take.
            first, second = mixture.agree, mixture.disagree
            odds = math.log(mixture.weight_agree) - math.log1p(-mixture.weight_agree)
            odds += second.log_normalizer - first.log_normalizer
            odds = np.clip(odds + means @ np.array([first.a - second.a, first.b - second.b]), -500, 500)
            agreeing = 1 / (1 + np.exp(-odds))
            agree = self.agree + LogSums(*(agreeing @ rows).tolist())
            disagree = self.disagree + LogSums(*((1 - agreeing) @ rows).tolist())
            share = (agree.weight + of_prior * prior.weight_agree) / (agree.weight + disagree.weight + of_prior)
            mixture = BetaMixture(
                most_likely(agree + prior.agree.expected(PRIOR_TOKENS), mixture.agree, steps=1),
                most_likely(disagree + prior.disagree.expected(PRIOR_TOKENS), mixture.disagree, steps=1),
                min(max(share, EPSILON), 1 - EPSILON),
            )
        return mixture


def _sums(confidences: Iterable[float]) -> LogSums:
    weight = log = log_rest = 0.0
    for confidence in confidences:
        # One that is not a number says nothing, and would never be forgotten; at 0 nothing exits at any threshold.
        if 0 < confidence < math.inf:
            inside = min(max(confidence, EPSILON), 1 - EPSILON)
            weight += 1.0
            log += math.log(inside)
            log_rest += math.log1p(-inside)
    return LogSums(weight, log, log_rest)


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
    """The rule as FREE's authors run it (arXiv 2310.05424, and the code they published), for comparison.

    Confidences of agreeing and of disagreeing tokens are Beta distributions, fitted by moments to all labels so far,
    which are as good as one-hot. The threshold is the lowest on a grid of ten from which the likelihood ratio of the
    two, without their shares of the tokens, is above zeta. It is refitted once a sequence, at most 300 times; tokens
    that no sync pass labelled are forgotten.

    Begins with the calibrated threshold, or FIRST_THRESHOLD, or with `state`, as `state()` gave it. `zeta` None is
    ZETA. Raises OptionError where the state is of another model.
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
