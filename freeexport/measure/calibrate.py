"""From data to a threshold: collect traces, choose by a rule, say what thresholds give, and compare bundles."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from freeexport import __version__
from freeexport.checkpoints.examples import read_examples
from freeexport.measure import timing
from freeexport.measure.exit_verdict import ExitFacts, Verdict, verdict, why_never
from freeexport.measure.sources import (
    BundleSource,
    Facts,
    Source,
    check_same_model,
    collect,
    is_bundle,
    open_sources,
    reference_of,
)
from freeexport.measure.threshold import (
    Choice,
    DecodedOutputs,
    Rule,
    check_confidences,
    choose,
    rollback_limit,
    sequences_needed,
)
from freeexport.measure.traces import Replay, Traces, replay
from freeexport.system.jsonl import Request
from runtime.bundle.beta import NEVER_EXIT
from runtime.bundle.calibration import CALIBRATION_VERSION, Calibration, TableRow
from runtime.bundle.costs import Costs, recordable
from runtime.errors import CalibrationError, OptionError
from runtime.machine.device import Device
from runtime.options import Mode

# Fewer say nothing about a threshold.
LEAST_TOKENS = 50
TABLE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
# Prompts a round of timing: enough for a median, few enough to wait for; and rounds where bundles are compared.
PROMPTS, ROUNDS = 40, 3
# Sync passes of fewer rows must be predicted to be so much faster than the bundle's to be preferred.
PENDING, FASTER = (2, 4, 8, 16, 32), 1.02


@dataclass(frozen=True)
class CalibrateOptions:
    """`samples`: first lines of the data. `rounds` of timing, interleaved with mode full: 0 is none for one bundle, and
    ROUNDS for several. `exit_layer` is for checkpoints, None as exit.json says."""

    rule: Rule = field(default_factory=Rule)
    samples: int = 500
    max_new_tokens: int = 128
    rounds: int = 0
    exit_layer: int | None = None
    device: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        Device.parse(self.device)


@dataclass(frozen=True)
class Calibrated:
    """`calibration` is what is written; the rest explains it. `chosen` is the replay at its threshold. `speeds` are
    measured, in tokens per second: of mode full and at the threshold, None where nothing was timed. `caught` is the
    share of wrong exits that mode rollback takes back. `notes` are sentences that the user should read."""

    calibration: Calibration
    facts: Facts
    traces: Traces
    costs: Costs
    chosen: Replay
    max_pending: int
    data: str = "FILE"
    caught: float | None = None
    speeds: tuple[float, float] | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def break_even(self) -> float | None:
        return self.costs.break_even(self.max_pending)

    @property
    def verdict(self) -> Verdict:
        """Whether exits pay at the threshold found."""
        calibration, traces, exits = self.calibration, self.traces, self.chosen.exits
        return verdict(
            ExitFacts(
                name=self.facts.path,
                exit_layer=calibration.exit_layer,
                layers=self.facts.layers,
                trained=self.facts.trained,
                threshold=calibration.threshold,
                why_never=why_never(calibration),
                agreement=traces.share(traces.agrees),
                exit_rate=traces.share(exits),
                exit_agreement=traces.share(traces.agrees, exits),
                break_even=self.break_even,
                speedup=self.chosen.speedup(self.costs),
                measured=None if self.speeds is None else self.speeds[1] / self.speeds[0],
                basis="sizes" if not self.costs.measured else "measured" if self.costs.trusted else "busy",
                checkpoint=not self.costs.measured,
                heavy_head=self.costs.head > self.costs.shallow_without_head,
                data=self.data,
            )
        )


@dataclass(frozen=True)
class Comparison:
    """Bundles of one model, calibrated. `best` is the number of the fastest, None where no exit is faster than the
    fastest mode full, `full` tokens per second."""

    results: tuple[Calibrated, ...]
    best: int | None
    full: float

    @property
    def advice(self) -> str:
        if self.best is None:
            fastest = max((one.speeds[1] for one in self.results if one.speeds is not None), default=0.0)
            return f"use mode full: the fastest exit was measured at {fastest / self.full:.2f}x its speed"
        one = self.results[self.best]
        assert one.speeds is not None
        rows = "" if one.calibration.max_pending is None else f", max_pending {one.calibration.max_pending}"
        return (
            f"{one.facts.path}, exit layer {one.facts.exit_layer} of {one.facts.layers}, threshold "
            f"{one.calibration.threshold:.4g}{rows}: {one.speeds[1] / self.full:.2f}x the fastest full model's speed"
        )


def calibrate(models: Sequence[str], data: Path, options: CalibrateOptions, output: Path | None = None) -> Comparison:
    """Calibrate a checkpoint, a bundle, or several, and write nothing but the traces, which are kept beside the
    `output` or the bundle: another rule, or more samples, need not decode them again.

    Raises DataError, CalibrationError, CheckpointError, BundleError and OptionError.
    """
    requests = read_examples(data, options.samples)
    if options.rule.needs_outputs and not is_bundle(models[0]):
        raise OptionError("a metric compares what mode free writes, which needs a bundle: convert, then calibrate that")
    if options.rounds and not is_bundle(models[0]):
        raise OptionError("--rounds times engines, which a checkpoint has not: convert, then calibrate the bundle")
    with open_sources(models, options.exit_layer, options.device, options.threads) as sources:
        several = len(sources) > 1
        bundles = [one for one in sources if isinstance(one, BundleSource)]
        if several:
            for bundle in bundles:  # lines that fit all
                requests = [request for request, _ in bundle.prompts(requests)]
            check_same_model(bundles, requests, options.max_new_tokens)
            # Each bundle is a chance to fail: together they have delta.
            rule = replace(options.rule, delta=options.rule.delta / len(sources))
            options = replace(options, rounds=options.rounds or ROUNDS, rule=rule)
        results = []
        for source in sources:
            # Beside the file that is written, or beside the bundle.
            beside = Path(os.path.abspath(source.facts.path))
            if output is not None and not is_bundle(source.facts.path):
                beside = output
            cache = beside.with_name(f"{beside.name}.traces.jsonl")
            traces = collect(source, data, requests, cache, options.max_new_tokens)
            check_enough(traces, options.rule)
            costs = source.costs(requests, traces.mean_length)
            choice = choose(traces, options.rule, _outputs(source, requests, options))
            most = fastest_rows(traces, choice.threshold, costs, source.facts.max_pending) if several else None
            results.append(explained(choice, source.facts, traces, costs, options.rule, most, str(data)))
        if options.rounds:
            results = _timed(bundles, results, requests, options)
    full = max((one.speeds[0] for one in results if one.speeds is not None), default=float("nan"))
    exits = [0.0 if one.speeds is None else one.speeds[1] for one in results]
    best = int(np.argmax(exits)) if max(exits) > full else None
    return Comparison(tuple(results), best if several else 0, full)


def _outputs(source: Source, requests: Sequence[Request], options: CalibrateOptions) -> DecodedOutputs | None:
    """The outputs of rules that compare them; against the data's references where every line has one."""
    if not (options.rule.needs_outputs and isinstance(source, BundleSource)):
        return None
    fitting = source.prompts(requests)
    found = [reference for request, _ in fitting if (reference := reference_of(request)) is not None]
    targets = found if len(found) == len(fitting) else None
    return DecodedOutputs(source.session, [ids for _, ids in fitting], targets, options.max_new_tokens)


def check_enough(traces: Traces, rule: Rule) -> None:
    """Raises CalibrationError, naming how many would do."""
    check_confidences(traces.confidence)
    if rule.method == "risk":
        needed, given = sequences_needed(rule.risk, rule.delta), len(traces.length)
        if given < needed:
            raise CalibrationError(
                f"risk {rule.risk:g} with delta {rule.delta:g} needs at least {needed} sequences, the data have "
                f"{given}; give more samples, or a larger risk or delta"
            )
    if traces.tokens < LEAST_TOKENS:
        raise CalibrationError(
            f"the data give {traces.tokens} tokens that could exit, a threshold needs at least "
            f"{LEAST_TOKENS}; give more samples, or longer ones"
        )


def fastest_rows(traces: Traces, threshold: float, costs: Costs, most: int) -> int | None:
    """The rows of sync passes that are predicted to be clearly faster than the bundle's; None where none are. Fewer
    rows force more deep predictions: they cost no quality."""
    speed = {rows: replay(traces, threshold, rows).speedup(costs) for rows in (*PENDING, most) if rows <= most}
    best = max(speed, key=lambda rows: speed[rows])
    return best if speed[best] > FASTER * speed[most] else None


def explained(
    choice: Choice,
    facts: Facts,
    traces: Traces,
    costs: Costs,
    rule: Rule,
    max_pending: int | None = None,
    data: str = "FILE",
) -> Calibrated:
    """A choice with what it gives; `max_pending` where that was chosen too."""
    most, threshold = max_pending or facts.max_pending, choice.threshold
    limit, caught = rollback_limit(traces, threshold)
    replays = {one: replay(traces, one, most) for one in sorted({*TABLE, threshold, *choice.quality})}
    calibration = Calibration(
        schema_version=CALIBRATION_VERSION,
        source_sha256=facts.source_sha256,
        vocab_size=facts.vocab_size,
        exit_layer=facts.exit_layer,
        confidence=facts.confidence,
        method=rule.method,
        threshold=threshold,
        sequences=len(traces.length),
        positions=traces.tokens,
        agreement=traces.agreement,
        target=rule.target,
        risk=rule.risk if rule.method == "risk" else None,
        delta=rule.delta if rule.method in ("risk", "quality") else None,
        rollback_threshold=limit,
        mixture=choice.mixture,
        table=tuple(
            TableRow(one, done.exit_rate, done.agreement, choice.quality.get(one), done.speedup(costs))
            for one, done in replays.items()
        ),
        costs=recordable(costs),
        created_with={"freeexport": __version__, "python": platform.python_version()},
        max_pending=max_pending,
    )
    busy = (
        f"other processes kept {costs.busy:.1f} cores busy while the engines were timed: predictions are uncertain, "
        "the threshold does not depend on them"
    )
    notes = (*choice.notes, *([] if costs.trusted else [busy]))
    return Calibrated(calibration, facts, traces, costs, replays[threshold], most, data, caught, notes=notes)


def _timed(
    sources: Sequence[BundleSource],
    results: Sequence[Calibrated],
    requests: Sequence[Request],
    options: CalibrateOptions,
) -> list[Calibrated]:
    """The results with measured speeds, all bundles in turn; for one bundle at a few more thresholds, too."""
    # Mode full, None, or free at a threshold, of the bundle with that number.
    settings: list[tuple[int, float | None]] = []
    for number, one in enumerate(results):
        chosen = one.calibration.threshold
        others = {0.5, 0.9} if len(results) == 1 else set()
        free = sorted({chosen if chosen < NEVER_EXIT else 0.7, *others})
        settings += [(number, None), *((number, value) for value in free)]

    def decode(setting: tuple[int, float | None], prompt: np.ndarray) -> tuple[int, float]:
        number, threshold = setting
        mode: Mode = "full" if threshold is None else "free"
        given: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "max_pending": results[number].max_pending}
        stats = sources[number].session.generate(prompt, mode=mode, threshold=threshold, **given).stats
        return stats.candidates, stats.seconds - stats.encode_seconds - stats.prefill_seconds

    prompts = [ids for _, ids in sources[0].prompts(requests)][:PROMPTS]
    with timing.other_load() as load:
        speeds = timing.speeds(settings, prompts, options.rounds, decode)
    timed = []
    for number, one in enumerate(results):
        own = {at: speeds[:, place] for place, (bundle, at) in enumerate(settings) if bundle == number}
        full = own.pop(None)
        known = {at: speed for at, speed in own.items() if np.isfinite(speed).all()}
        ratio = {at: float(np.median(speed / full)) for at, speed in known.items()}
        table = tuple(replace(row, measured_speedup=ratio.get(row.threshold)) for row in one.calibration.table)
        chosen = one.calibration.threshold
        spreads = [timing.spread(speed.tolist()) for speed in (full, *known.values()) if np.isfinite(speed).all()]
        spread = f"measured speeds vary by up to {max(spreads, default=0.0):.0%} from round to round"
        timed.append(
            replace(
                one,
                calibration=replace(one.calibration, table=table),
                speeds=(float(np.median(full)), float(np.median(own[chosen]))) if chosen in ratio else None,
                notes=(*one.notes, spread, *filter(None, [timing.load_note(load.cores)])),
            )
        )
    return timed
