"""Calibration of what the command line names: a bundle or a checkpoint is opened, traced and calibrated."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from freeexport.calibration.options import CalibrateOptions
from freeexport.checkpoints.examples import read_examples
from freeexport.system.idle import cores_in_use
from runtime.bundle.manifest import MANIFEST
from runtime.errors import OptionError

if TYPE_CHECKING:
    from freeexport.calibration.calibrate import Calibrated
    from freeexport.calibration.source import Source

BUSY = (
    "speedups are not measured: machine busy; run the same command again on an idle machine (nothing is decoded "
    "again). The threshold does not depend on them"
)


def calibrate_model(
    model: str, data: Path, options: CalibrateOptions, output: Path | None = None, threads: int | None = None
) -> Calibrated:
    """Calibrate a bundle or a checkpoint, and write nothing but the traces, which are kept beside the `output`: another
    method, or more samples, need not decode them again.

    Raises DataError, CalibrationError, CheckpointError, BundleError and OptionError.
    """
    from freeexport.calibration.calibrate import calibrate, check_enough, collect, points, with_measured

    requests = read_examples(data, options.samples)
    with open_source(model, options, threads) as source:
        outputs = source.outputs(requests, options.max_new_tokens) if options.needs_outputs else None
        if options.measure:
            source.check_speed()
        traces = collect(source, data, requests, cache_path(model, output), options.max_new_tokens)
        check_enough(traces, options)
        # Timings beside other work mean nothing, but the threshold does not depend on them.
        busy = cores_in_use() if is_bundle(model) else 0.0
        costs = replace(source.costs(requests, traces.mean_length), busy=busy)
        result = calibrate(source, traces, costs, options, outputs)
        if not costs.trusted:
            return replace(result, notes=(*result.notes, BUSY))
        if options.measure:
            found = source.speedups(requests, points(result), options.max_new_tokens, options.rounds)
            result = with_measured(result, found)
        return result


def is_bundle(model: str) -> bool:
    return (Path(model) / MANIFEST).is_file()


def cache_path(model: str, output: Path | None) -> Path:
    """Where traces are kept: beside the file that is written, or beside the bundle."""
    if output is not None:
        return output.with_name(f"{output.name}.traces.jsonl")
    bundle = Path(os.path.abspath(model))
    return bundle.with_name(f"{bundle.name}.traces.jsonl")


@contextmanager
def open_source(model: str, options: CalibrateOptions, threads: int | None = None) -> Iterator[Source]:
    """What MODEL names. Raises OptionError for options that it does not have."""
    from freeexport.calibration.source import BundleSource, CheckpointSource

    if not is_bundle(model):
        from freeexport.checkpoints.checkpoint import open_checkpoint

        yield CheckpointSource(open_checkpoint(model), options)
        return
    for name in ("confidence", "exit_layer", "max_pending", "dtype"):
        if getattr(options, name) is not None:
            raise OptionError(f"--{name.replace('_', '-')} is for checkpoints; a bundle has its own, fixed at convert")
    from freeexport.costs.forced_exits import ForcedExitSession

    with ForcedExitSession(model, slots=1, threads=threads, device=options.device) as session:
        yield BundleSource(Path(model), session)
