"""Calibration: collects traces of data, chooses a threshold and evaluates others."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from freeexport import __version__
from freeexport.calibrate.sources import collect, fitting_prompts, reference_of
from freeexport.calibrate.threshold import (
    Choice,
    DecodedOutputs,
    Rule,
    check_confidences,
    choose,
    rollback_limit,
    sequences_needed,
)
from freeexport.calibrate.traces import Replay, Traces, replay
from freeexport.checkpoints.examples import read_examples
from freeexport.costs import timing
from freeexport.costs.bytes import known_costs
from freeexport.costs.measured import SECONDS, ReplaySession, measured_costs
from freeexport.costs.verdict import ExitFacts, Verdict, basis_of, verdict, why_never
from freeexport.system.load import load_note, other_load
from freeexport.system.progress import duration
from runtime.bundle.beta import NEVER_EXIT
from runtime.bundle.calibration import CALIBRATION_VERSION, Calibration, TableRow
from runtime.bundle.costs import Costs, recordable
from runtime.bundle.manifest import ConfidenceMeasure, Manifest
from runtime.errors import CalibrationError
from runtime.machine.device import Device
from runtime.machine.machine import costs_here
from runtime.options.generation_options import Mode

# Time to decode a sequence at all thresholds that a rule compares, as a multiple of the time of its
# trace, for which both decoders run at every token.
OUTPUTS = 3
# Fewest tokens for a threshold.
MIN_TOKENS = 50
TABLE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
# Prompts per round of timing.
PROMPTS = 40


@dataclass(frozen=True)
class CalibrateOptions:
    """Options of a calibration, which freeexport/commands/calibrate.py describes."""

    rule: Rule = field(default_factory=Rule)
    samples: int = 500
    max_new_tokens: int = 128
    rounds: int = 0
    device: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        Device.parse(self.device)


@dataclass(frozen=True)
class CheckpointExit:
    """Facts of a checkpoint with an exit, as a manifest has them.

    Attributes:
        source_sha256: Hash of the checkpoint.
        vocab_size: Tokens of the vocabulary.
        exit_layer: Number of layers before the exit.
        confidence: Measure of the exit's confidence.
        max_pending: Most rows of a sync pass.
        exit_trained: The exit was trained.
    """

    source_sha256: str
    vocab_size: int
    layers: int
    exit_layer: int
    confidence: ConfidenceMeasure
    max_pending: int
    exit_trained: bool = True


@dataclass(frozen=True)
class Calibrated:
    """A calibration with the measurements that explain it.

    Attributes:
        path: Bundle or checkpoint, as given on the command line.
        manifest: Manifest of the bundle, or the same facts of a checkpoint.
        costs: Costs of decoding, for predicted speeds.
        chosen: Replay at the chosen threshold.
        caught: Share of disagreeing exits that mode rollback rejects. None if there are none.
        speeds: Measured tokens per second, of mode full and at the threshold. None if not timed.
        notes: Sentences for the user.
    """

    calibration: Calibration
    path: str
    manifest: Manifest | CheckpointExit
    traces: Traces
    costs: Costs
    chosen: Replay
    data: str = "FILE"
    caught: float | None = None
    speeds: tuple[float, float] | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def break_even(self) -> float | None:
        """Exit rate from which exits pay. None if they never do."""
        return self.costs.break_even(self.manifest.max_pending)

    @property
    def verdict(self) -> Verdict:
        """Verdict on the exit at the chosen threshold."""
        calibration = self.calibration
        traces = self.traces
        exits = self.chosen.exits
        return verdict(
            ExitFacts(
                name=self.path,
                exit_layer=calibration.exit_layer,
                layers=self.manifest.layers,
                trained=self.manifest.exit_trained,
                threshold=calibration.threshold,
                why_never=why_never(calibration),
                agreement=traces.share(traces.agrees),
                exit_rate=traces.share(exits),
                exit_agreement=traces.share(traces.agrees, exits),
                break_even=self.break_even,
                speedup=self.chosen.speedup(self.costs),
                measured=None if self.speeds is None else self.speeds[1] / self.speeds[0],
                basis=basis_of(self.costs),
                heavy_head=self.costs.head > self.costs.shallow_without_head,
                data=self.data,
            )
        )


def calibrate(model: str, data: Path, options: CalibrateOptions) -> Calibrated:
    """Calibrate a bundle.

    Writes only the traces, to a file beside the bundle. They are reused by later calibrations with
    another rule or more samples.

    Raises:
        DataError: If the data cannot be read.
        CalibrationError: If the data do not suffice for the rule.
        BundleError: If the bundle cannot be opened.
        OptionError: If options do not fit the bundle.
    """
    requests = read_examples(data, options.samples)
    beside = Path(os.path.abspath(model))
    check_sequences(len(requests), options.rule)  # before long work
    with ReplaySession(model, threads=options.threads, device=options.device) as session:
        cache = beside.with_name(f"{beside.name}.traces.jsonl")

        def estimate(each: float, left: int) -> None:
            outputs = OUTPUTS * len(requests) if options.rule.needs_outputs else 0
            seconds = each * (left + outputs) + SECONDS
            click.echo(f"about {duration(seconds)} for {len(requests)} sequences", err=True)

        traces = collect(
            session,
            data,
            requests,
            cache=cache,
            max_new_tokens=options.max_new_tokens,
            estimate=estimate,
        )
        check_enough(traces, options.rule)
        fitting = fitting_prompts(session, requests)
        prompts = [ids for _, ids in fitting]
        timed = measured_costs(session, prompts, traces.mean_length)
        costs = (
            known_costs(session.bundle, timed, costs_here(session.manifest, session.threads))
            or timed
        )
        outputs = None
        if options.rule.needs_outputs:
            # Compare with the references if every line has one, or else with the full model.
            found = [
                reference
                for request, _ in fitting
                if (reference := reference_of(request)) is not None
            ]
            targets = found if len(found) == len(fitting) else None
            outputs = DecodedOutputs(session, prompts, targets, options.max_new_tokens)
        choice = choose(traces, options.rule, outputs)
        result = explained(
            choice,
            model,
            session.manifest,
            traces=traces,
            costs=costs,
            rule=options.rule,
            data=str(data),
        )
        if not timed.trusted:
            result = replace(result, notes=(*result.notes, busy_note(timed, costs)))
        return _timed(session, prompts[:PROMPTS], result, options) if options.rounds else result


def check_enough(traces: Traces, rule: Rule) -> None:
    """Check that there are enough tokens and sequences for a rule."""
    check_confidences(traces.confidence)
    check_sequences(len(traces.length), rule)
    if traces.tokens < MIN_TOKENS:
        raise CalibrationError(
            f"the data give {traces.tokens} tokens that could exit, a threshold needs at least "
            f"{MIN_TOKENS}; give more samples, or longer ones"
        )


def check_sequences(given: int, rule: Rule) -> None:
    """Check that there are enough sequences for a rule."""
    needed = sequences_needed(rule.risk, rule.delta) if rule.method == "risk" else 0
    if given < needed:
        raise CalibrationError(
            f"risk {rule.risk:g} with delta {rule.delta:g} needs at least {needed} sequences, "
            f"the data have {given}; give more samples, or a larger risk or delta"
        )


def explained(
    choice: Choice,
    path: str,
    manifest: Manifest | CheckpointExit,
    traces: Traces,
    costs: Costs,
    rule: Rule,
    data: str = "FILE",
) -> Calibrated:
    """Build the calibration of a choice, with exit rates and predicted speeds by threshold."""
    threshold = choice.threshold
    limit, caught = rollback_limit(traces, threshold)
    replays = {
        one: replay(traces, one, manifest.max_pending)
        for one in sorted({*TABLE, threshold, *choice.quality})
    }
    calibration = Calibration(
        schema_version=CALIBRATION_VERSION,
        source_sha256=manifest.source_sha256,
        vocab_size=manifest.vocab_size,
        exit_layer=manifest.exit_layer,
        confidence=manifest.confidence,
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
            TableRow(
                one,
                done.exit_rate,
                done.agreement,
                quality=choice.quality.get(one),
                predicted_speedup=done.speedup(costs),
            )
            for one, done in replays.items()
        ),
        costs=recordable(costs),
        created_with={"freeexport": __version__, "python": platform.python_version()},
    )
    return Calibrated(
        calibration,
        path,
        manifest,
        traces=traces,
        costs=costs,
        chosen=replays[threshold],
        data=data,
        caught=caught,
        notes=choice.notes,
    )


def busy_note(timed: Costs, used: Costs) -> str:
    """Explain that the machine was busy, and on what predictions are based instead."""
    instead = "the times that convert took" if used.measured else "the bytes that are read"
    predicted = (
        "predictions are uncertain" if used is timed else f"speeds are predicted by {instead}"
    )
    return (
        f"other processes kept {timed.busy:.1f} cores busy while the engines were timed: "
        f"{predicted}; the threshold does not depend on them"
    )


def _timed(
    session: ReplaySession, prompts: Sequence[Any], result: Calibrated, options: CalibrateOptions
) -> Calibrated:
    """Add measured speeds of mode full, and of mode free at the threshold and a few others."""
    chosen = result.calibration.threshold
    settings: list[float | None] = [
        None,
        *sorted({chosen if chosen < NEVER_EXIT else 0.7, 0.5, 0.9}),
    ]

    def decode(threshold: float | None, prompt: Any) -> tuple[int, float]:
        mode: Mode = "full" if threshold is None else "free"
        stats = session.generate(
            prompt, mode=mode, threshold=threshold, max_new_tokens=options.max_new_tokens
        ).stats
        return stats.candidates, stats.seconds - stats.encode_seconds - stats.prefill_seconds

    with other_load() as load:
        full, *speeds = timing.speeds_by_round(settings, prompts, options.rounds, decode).T
    known = {
        at: speed
        for at, speed in zip(settings[1:], speeds, strict=True)
        if np.isfinite(speed).all()
    }
    ratio = {at: float(np.median(speed / full)) for at, speed in known.items()}
    table = tuple(
        replace(row, measured_speedup=ratio.get(row.threshold)) for row in result.calibration.table
    )
    spreads = [
        timing.spread(speed.tolist())
        for speed in (full, *known.values())
        if np.isfinite(speed).all()
    ]
    spread = f"measured speeds vary by up to {max(spreads, default=0.0):.0%} from round to round"
    return replace(
        result,
        calibration=replace(result.calibration, table=table),
        speeds=(float(np.median(full)), float(np.median(known[chosen])))
        if chosen in ratio
        else None,
        notes=(*result.notes, spread, *filter(None, [load_note(load.cores)])),
    )
