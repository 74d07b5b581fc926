"""Tuning: the exit layer, the threshold and the max_pending that are fastest at a wanted quality."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from freeexport.calibration.beta_fit import fit
from freeexport.calibration.calibrate import Calibrated, check_enough, collect, explained, with_measured
from freeexport.calibration.choose import Choice
from freeexport.calibration.open_source import cache_path
from freeexport.calibration.options import CalibrateOptions
from freeexport.calibration.outputs import Outputs
from freeexport.calibration.source import BundleSource
from freeexport.checkpoints.examples import read_examples
from freeexport.costs.threshold_speed import Setting, speeds_in_turn
from freeexport.system.idle import is_idle, require_idle
from freeexport.system.jsonl import Request
from freeexport.tuning.bundles import Entry, check_same_model, opened, split
from freeexport.tuning.grid import Point, apart, first_passing, front, grid
from freeexport.tuning.options import TuneOptions


@dataclass(frozen=True)
class Candidate:
    """`quality`: what it keeps of the full model's metric on the sequences held out; `searched`: on those it was chosen
    by, None where it was not decoded there. `measured`: times the speed of mode full of its bundle; `speed`: tokens per
    second; `gain`: times the speed of the fastest mode full."""

    point: Point
    searched: float | None
    quality: float
    measured: float
    speed: float
    gain: float


@dataclass(frozen=True)
class Tuned:
    """`choice` is None where mode full is best, and `reason` says why. `calibrated` is the choice's. `sequences` chose,
    `held_out` others judged. `full`: tokens per second of the fastest mode full, NaN where nothing was timed."""

    options: TuneOptions
    entries: tuple[Entry, ...]
    candidates: tuple[Candidate, ...]
    choice: Candidate | None
    reason: str
    calibrated: Calibrated | None
    sequences: int
    held_out: int
    full: float
    idle: bool

    @property
    def chosen_bundle(self) -> Path | None:
        return None if self.choice is None else self.entries[self.choice.point.bundle].path


class Texts:
    """What bundles write for the same requests, and how much of the full model's metric that keeps."""

    def __init__(self, entries: Sequence[Entry], requests: Sequence[Request], options: TuneOptions) -> None:
        self._options = options
        self._outputs: list[Outputs] = [entry.source.outputs(requests, options.max_new_tokens) for entry in entries]
        self.known: dict[Point, float] = {}

    def kept(self, point: Point) -> float:
        if point not in self.known:
            self.known[point] = self._outputs[point.bundle].kept(
                self._options.metric, point.threshold, max_pending=point.max_pending
            )
        return self.known[point]

    def passes(self, point: Point) -> bool:
        return self.kept(point) >= self._options.quality


def tune(paths: Sequence[Path], data: Path, options: TuneOptions) -> Tuned:
    """Writes nothing but the traces, beside each bundle.

    Raises BusyMachineError, DataError, CalibrationError, BundleError, and OptionError for bundles that do not go
    together and for too few samples.
    """
    requests = read_examples(data, options.samples)
    idle = require_idle(options.force)
    with opened(paths, options.threads, options.device) as sources:
        chosen_by, held_out = split(sources, requests)
        check_same_model(sources, chosen_by, options.max_new_tokens)
        entries = [_entry(source, data, chosen_by, options) for source in sources]
        points = front([point for number, entry in enumerate(entries) for point in _grid(number, entry)])
        texts = Texts(entries, chosen_by, options)
        first = first_passing(points, texts.passes)
        few = [] if first is None else apart(points[first:], options.candidates)
        candidates, full = _judged(entries, few, texts, held_out, options) if few else ([], math.nan)
        idle = idle and is_idle()
    good = [one for one in candidates if one.quality >= options.quality]
    fastest = max(good, key=lambda one: one.speed, default=None)
    choice = fastest if fastest is not None and fastest.gain > 1 else None
    return Tuned(
        options,
        tuple(entries),
        tuple(candidates),
        choice,
        "" if choice else _why_full(points, candidates, fastest, options),
        None if choice is None else _calibrated(entries[choice.point.bundle], choice, candidates, options),
        len(chosen_by),
        len(held_out),
        full,
        idle,
    )


def _entry(source: BundleSource, data: Path, requests: Sequence[Request], options: TuneOptions) -> Entry:
    """One collecting run, and the costs of this bundle here."""
    traces = collect(source, data, requests, cache_path(str(source.path), None), options.max_new_tokens)
    check_enough(traces, CalibrateOptions())
    return Entry(source, traces, source.costs(requests, traces.mean_length))


def _grid(number: int, entry: Entry) -> list[Point]:
    return grid(number, entry.traces, entry.costs, entry.manifest.max_pending)


def _judged(
    entries: Sequence[Entry],
    points: Sequence[Point],
    chosen_by: Texts,
    held_out: Sequence[Request],
    options: TuneOptions,
) -> tuple[list[Candidate], float]:
    """Decode the points on sequences not used for the choice, then time them in turn with the full models of all
    bundles: candidates, and the speed of the fastest full model."""
    unseen = Texts(entries, held_out, options)
    quality = [unseen.kept(point) for point in points]
    full = [Setting(entry.source.session) for entry in entries]
    settings = [Setting(entries[one.bundle].source.session, one.threshold, one.max_pending) for one in points]
    prompts = [ids for _, ids in entries[0].source.prompts(held_out)]
    if not options.force:
        require_idle(force=False)
    speeds = speeds_in_turn([*full, *settings], prompts, options.max_new_tokens, options.rounds)
    base, taken = speeds[:, : len(full)], speeds[:, len(full) :]
    own = base[:, [point.bundle for point in points]]
    columns = (np.median(values, axis=0) for values in (taken / own, taken, taken / base.max(axis=1, keepdims=True)))
    rows = zip(points, quality, *columns, strict=True)
    found = [
        Candidate(point, chosen_by.known.get(point), kept, float(measured), float(speed), float(gain))
        for point, kept, measured, speed, gain in rows
    ]
    return found, float(np.median(base, axis=0).max())


def _why_full(
    points: Sequence[Point], candidates: Sequence[Candidate], fastest: Candidate | None, options: TuneOptions
) -> str:
    kept = f"{options.quality:.4g} of the full model's {options.metric}"
    if not points:
        return "exits are predicted to cost more than they save, at every threshold"
    if not candidates:
        return f"no choice that is faster than the full model keeps {kept}"
    if fastest is None:
        return f"no choice that seemed to keep {kept} keeps it on the sequences held out"
    return f"of those that keep {kept}, the fastest was measured at {fastest.gain:.2f}x the full model's speed"


def _calibrated(entry: Entry, chosen: Candidate, candidates: Sequence[Candidate], options: TuneOptions) -> Calibrated:
    """The choice as `freeexport calibrate` would record it, measured speed included."""
    point = chosen.point
    alike = [
        one for one in candidates if (one.point.bundle, one.point.max_pending) == (point.bundle, point.max_pending)
    ]
    given = CalibrateOptions(method="quality", quality=options.quality, metric=options.metric)
    mixture = fit(entry.traces.confidence, entry.traces.agrees, given.target).mixture
    choice = Choice(point.threshold, mixture, {one.point.threshold: one.quality for one in alike})
    facts = entry.source.facts
    result = explained(choice, facts, entry.traces, entry.costs, given, point.max_pending)
    return with_measured(result, {one.point.threshold: one.measured for one in alike})
