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

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.adaptation.label_statistics import LabelStatistics
from runtime.adaptation.learner import Count, LearnedState, Learner, RequestLabels, check_sums
from runtime.bundle.beta import NEVER_EXIT, Beta, BetaMixture, LogSums, threshold_at
from runtime.bundle.calibration import Calibration
from runtime.bundle.costs import Costs
from runtime.bundle.manifest import Manifest

AUDIT_TOKENS = 256
# New tokens after which the mixture is refitted, which takes half a millisecond.
REFIT_TOKENS = 64
# Share of decoding time that labels may cost. They need the deep head at every row of a pass.
LABEL_SHARE = 0.01
# Rows of a typical pass, for estimating the cost of labels.
TYPICAL_ROWS = 4
# Exits are disabled if their predicted speedup over mode full is lower. Predictions were up to 17 %
# too low.
MIN_SPEEDUP = 0.95
# If nothing exits and costs are unknown, every n-th request is a probe.
PROBE_EVERY = 20
# Bounds of the target implied by a calibrated threshold: P(agree | c) at the threshold.
MIN_TARGET = 0.5
MAX_TARGET = 0.9999
# Without calibration: the target of `freeexport calibrate`, and a typical mixture of shallow
# decoders, whose first threshold is 0.94. Its weight is only that of every prior (PRIOR_TOKENS).
UNCALIBRATED_TARGET = 0.95
UNCALIBRATED = BetaMixture(Beta(2.0, 0.5), Beta(1.0, 1.5), 0.7)


@dataclass(frozen=True)
class AdaptiveState(LearnedState):
    """State of an AdaptiveThreshold.

    Attributes:
        left: Unlabelled tokens since the last audit.
        fresh: Tokens since the last refit.
        agree: Weight and sums of ln c and ln(1 - c) of agreeing tokens.
        disagree: The same for disagreeing tokens.
        unlabelled: The same for each bin of unlabelled tokens.
    """

    requests: Count
    left: Count
    fresh: Count
    agree: tuple[float, ...]
    disagree: tuple[float, ...]
    unlabelled: tuple[tuple[float, ...], ...]
    mixture: BetaMixture


class AdaptiveThreshold(Learner):
    """Threshold from a Beta mixture that is refitted by EM.

    The threshold is NEVER_EXIT while exits do not pay, according to `costs`.

    Args:
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
            check_sums([found.agree, found.disagree, *found.unlabelled], max_sum=0)
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
            if self._costs.speedup(exits, self._max_pending) < MIN_SPEEDUP:
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
    """Return n such that the shallow head for every n-th request costs LABEL_SHARE of the time.

    For requests in which nothing exits. PROBE_EVERY if costs are unknown.
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
    return min(max(target, MIN_TARGET), MAX_TARGET)
