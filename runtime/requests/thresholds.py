"""The threshold of a request: the settings that determine it, and their precedence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from runtime.adaptation.adaptive_threshold import AdaptiveThreshold
from runtime.adaptation.learner import Learner, RequestLabels
from runtime.bundle.beta import NEVER_EXIT
from runtime.bundle.bundle import Bundle
from runtime.bundle.calibration import TableRow
from runtime.bundle.costs import Costs
from runtime.decoding.phrases import PHRASES
from runtime.machine.machine import costs_here, usable_cores
from runtime.options.generation_options import Drafts, GenerationOptions, Mode
from runtime.options.session_options import SessionOptions


@dataclass(frozen=True)
class DefaultMode:
    """How requests are decoded, by default without any option.

    The estimates are those of the calibration at this threshold. None if unknown.

    Attributes:
        mode: The mode.
        threshold: Threshold of mode "free" or "rollback", for an adaptive one its current value.
        drafts: Sources of drafts that are verified, in "lossless" and "free": "text", "phrases"
            (the bundle's table) and "exit".
        speedup: Expected speedup over mode "full", in "free" without verified drafts.
        exit_rate: Expected share of tokens that exit.
        agreement: Expected share of exits that agree with the full model.
    """

    mode: Mode
    threshold: float | None = None
    drafts: tuple[str, ...] = ()
    speedup: float | None = None
    exit_rate: float | None = None
    agreement: float | None = None

    def __str__(self) -> str:
        listed = " and ".join(", ".join(f"the {one}" for one in self.drafts).rsplit(", ", 1))
        if self.mode == "lossless":
            return f"mode lossless: the tokens of mode full, with drafts from {listed}"
        if self.threshold is None:
            every = "every" if self.mode == "shallow" else "no"
            return f"mode {self.mode}: {every} token exits"
        parts = [
            "speedup unknown"
            if self.speedup is None
            else f"{self.speedup:.2f}x expected speedup over mode full"
        ]
        if self.exit_rate is not None:
            parts.append(f"{self.exit_rate:.0%} of tokens exit")
        if self.agreement is not None:
            parts.append(f"{self.agreement:.1%} of exits agree with the full model")
        if self.drafts:
            parts.append(f"with verified drafts from {listed}")
        return f"mode {self.mode}, threshold {self.threshold:.3g}: {', '.join(parts)}"


def default_mode(bundle: Bundle) -> DefaultMode:
    """Return how a session with default options decodes requests with default options."""
    costs = costs_here(bundle.manifest, usable_cores())
    return Thresholds(bundle, SessionOptions(), costs).describe(GenerationOptions())


class Thresholds:
    """Thresholds of a session.

    Args:
        bundle: The bundle.
        options: Options of the session.
        costs: Costs measured on this machine, if known.

    Attributes:
        adaptive: Learner of an adaptive threshold, None if it is not adaptive. It may be replaced
            before the first request.

    Raises:
        OptionError: If an adaptive state does not fit the bundle.
    """

    def __init__(self, bundle: Bundle, options: SessionOptions, costs: Costs | None = None) -> None:
        self._bundle = bundle
        self.costs = costs
        self._of_session: float | None = None
        self.adaptive: Learner | None = None
        if options.threshold == "adaptive":
            self.adaptive = AdaptiveThreshold(
                bundle.manifest,
                bundle.calibration,
                options.adaptive_memory,
                state=options.adaptive_state,
                costs=costs,
                target=options.adaptive_target,
            )
        elif options.threshold is not None:
            self._of_session = float(options.threshold)

    def decide(self, requested: float | None, mode: Mode) -> tuple[float, RequestLabels | None]:
        """Return a request's threshold and, if that adapts, an object that collects its labels.

        The threshold is the confidence above which a token exits or is drafted. In order of
        precedence, it is:

        1. `requested`, the request's own option.
        2. The session's option, if that is a number.
        3. In mode "free" with threshold="adaptive": the value learned so far, fixed for the
           request.
        4. In mode "lossless": 0, because drafts then depend on their measured benefit.
        5. The calibrated value of the bundle, NEVER_EXIT if it is not calibrated.
        """
        if requested is not None:
            return float(requested), None
        if self._of_session is not None:
            return self._of_session, None
        if self.adaptive is not None and mode == "free":
            labels = self.adaptive.begin()
            return labels.threshold, labels
        return 0.0 if mode == "lossless" else self._bundle.manifest.threshold, None

    def learn(self, labels: RequestLabels | None) -> None:
        """Update the adaptive threshold with the labels of a request that has ended."""
        if self.adaptive is not None and labels is not None:
            self.adaptive.complete(labels)

    @property
    def drafts_exit(self) -> bool:
        """Mode "lossless" drafts from the exit by default.

        False if `convert` measured on this machine that it does not pay.
        """
        exit_file = self._bundle.manifest.ready_made_exit
        gain = None if exit_file is None else exit_file.gain
        return self.costs is None or gain is None or gain.pays

    def describe(self, options: GenerationOptions) -> DefaultMode:
        """Describe how requests with these options are decoded."""
        manifest = self._bundle.manifest
        options = self.with_mode(options)
        mode = options.mode
        assert mode is not None
        if mode == "lossless" and options.drafts != "none":
            return DefaultMode(mode, drafts=self._draft_sources(options.drafts))
        threshold, _ = self.decide(options.threshold, mode)
        if mode == "shallow":
            return DefaultMode(mode)
        if mode not in ("free", "rollback"):
            return DefaultMode("full")
        if threshold >= NEVER_EXIT:
            if self.adaptive is None or options.threshold is not None:
                return DefaultMode("full")
            return DefaultMode(mode, threshold, speedup=1.0, exit_rate=0.0)
        drafts: tuple[str, ...] = ()
        if mode == "free" and options.drafts not in ("exit", "none"):
            drafts = self._draft_sources(options.drafts)
        row = self._row(threshold)
        if mode != "free" or row is None:
            return DefaultMode(mode, threshold, drafts)
        speedup = row.predicted_speedup if row.measured_speedup is None else row.measured_speedup
        if self.costs is not None:
            speedup = self.costs.speedup(
                row.exit_rate, manifest.tuned_max_pending or manifest.max_pending
            )
        return DefaultMode(
            mode,
            threshold,
            drafts,
            speedup=speedup,
            exit_rate=row.exit_rate,
            agreement=row.agreement,
        )

    def exit_rate(self, threshold: float) -> float | None:
        """Return the share of tokens that exit at a threshold, None if it was not calibrated."""
        row = self._row(threshold)
        return None if row is None else row.exit_rate

    def _row(self, threshold: float) -> TableRow | None:
        """Return the row of the calibration's table for a threshold, None if there is none."""
        row = min(self._table, key=lambda row: abs(row.threshold - threshold), default=None)
        return None if row is None or abs(row.threshold - threshold) >= 5e-3 else row

    @cached_property
    def _table(self) -> tuple[TableRow, ...]:
        """Rows of the calibration, read from its file once."""
        calibration = self._bundle.calibration
        return () if calibration is None else calibration.table

    def _draft_sources(self, drafts: Drafts | None) -> tuple[str, ...]:
        """Return the sources of drafts that the option `drafts` selects."""
        exits = drafts == "exit" or (drafts in (None, "auto") and self.drafts_exit)
        phrases = drafts not in ("exit", "lookup") and PHRASES in self._bundle.manifest.files
        text = drafts != "exit"
        return ("text",) * text + ("phrases",) * phrases + ("exit",) * exits

    def with_mode(self, options: GenerationOptions) -> GenerationOptions:
        """Return options with a mode.

        Default: "free" if tokens may exit, else "lossless", else "full". "free" where nothing can
        exit is "lossless", unless its drafts are those of the exit alone.
        """
        mode = options.mode
        if mode is None and options.num_beams > 1:
            return replace(options, mode="full")
        if mode not in (None, "free"):
            return options
        adapts = self.adaptive is not None and options.threshold is None
        if adapts or self.decide(options.threshold, "free")[0] < NEVER_EXIT:
            return replace(options, mode="free")
        if options.output_confidence or (mode == "free" and options.drafts == "exit"):
            return replace(options, mode=mode or "full")
        # An exit that was not trained is not tried: its predictions are wrong.
        trained = self._bundle.manifest.exit_trained
        source: Drafts | None = None if trained else "phrases"
        return replace(options, mode="lossless", threshold=0.0, drafts=options.drafts or source)
