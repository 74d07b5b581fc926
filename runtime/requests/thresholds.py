"""The threshold of a request: where it may be set, and which setting takes precedence."""

from __future__ import annotations

from typing import NamedTuple

from runtime.adaptation.adaptive_threshold import AdaptiveThreshold, RequestLabels
from runtime.bundle.beta_mixture import NEVER_EXIT
from runtime.bundle.bundle import Bundle
from runtime.bundle.costs import Costs
from runtime.options import Mode, SessionOptions

# Where a bundle was not calibrated, lossless drafts above this: its tokens are those of full at any threshold.
DRAFT_THRESHOLD = 0.5


class Threshold(NamedTuple):
    """Of one request: the confidence above which a token exits or is drafted. `labels`: where it adapts, what the
    request has to teach the session's `adaptive` one."""

    value: float
    labels: RequestLabels | None = None
    adaptive: AdaptiveThreshold | None = None

    def learn(self) -> None:
        """The request has ended."""
        if self.adaptive is not None and self.labels is not None:
            self.adaptive.complete(self.labels)


class Thresholds:
    """Of a session. `adaptive`: what it learns with threshold="adaptive", else None. `costs`: of this machine, where
    they are known. Raises OptionError for an adaptive state that does not fit the bundle."""

    def __init__(self, bundle: Bundle, options: SessionOptions, costs: Costs | None = None) -> None:
        self._of_bundle = bundle.manifest.threshold
        self._of_session: float | None = None
        self.adaptive: AdaptiveThreshold | None = None
        if options.threshold == "adaptive":
            self.adaptive = AdaptiveThreshold(
                bundle.manifest,
                bundle.calibration,
                options.adaptive_memory,
                options.adaptive_state,
                costs,
                options.adaptive_target,
            )
        elif options.threshold is not None:
            self._of_session = float(options.threshold)

    def decide(self, asked: float | None, mode: Mode) -> Threshold:
        """The first of these that there is:

        1. `asked`: the request's own option.
        2. The session's option, where it is a number.
        3. In mode "free", where the session's option is "adaptive": what was learned so far, for all of the request.
        4. What the bundle was calibrated to.
        5. Never: NEVER_EXIT, which an uncalibrated bundle records. Mode "lossless" then drafts above DRAFT_THRESHOLD.
        """
        if asked is not None:
            return Threshold(float(asked))
        if self._of_session is not None:
            return Threshold(self._of_session)
        if self.adaptive is not None and mode == "free":
            labels = self.adaptive.begin()
            return Threshold(labels.threshold, labels, self.adaptive)
        if self._of_bundle >= NEVER_EXIT and mode == "lossless":
            return Threshold(DRAFT_THRESHOLD)
        return Threshold(self._of_bundle)
