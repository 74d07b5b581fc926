"""The threshold by the method that was asked for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from freeexport.calibration.beta_fit import Fit, fit
from freeexport.calibration.options import CalibrateOptions
from freeexport.calibration.outputs import Outputs
from freeexport.calibration.risk_control import COARSE_THRESHOLDS, THRESHOLDS, lowest_passing, token_losses
from freeexport.traces.trace import Traces
from runtime.bundle.beta_mixture import NEVER_EXIT, BetaMixture
from runtime.errors import OptionError


@dataclass(frozen=True)
class Choice:
    """`quality` is what thresholds that were decoded keep of the full model's metric."""

    threshold: float
    mixture: BetaMixture | None
    quality: dict[float, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def choose(traces: Traces, options: CalibrateOptions, outputs: Outputs | None) -> Choice:
    """A threshold that some token of the traces exceeds, or NEVER_EXIT. `outputs` are needed where a metric is. Raises
    CalibrationError, as `fit` does."""
    choice = _chosen(traces, options, outputs)
    # Above the surest token nothing was seen: what a fit or a bound says there is said of no data.
    beyond = choice.threshold >= float(np.max(traces.confidence, initial=0.0))
    return replace(choice, threshold=NEVER_EXIT) if beyond else choice


def _chosen(traces: Traces, options: CalibrateOptions, outputs: Outputs | None) -> Choice:
    fitted = fit(traces.confidence, traces.agrees, options.target)
    if options.method == "quality":
        return _by_quality(fitted, options, _given(outputs))
    if options.method == "risk":
        return _by_risk(traces, fitted, options, outputs)
    notes = (fitted.note,) if fitted.note else ()
    quality = {}
    if options.metric is not None and fitted.threshold < NEVER_EXIT:
        quality[fitted.threshold] = _given(outputs).kept(options.metric, fitted.threshold)
    return Choice(fitted.threshold, fitted.mixture, quality, notes)


def _by_risk(traces: Traces, fitted: Fit, options: CalibrateOptions, outputs: Outputs | None) -> Choice:
    metric = options.metric
    if metric is None:
        threshold = lowest_passing(lambda value: token_losses(traces, value), THRESHOLDS, options.risk, options.delta)
        return Choice(threshold, fitted.mixture)
    decoded = _given(outputs)
    quality: dict[float, float] = {}

    def losses(threshold: float) -> np.ndarray:
        score = decoded.against_full(metric, threshold)
        quality[threshold] = float(np.mean(score))
        return ~score if score.dtype == np.bool_ else 1 - score

    threshold = lowest_passing(losses, COARSE_THRESHOLDS, options.risk, options.delta)
    return Choice(threshold, fitted.mixture, quality)


def _by_quality(fitted: Fit, options: CalibrateOptions, outputs: Outputs) -> Choice:
    """From the top down to the first threshold that loses too much on two thirds of the sequences; then, on the others,
    up again to the first that does not."""
    metric, held_out = options.metric or "exact", held_out_of(len(outputs))
    passing: list[float] = []
    for threshold in COARSE_THRESHOLDS[1:]:
        if outputs.kept(metric, threshold, ~held_out) < options.quality:
            break
        passing.append(threshold)
    quality: dict[float, float] = {}
    for threshold in reversed(passing):
        quality[threshold] = outputs.kept(metric, threshold, held_out)
        if quality[threshold] >= options.quality:
            note = f"the quality was decoded on {int(held_out.sum())} sequences not used for the choice"
            return Choice(threshold, fitted.mixture, quality, (note,))
    return Choice(NEVER_EXIT, fitted.mixture, quality)


def held_out_of(count: int) -> np.ndarray:
    """Which of `count` sequences the choice does not see, bool [n]: every third, whatever order the data have."""
    return np.arange(count) % 3 == 2


def _given(outputs: Outputs | None) -> Outputs:
    if outputs is None:
        raise OptionError("a metric compares what mode free writes, which needs a bundle; convert, calibrate that")
    return outputs


# So many of the exits that agree stay. Taking one back costs time only: the deep decoder chooses the same token again.
KEPT = 0.99


def rollback_limit(traces: Traces, threshold: float) -> float | None:
    """Nats: the 99 % quantile among exited tokens that agree; None where there is none."""
    agreeing = traces.nll[(traces.confidence.astype(np.float64) > threshold) & traces.agrees]
    return float(np.quantile(agreeing, KEPT)) if len(agreeing) else None


def caught(traces: Traces, threshold: float, limit: float) -> float | None:
    """The share of exited tokens that disagree which `limit` takes back; None where none disagrees."""
    wrong = traces.nll[(traces.confidence.astype(np.float64) > threshold) & ~traces.agrees]
    return float(np.mean(wrong > limit)) if len(wrong) else None
