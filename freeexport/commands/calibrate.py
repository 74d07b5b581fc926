"""`freeexport calibrate`: a threshold from a few hundred examples, with what it gives and what it guarantees."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from freeexport.calibration.open_source import calibrate_model, is_bundle
from freeexport.calibration.options import CalibrateOptions
from freeexport.checkpoints.transformers_model import Dtype
from freeexport.commands.verb_options import (
    CONFIDENCES,
    DEVICE,
    MAX_NEW_TOKENS,
    METRICS,
    SAMPLES,
    MetricName,
    RenamedOption,
    SectionedCommand,
    section,
)
from freeexport.system.output_file import write_whole
from freeexport.system.page import print_page
from runtime.bundle.calibration import Method
from runtime.bundle.manifest import ConfidenceMeasure

if TYPE_CHECKING:
    from freeexport.calibration.calibrate import Calibrated

DEFAULT_OUTPUT = Path("calibration.json")


def write(result: Calibrated, model: str, output: Path | None) -> None:
    """To the file `output`; None is into the bundle, which is the old one until it is the new one."""
    from freeexport.conversion.recalibrate import update_bundle

    if output is None:
        update_bundle(Path(model), result.calibration)
        return
    write_whole(output, result.calibration.to_json())


@click.command(cls=SectionedCommand)
@click.argument("model")
@section("Data")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="JSONL with 'input' (and 'target').")
@click.option("--samples", type=click.IntRange(1), default=CalibrateOptions.samples, help=SAMPLES)
@click.option("--max-new-tokens", type=click.IntRange(2), default=CalibrateOptions.max_new_tokens, help=MAX_NEW_TOKENS)
@section("How the threshold is chosen")
@click.option("--method", type=click.Choice(get_args(Method)), default="bmm",
              help="bmm: by P(agree | confidence). risk: the loss of a sequence, with a guarantee. quality: by "
              "decoding at thresholds and comparing the outputs.")  # fmt: skip
@click.option("--agreement", "target", cls=RenamedOption, old="--target", type=float,
              default=CalibrateOptions.target,
              help="bmm: the share of tokens at the threshold that must agree.")  # fmt: skip
@click.option("--risk", type=float, default=CalibrateOptions.risk, help="risk: maximum mean loss of a sequence.")
@click.option("--delta", type=float, default=CalibrateOptions.delta, help="risk: probability that the guarantee fails.")
@click.option("--target-quality", type=float,
              help="quality: the share of the full model's metric to keep.  [default: 0.99]")  # fmt: skip
@click.option("--metric", type=MetricName(),
              help=f"risk, quality: compares outputs. {METRICS}  [default: tokens; exact for quality]")  # fmt: skip
@section("Where MODEL is a checkpoint")
@click.option("--confidence", type=click.Choice(get_args(ConfidenceMeasure)), help=f"{CONFIDENCES}  [default: softmax]")
@click.option("--exit-layer", type=int, help="Exit after this layer.  [default: as trained, exit.json]")
@click.option("--max-pending", type=click.IntRange(1), help="Maximum tokens in a sync pass.  [default: 16]")
@click.option("--batch-size", type=click.IntRange(1), default=CalibrateOptions.batch_size,
              help="Lines to decode at once.")  # fmt: skip
@click.option("--dtype", type=click.Choice(get_args(Dtype)), help="Type of the weights in torch.  [default: float32]")
@section("Where MODEL is a bundle")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: one per physical core]")
@click.option("--measure", is_flag=True, help="Time decoding at three thresholds, on an idle machine.")
@click.option("--rounds", type=click.IntRange(1), default=CalibrateOptions.rounds,
              help="Interleaved rounds of --measure.")  # fmt: skip
@section("Machine")
@click.option("--device", default=CalibrateOptions.device, help=DEVICE)
@section("Results")
@click.option("--output", type=click.Path(path_type=Path),
              help="Write the calibration here.  [default: into the bundle, or calibration.json]")  # fmt: skip
@click.option("--report", type=click.Path(path_type=Path), help="Write a page with pictures to this directory.")
@click.option("--json", "as_json", is_flag=True, help="Print the calibration and the advice as JSON.")
def command(
    model: str,
    data: Path,
    output: Path | None,
    threads: int | None,
    target_quality: float | None,
    report: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Find the threshold of a bundle or a checkpoint, MODEL, on the lines of a JSONL file.

    The full model decodes each input, and the shallow decoder runs at every token. A bundle is updated atomically; a
    checkpoint's calibration is for `convert --calibration`. An interrupted run continues where it stopped.

    \b
    Example:
      freeexport calibrate bundle --data calibration.jsonl
      freeexport calibrate bundle --data calibration.jsonl --method risk --risk 0.02 --delta 0.05
      freeexport calibrate bundle --data calibration.jsonl --target-quality 0.99 --metric rouge-l --report report
      freeexport calibrate path/to/checkpoint --data calibration.jsonl --output calibration.json
    """
    from freeexport.calibration import report as calibration_report
    from freeexport.calibration.calibrate import advice, verdict_of
    from freeexport.calibration.page import tables

    if target_quality is not None:
        if options["method"] == "risk":
            raise click.UsageError("--target-quality and --method risk are two ways to choose; leave one out")
        options.update(method="quality", quality=target_quality)
    target = DEFAULT_OUTPUT if output is None and not is_bundle(model) else output
    if report is not None:
        calibration_report.check(report)
    result = calibrate_model(model, data, CalibrateOptions(**options), target, threads)
    if report is not None:
        calibration_report.write(result, report)
    write(result, model, target)
    if as_json:
        even = result.break_even if result.costs.trusted else None
        explained = {"verdict": asdict(verdict_of(result)), "advice": advice(result), "notes": result.notes}
        click.echo(json.dumps({**asdict(result.calibration), **explained, "break_even": even}, indent=2))
        return
    print_page(tables(result))
    click.echo(advice(result))
