"""From data to a threshold: collect traces, fit, and list what every threshold would give."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from freeexport import __version__
from freeexport.calibration.beta_fit import check_confidences
from freeexport.calibration.choose import Choice, caught, choose, rollback_limit
from freeexport.calibration.options import CalibrateOptions
from freeexport.calibration.outputs import Outputs
from freeexport.calibration.risk_control import sequences_needed
from freeexport.calibration.source import Facts, Source
from freeexport.system.jsonl import Request
from freeexport.system.progress import progress
from freeexport.traces.cache import TraceCache, TraceKey
from freeexport.traces.share import share
from freeexport.traces.simulate import SimulatedRun, replay
from freeexport.traces.trace import Traces
from freeexport.traces.verdict import ExitFacts, Verdict, verdict, why_never
from runtime.bundle.beta_mixture import NEVER_EXIT
from runtime.bundle.bundle import sha256_of
from runtime.bundle.calibration import CALIBRATION_VERSION, Calibration, TableRow
from runtime.bundle.costs import Costs, recordable
from runtime.errors import CalibrationError

# Fewer say nothing about a threshold.
LEAST_TOKENS = 50
TABLE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)


@dataclass(frozen=True)
class Calibrated:
    """`calibration` is what is written; the rest explains it. `chosen` is the replay at its threshold. `notes` are
    sentences that the user should read; `caught` is the share of wrong exits that mode rollback takes back. `name` is
    what the model is called on the command line; `trained`: for this exit, None where that is not known."""

    calibration: Calibration
    traces: Traces
    costs: Costs
    chosen: SimulatedRun
    break_even: float | None
    layers: int
    max_pending: int
    caught: float | None = None
    name: str = "BUNDLE"
    trained: bool | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def predicted(self) -> float:
        return self.chosen.speedup(self.costs)


def collect(source: Source, data: Path, requests: Sequence[Request], cache: Path, max_new_tokens: int) -> Traces:
    """Traces of the requests: those in the file `cache` are taken from there, the others are added to it."""
    facts = source.facts
    depends = facts.exit_layer, facts.confidence, max_new_tokens
    known = TraceCache(cache, TraceKey(facts.hash, sha256_of(data), *depends))
    missing = [request for request in requests if known.get(request.line_number) is None]
    if missing:
        with progress("decoding", len(requests), len(requests) - len(missing)) as advance:
            for trace in source.traces(missing, max_new_tokens):
                known.add(trace)
                advance()
    found = [known.get(request.line_number) for request in requests]
    return Traces.of([trace for trace in found if trace is not None])


def check_enough(traces: Traces, options: CalibrateOptions) -> None:
    """Raises CalibrationError, naming how many would do."""
    check_confidences(traces.confidence)
    if options.method == "risk":
        needed, given = sequences_needed(options.risk, options.delta), len(traces.sequences)
        if given < needed:
            raise CalibrationError(
                f"risk {options.risk:g} with delta {options.delta:g} needs at least {needed} sequences, the data have "
                f"{given}; give more samples, or a larger risk or delta"
            )
    if traces.tokens < LEAST_TOKENS:
        raise CalibrationError(
            f"the data give {traces.tokens} tokens that could exit, a threshold needs at least "
            f"{LEAST_TOKENS}; give more samples, or longer ones"
        )


def calibrate(
    source: Source, traces: Traces, costs: Costs, options: CalibrateOptions, outputs: Outputs | None = None
) -> Calibrated:
    """Choose the threshold on traces, and on `outputs` where a metric counts.

    Raises CalibrationError for too few traces, and NaN confidences; OptionError where a metric needs outputs.
    """
    check_enough(traces, options)
    return explained(choose(traces, options, outputs), source.facts, traces, costs, options)


def explained(
    choice: Choice,
    facts: Facts,
    traces: Traces,
    costs: Costs,
    options: CalibrateOptions,
    max_pending: int | None = None,
) -> Calibrated:
    """A threshold that was chosen by the method of the options, with what it gives; `max_pending` where that was chosen
    too."""
    most = max_pending or facts.max_pending
    threshold = choice.threshold
    limit = rollback_limit(traces, threshold)
    risk = options.method == "risk"
    calibration = Calibration(
        schema_version=CALIBRATION_VERSION,
        source_sha256=facts.source_sha256,
        vocab_size=facts.vocab_size,
        exit_layer=facts.exit_layer,
        confidence=facts.confidence,
        method=options.method,
        threshold=threshold,
        sequences=len(traces.sequences),
        positions=traces.tokens,
        agreement=traces.agreement,
        target={"bmm": options.target, "quality": options.quality}.get(options.method),
        risk=options.risk if risk else None,
        delta=options.delta if risk else None,
        rollback_threshold=limit,
        mixture=choice.mixture,
        table=_table(traces, costs, choice, most),
        costs=recordable(costs),
        created_with={"freeexport": __version__, "python": platform.python_version()},
        max_pending=max_pending if most < facts.max_pending else None,
    )
    return Calibrated(
        calibration,
        traces,
        costs,
        replay(traces, threshold, most),
        costs.break_even(most),
        facts.layers,
        most,
        None if limit is None else caught(traces, threshold, limit),
        facts.path,
        facts.trained,
        choice.notes,
    )


def _table(traces: Traces, costs: Costs, choice: Choice, max_pending: int) -> tuple[TableRow, ...]:
    thresholds = sorted({*TABLE, choice.threshold, *choice.quality})
    rows = [_row(traces, costs, threshold, max_pending) for threshold in thresholds]
    return tuple(replace(row, quality=choice.quality.get(row.threshold)) for row in rows)


def _row(traces: Traces, costs: Costs, threshold: float, max_pending: int) -> TableRow:
    done = replay(traces, threshold, max_pending)
    # Where nothing can exit, a session decodes as `full`.
    speedup = 1.0 if threshold >= NEVER_EXIT else done.speedup(costs)
    predicted = speedup if costs.trusted else None
    return TableRow(threshold, done.exit_rate, done.agreement, predicted_speedup=predicted)


def points(result: Calibrated) -> list[float]:
    """The few thresholds that are worth measuring: a low one, a high one, and the chosen one or one between."""
    chosen = result.calibration.threshold
    return sorted({0.5, 0.9, chosen if chosen < NEVER_EXIT else 0.7})


def with_measured(result: Calibrated, speedups: Mapping[float, float]) -> Calibrated:
    """The same with measured speedups, by threshold, in the table."""
    rows = result.calibration.table
    table = tuple(replace(row, measured_speedup=speedups.get(row.threshold)) for row in rows)
    return replace(result, calibration=replace(result.calibration, table=table))


def verdict_of(result: Calibrated) -> Verdict:
    """Whether exits pay at the threshold found."""
    return verdict(exit_facts(result))


def advice(result: Calibrated) -> str:
    """The verdict and the next step, in a line."""
    return str(verdict_of(result))


def exit_facts(result: Calibrated) -> ExitFacts:
    calibration, costs, sequences = result.calibration, result.costs, result.traces.sequences
    done = [replay(Traces.of([one]), calibration.threshold, result.max_pending) for one in sequences]
    exits = [one.exits for one in done]
    return ExitFacts(
        name=result.name,
        exit_layer=calibration.exit_layer,
        layers=result.layers,
        trained=result.trained,
        threshold=calibration.threshold,
        why_never=why_never(calibration),
        agreement=share([int(one.agrees.sum()) for one in sequences], [len(one) for one in sequences]),
        exit_rate=share(exits, [one.tokens for one in done]),
        exit_agreement=share([one.agreeing for one in done], exits),
        break_even=result.break_even,
        speedup=result.predicted,
        measured=next(row.measured_speedup for row in calibration.table if row.threshold == calibration.threshold),
        checkpoint=not costs.measured,
        basis="busy" if not costs.trusted else "measured" if costs.measured else "sizes",
    )
