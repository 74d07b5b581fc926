"""The threshold of a request: where it may be set, and which setting takes precedence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from runtime.adaptation.adaptive_threshold import AdaptiveThreshold, RequestLabels
from runtime.adaptation.paper_threshold import PaperThreshold
from runtime.bundle.beta import NEVER_EXIT
from runtime.bundle.bundle import Bundle
from runtime.bundle.costs import Costs
from runtime.options import GenerationOptions, Mode, SessionOptions

# Where a bundle was not calibrated, lossless drafts above this: its tokens are those of full at any threshold.
DRAFT_THRESHOLD = 0.5


class Threshold(NamedTuple):
    """The threshold of one request: the confidence above which a token exits or is drafted. `labels`: where
    it adapts, what the request has to teach the session's `adaptive` one."""

    value: float
    labels: RequestLabels | None = None
    adaptive: AdaptiveThreshold | PaperThreshold | None = None

    def learn(self) -> None:
        """The request has ended."""
        if self.adaptive is not None and self.labels is not None:
            self.adaptive.complete(self.labels)


@dataclass(frozen=True)
class DefaultMode:
    """How requests that give neither mode nor threshold are decoded. In "free", `threshold` is where they begin, and
    `speedup` (over mode full), `exit_rate` and `agreement` are what the calibration expects there; None is not known.
    """

    mode: Mode
    threshold: float | None = None
    speedup: float | None = None
    exit_rate: float | None = None
    agreement: float | None = None

    def __str__(self) -> str:
        if self.mode == "lossless":
            return "mode lossless, as no threshold is calibrated: the tokens of mode full, with drafts from the text"
        expected = [
            *([] if self.exit_rate is None else [f"{self.exit_rate:.0%} of tokens exit"]),
            *([] if self.agreement is None else [f"{self.agreement:.1%} of exits agree with the whole model"]),
        ]
        gain = "gain not known" if self.speedup is None else f"{self.speedup:.2f}x the speed of mode full expected"
        return f"mode {self.mode}, threshold {self.threshold:.3g}: {', '.join([gain, *expected])}"


class Thresholds:
    """Thresholds of a session. `adaptive`: what it learns with threshold="adaptive", else None. `costs`: of this
    machine, where they are known. Raises OptionError for an adaptive state that does not fit the bundle."""

    def __init__(self, bundle: Bundle, options: SessionOptions, costs: Costs | None = None) -> None:
        self._of_bundle = bundle.manifest.threshold
        self._bundle, self.costs = bundle, costs
        self._of_session: float | None = None
        self.adaptive: AdaptiveThreshold | PaperThreshold | None = None
        given = options.adaptive_state, options.adaptive_target
        if options.threshold == "adaptive" and options.adaptive_rule == "paper":
            self.adaptive = PaperThreshold(bundle.manifest, bundle.calibration, *given)
        elif options.threshold == "adaptive":
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

    def default(self) -> DefaultMode:
        """Describe requests that give neither mode nor threshold."""
        threshold = self.decide(None, "free").value
        if threshold >= NEVER_EXIT and self.adaptive is None:
            return DefaultMode("lossless")
        calibration, manifest = self._bundle.calibration, self._bundle.manifest
        rows = (
            [] if calibration is None else [row for row in calibration.table if abs(row.threshold - threshold) < 5e-3]
        )
        if not rows:
            return DefaultMode("free", threshold)
        row = min(rows, key=lambda row: abs(row.threshold - threshold))
        speedup = row.predicted_speedup if row.measured_speedup is None else row.measured_speedup
        if self.costs is not None:
            speedup = self.costs.speedup(row.exit_rate, manifest.tuned_max_pending or manifest.max_pending)
        return DefaultMode("free", threshold, speedup, row.exit_rate, row.agreement)

    def with_mode(self, options: GenerationOptions) -> GenerationOptions:
        """`options` with a mode: free where anything may exit, else lossless with drafts from the text, else full."""
        if options.mode is not None:
            return options
        if options.num_beams > 1:
            return replace(options, mode="full")
        never = options.threshold is None and self.adaptive is None and self.decide(None, "free").value >= NEVER_EXIT
        drafts = any(given is not None for given in (options.drafts, options.predicted_output, options.draft_source))
        if not drafts and not never:
            return replace(options, mode="free")
        if options.output_confidence:
            return replace(options, mode="full")
        return replace(options, mode="lossless", drafts=options.drafts or ("lookup" if never else None))
