"""`freeexport calibrate`: choose a threshold from a few hundred examples, and report its effect."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import click

from freeexport.calibrate.calibrate import CalibrateOptions
from freeexport.calibrate.threshold import Rule, RuleName
from freeexport.commands.verb_options import (
    DEVICE,
    MAX_NEW_TOKENS,
    METRICS,
    SAMPLES,
    THREADS,
    MetricName,
    SectionedCommand,
    option_of,
    section,
)
from freeexport.system.load import wait_quietly
from freeexport.system.output import write_whole
from freeexport.system.page import print_page
from runtime.bundle.manifest import MANIFEST
from runtime.errors import OptionError
from runtime.machine.machine import usable_cores

# Options of one rule. Giving one selects that rule.
_IMPLIED: dict[str, RuleName] = {"agreement": "bmm", "risk": "risk", "quality": "quality"}


option = option_of(CalibrateOptions)


@click.command(cls=SectionedCommand)
@click.argument("model", metavar="BUNDLE|CHECKPOINT")
@section("Data")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    help="JSONL file with 'input' or 'audio' (and 'target').",
)
@option("samples", SAMPLES, type=click.IntRange(1))
@option("max_new_tokens", MAX_NEW_TOKENS, type=click.IntRange(2))
@section("How the threshold is chosen")
@click.option(
    "--rule",
    "method",
    type=click.Choice(get_args(RuleName)),
    help=(
        "Rule that chooses the threshold. bmm: from P(agree | confidence). risk: bounds the mean "
        "loss of a sequence, with a guarantee. quality: keeps a share of the full model's metric, "
        "measured by decoding, with a guarantee.  [default: bmm, or the rule of the option below]"
    ),
)
@click.option(
    "--agreement",
    type=float,
    help=(
        "bmm: required probability that a token at the threshold agrees with the full model.  "
        f"[default: {Rule.agreement}]"
    ),
)
@click.option(
    "--risk", type=float, help=f"risk: maximum mean loss of a sequence.  [default: {Rule.risk}]"
)
@click.option(
    "--target-quality",
    "quality",
    type=float,
    help=f"quality: share of the full model's metric to keep.  [default: {Rule.quality}]",
)
@click.option(
    "--delta",
    type=float,
    default=Rule.delta,
    help="risk and quality: probability that the guarantee fails.",
)
@click.option(
    "--metric",
    type=MetricName(),
    help=f"Metric that compares outputs. {METRICS}  [default: none; quality: exact]",
)
@section("Machine")
@option(
    "rounds",
    "Number of interleaved rounds that time decoding at a few thresholds. 0 disables timing.",
    type=click.IntRange(0),
)
@option("threads", THREADS, type=click.IntRange(1))
@option("device", DEVICE)
@section("Results")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="File to write the calibration to.  [default: into the bundle, or beside the checkpoint]",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print the calibration and the verdict as JSON."
)
def command(
    model: str,
    data: Path,
    samples: int,
    max_new_tokens: int,
    rounds: int,
    threads: int | None,
    device: str,
    output: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Calibrate the exit threshold of BUNDLE or CHECKPOINT on the lines of a JSONL file.

    The full model decodes each input, and the exit predicts every token. A bundle is updated
    atomically. A checkpoint with a trained exit is decoded by transformers, and `convert` takes its
    calibration into the bundle. An interrupted run continues where it stopped.

    \b
    Example:
      freeexport calibrate path/to/checkpoint --data calibration.jsonl
      freeexport calibrate bundle --data calibration.jsonl
      freeexport calibrate bundle --data calibration.jsonl --risk 0.02 --delta 0.05
      freeexport calibrate bundle --data calibration.jsonl --target-quality 0.99 --metric rouge-l
    """
    from freeexport.calibrate.beside import (
        TracedAnswer,
        exit_directory_of,
        is_checkpoint,
        write_beside,
    )
    from freeexport.calibrate.calibrate import calibrate
    from freeexport.calibrate.calibration_page import tables
    from freeexport.checkpoints.checkpoint import open_checkpoint
    from freeexport.conversion.recalibrate import update_bundle

    options = CalibrateOptions(
        _rule(given), samples, max_new_tokens, rounds=rounds, device=device, threads=threads
    )
    before_export = is_checkpoint(model)
    if not before_export and not (Path(model) / MANIFEST).exists():
        raise OptionError(
            f"{model} is neither a bundle nor a checkpoint; give the directory that convert or "
            "train wrote"
        )
    samples_beside: list[TracedAnswer] = []
    if before_export:
        wait_quietly(threads or usable_cores())  # before torch is imported
        from freeexport.calibrate.checkpoint import calibrate_checkpoint

        result, samples_beside = calibrate_checkpoint(model, data, options)
    else:
        result = calibrate(model, data, options)
    written = model if output is None else str(output)
    if output is not None:
        write_whole(output, result.calibration.to_json())
    elif before_export:
        place = exit_directory_of(open_checkpoint(model))
        assert place is not None
        written = str(write_beside(place, result.calibration, samples_beside))
    else:
        update_bundle(Path(model), result.calibration)
    verdict = result.verdict
    if before_export:
        given_file = "" if output is None else f" --calibration {shlex.quote(str(output))}"
        step = f"freeexport convert {shlex.quote(model)} BUNDLE{given_file}"
        verdict = replace(verdict, next_step=step)
    if as_json:
        facts = {
            "model": model,
            "verdict": asdict(verdict),
            "notes": result.notes,
            "break_even": result.break_even,
            "tokens_per_second": result.speeds,
            "advice": str(verdict),
            "written": written,
        }
        click.echo(json.dumps({**asdict(result.calibration), **facts}, indent=2))
        return
    print_page(tables(result))
    click.echo(f"{verdict}\nwritten: {written}")


def _rule(given: dict[str, Any]) -> Rule:
    implied = {method for name, method in _IMPLIED.items() if given[name] is not None}
    chosen = {given["method"]} - {None} | implied
    if len(chosen) > 1:
        names = ", ".join(sorted(chosen))
        raise click.UsageError(f"the options are of several rules ({names}); choose one")
    return Rule(
        **{
            **{name: value for name, value in given.items() if value is not None},
            "method": next(iter(chosen), "bmm"),
        }
    )
