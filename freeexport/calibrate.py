"""`freeexport calibrate`: a threshold from a few hundred examples, with what it gives and what it promises."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from freeexport.calibration_options import CalibrateOptions, FitMethod, data_path_problem
from freeexport.page import print_page
from runtime.errors import OptionError
from runtime.manifest import MANIFEST, ConfidenceMeasure

if TYPE_CHECKING:
    from freeexport.calibration import Calibrated
    from freeexport.calibration_source import Source

DEFAULT_OUTPUT = Path("calibration.json")


def calibrate_model(
    model: str, data: Path, options: CalibrateOptions, output: Path | None, threads: int | None = None
) -> Calibrated:
    """Calibrate a bundle or a checkpoint; `output` None is into the bundle, which is updated at once, or
    calibration.json here.

    Traces are kept beside the output, so that another method, or more samples, need not decode them again. Raises
    DataError, CalibrationError, CheckpointError, BundleError and OptionError.
    """
    from freeexport.bundle_update import update_bundle
    from freeexport.calibration import calibrate, collect, read_data

    problem = data_path_problem(data)
    if problem:
        raise OptionError(f"--data: {problem}")
    requests = read_data(data, options.samples)
    bundle = is_bundle(model)
    target = output if output is not None or bundle else DEFAULT_OUTPUT
    with _source(model, options, threads) as source:
        traces = collect(source, data, requests, cache_path(model, target), options.max_new_tokens)
        length = max(2, round(traces.tokens / max(1, len(traces.sequences))) + 1)
        result = calibrate(source, traces, source.costs(requests, length), options)
    if target is None:
        update_bundle(Path(model), result.calibration)
    else:
        _write(target, result.calibration.to_json())
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
def _source(model: str, options: CalibrateOptions, threads: int | None) -> Iterator[Source]:
    from freeexport.calibration_source import BundleSource, CheckpointSource

    if not is_bundle(model):
        from freeexport.checkpoint import open_checkpoint

        yield CheckpointSource(open_checkpoint(model), options)
        return
    for name in ("confidence", "exit_layer", "max_pending"):
        if getattr(options, name) is not None:
            raise OptionError(f"--{name.replace('_', '-')} is for checkpoints; a bundle has its own, fixed at convert")
    from runtime import Session

    # In turn, as costs are measured.
    with Session(model, slots=1, overlap=False, threads=threads) as session:
        yield BundleSource(Path(model), session)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@click.command()
@click.argument("model")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="JSONL with 'input' (and 'target').")
@click.option("--output", type=click.Path(path_type=Path),
              help="Write the calibration here.  [default: into the bundle, or calibration.json]")  # fmt: skip
@click.option("--samples", type=click.IntRange(1), default=CalibrateOptions.samples, show_default=True,
              help="First lines used.")  # fmt: skip
@click.option("--method", type=click.Choice(get_args(FitMethod)), default="bmm", show_default=True,
              help="bmm: by P(agree | confidence); risk: with a guarantee.")  # fmt: skip
@click.option("--target", type=float, default=CalibrateOptions.target, show_default=True,
              help="bmm: the share that must agree among tokens as sure as the threshold.")  # fmt: skip
@click.option("--risk", type=float, default=CalibrateOptions.risk, show_default=True,
              help="risk: the most loss of a sequence, on average.")  # fmt: skip
@click.option("--delta", type=float, default=CalibrateOptions.delta, show_default=True,
              help="risk: the chance that the promise is broken.")  # fmt: skip
@click.option("--max-new-tokens", type=click.IntRange(2), default=CalibrateOptions.max_new_tokens, show_default=True)
@click.option("--confidence", type=click.Choice(get_args(ConfidenceMeasure)),
              help="Checkpoints: the measure.  [default: softmax]")  # fmt: skip
@click.option("--exit-layer", type=int, help="Checkpoints: where the exit stands.  [default: as trained, exit.json]")
@click.option("--max-pending", type=click.IntRange(1), help="Checkpoints: most rows of a sync pass.  [default: 16]")
@click.option("--batch-size", type=click.IntRange(1), default=CalibrateOptions.batch_size, show_default=True,
              help="Checkpoints: sequences decoded at once.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1), help="Bundles.  [default: one per physical core]")
@click.option("--json", "as_json", is_flag=True, help="Print the calibration and the advice as JSON.")
def command(model: str, data: Path, output: Path | None, threads: int | None, as_json: bool, **options: Any) -> None:
    """Find the threshold of a bundle or a checkpoint, MODEL, on the lines of a JSONL file.

    The full model decodes each input; at every token the shallow decoder is asked too. A bundle is updated, whole or
    not at all; a checkpoint's calibration goes to `convert --calibration`. An interrupted run goes on where it was.

    \b
    Example:
      freeexport calibrate bundle --data calibration.jsonl
      freeexport calibrate bundle --data calibration.jsonl --method risk --risk 0.02 --delta 0.05
      freeexport calibrate path/to/checkpoint --data calibration.jsonl --output calibration.json
    """
    from freeexport.calibration import advice
    from freeexport.calibration_page import tables

    result = calibrate_model(model, data, CalibrateOptions(**options), output, threads)
    if as_json:
        notes = {"advice": advice(result), "notes": result.notes, "break_even": result.break_even}
        click.echo(json.dumps({**asdict(result.calibration), **notes}, indent=2))
        return
    print_page(tables(result))
    click.echo(advice(result))
