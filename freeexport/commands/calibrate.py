"""`freeexport calibrate`: a threshold from a few hundred examples, with what it gives and what it guarantees."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from freeexport.commands.verb_options import (
    DEVICE,
    MAX_NEW_TOKENS,
    METRICS,
    SAMPLES,
    MetricName,
    SectionedCommand,
    section,
)
from freeexport.measure.calibrate import CalibrateOptions
from freeexport.measure.sources import is_bundle
from freeexport.measure.threshold import Rule
from freeexport.system.output import write_whole
from freeexport.system.page import print_page
from runtime.bundle.calibration import Method

if TYPE_CHECKING:
    from freeexport.measure.calibrate import Comparison

DEFAULT_OUTPUT = Path("calibration.json")
# Options that belong to one rule: giving one chooses it.
_IMPLIED: dict[str, Method] = {"agreement": "bmm", "zeta": "paper", "risk": "risk", "quality": "quality"}


@click.command(cls=SectionedCommand)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@section("Data")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="JSONL with 'input' (and 'target').")
@click.option("--samples", type=click.IntRange(1), default=CalibrateOptions.samples, help=SAMPLES)
@click.option("--max-new-tokens", type=click.IntRange(2), default=CalibrateOptions.max_new_tokens, help=MAX_NEW_TOKENS)
@section("How the threshold is chosen")
@click.option("--rule", "method", type=click.Choice(get_args(Method)),
              help="bmm: by P(agree | confidence). paper: the likelihood ratio, as FREE's authors run it. risk: the "
              "loss of a sequence, with a guarantee. quality: by decoding, with a guarantee.  [default: bmm, or that "
              "of the option below]")  # fmt: skip
@click.option("--agreement", type=float, help="bmm: the share of tokens at the threshold that must agree.  [default: "
              f"{Rule.agreement}]")  # fmt: skip
@click.option("--zeta", type=float, help=f"paper: what the likelihood ratio must exceed.  [default: {Rule.zeta}]")
@click.option("--risk", type=float, help=f"risk: maximum mean loss of a sequence.  [default: {Rule.risk}]")
@click.option("--target-quality", "quality", type=float,
              help=f"quality: the share of the full model's metric to keep.  [default: {Rule.quality}]")  # fmt: skip
@click.option("--delta", type=float, default=Rule.delta,
              help="risk, quality: probability that the guarantee fails.")  # fmt: skip
@click.option("--metric", type=MetricName(),
              help=f"Compares outputs. {METRICS}  [default: none; quality: exact]")  # fmt: skip
@section("Machine")
@click.option("--exit-layer", type=int, help="Of a checkpoint: exit after this layer.  [default: as trained]")
@click.option("--rounds", type=click.IntRange(0), default=CalibrateOptions.rounds,
              help="Time decoding at a few thresholds, in so many interleaved rounds; several bundles: 3.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1), help="CPU threads of bundles.  [default: one per physical core]")
@click.option("--device", default=CalibrateOptions.device, help=DEVICE)
@section("Results")
@click.option("--output", type=click.Path(path_type=Path),
              help="Write the calibration here.  [default: into the bundle, or calibration.json]")  # fmt: skip
@click.option("--report", type=click.Path(path_type=Path), help="Write a page with pictures to this directory.")
@click.option("--json", "as_json", is_flag=True, help="Print the calibration and the verdict as JSON.")
def command(
    models: tuple[str, ...],
    data: Path,
    samples: int,
    max_new_tokens: int,
    exit_layer: int | None,
    rounds: int,
    threads: int | None,
    device: str,
    output: Path | None,
    report: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Find the threshold of a bundle or a checkpoint, MODEL, on the lines of a JSONL file.

    The full model decodes each input, and the shallow decoder runs at every token. A bundle is updated atomically; a
    checkpoint's calibration is for `convert --calibration`. Of several bundles of one model, with exits after different
    layers, the fastest is chosen and updated. An interrupted run continues where it stopped.

    \b
    Example:
      freeexport calibrate bundle --data calibration.jsonl
      freeexport calibrate bundle --data calibration.jsonl --risk 0.02 --delta 0.05
      freeexport calibrate exit-4 exit-6 --data calibration.jsonl --target-quality 0.99 --metric rouge-l
      freeexport calibrate path/to/checkpoint --data calibration.jsonl --output calibration.json
    """
    from freeexport.measure import calibration_page
    from freeexport.measure.calibrate import calibrate

    options = CalibrateOptions(_rule(given), samples, max_new_tokens, rounds, exit_layer, device, threads)
    if len(models) > 1 and report is not None:
        raise click.UsageError("--report is a page about one bundle; leave it out, or name one")
    target = DEFAULT_OUTPUT if output is None and not is_bundle(models[0]) else output
    if report is not None:
        calibration_page.check(report)
    compared = calibrate(models, data, options, target)
    if report is not None:
        calibration_page.write(compared.results[0], report)
    written = _write(compared, target)
    if as_json:
        click.echo(json.dumps(_as_dict(compared, written), indent=2))
        return
    if len(models) > 1:
        print_page(calibration_page.comparison_tables(compared))
    if compared.best is not None:
        print_page(calibration_page.tables(compared.results[compared.best]))
    click.echo(compared.advice if len(models) > 1 else str(compared.results[0].verdict))
    click.echo("nothing was written" if written is None else f"written: {written}")


def _rule(given: dict[str, Any]) -> Rule:
    implied = {method for name, method in _IMPLIED.items() if given[name] is not None}
    chosen = {given["method"]} - {None} | implied
    if len(chosen) > 1:
        names = ", ".join(sorted(chosen))
        raise click.UsageError(f"the options are of several rules ({names}); choose one")
    return Rule(**{**{name: value for name, value in given.items() if value is not None},
                   "method": next(iter(chosen), "bmm")})  # fmt: skip


def _write(compared: Comparison, output: Path | None) -> str | None:
    """Write the calibration into its bundle, or to the file `output`; what was written, None where no exit is best."""
    from freeexport.conversion.recalibrate import update_bundle

    if compared.best is None:
        return None
    result = compared.results[compared.best]
    if output is None:
        update_bundle(Path(result.facts.path), result.calibration)
        return result.facts.path
    write_whole(output, result.calibration.to_json())
    return str(output)


def _as_dict(compared: Comparison, written: str | None) -> dict[str, Any]:
    bundles = [
        {
            **asdict(one.calibration),
            "model": one.facts.path,
            "verdict": asdict(one.verdict),
            "notes": one.notes,
            "break_even": one.break_even,
            "tokens_per_second": one.speeds,
        }
        for one in compared.results
    ]
    if len(bundles) == 1:
        return {**bundles[0], "advice": str(compared.results[0].verdict), "written": written}
    return {"bundles": bundles, "best": compared.best, "advice": compared.advice, "written": written}
