"""`freeexport evaluate`: methods of decoding compared on a task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from freeexport.commands.verb_options import (
    MAX_NEW_TOKENS,
    METRICS,
    SAMPLES,
    MetricName,
    SectionedCommand,
    section,
)
from freeexport.measure.settings import (
    METHODS,
    THRESHOLDS,
    EvaluateOptions,
    bundle_and_methods,
    methods_of,
)
from freeexport.system.page import print_page


@click.command(cls=SectionedCommand)
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE[=METHODS]...")
@section("Data")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    help="JSONL with 'input', or 'audio', and 'target'. Without targets outputs are compared with the full model's.",
)
@click.option("--samples", type=click.IntRange(1), default=EvaluateOptions.samples, help=SAMPLES)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(2),
    default=EvaluateOptions.max_new_tokens,
    help=MAX_NEW_TOKENS,
)
@section("What is compared")
@click.option("--metric", "metrics", type=MetricName(), multiple=True, required=True,
              help=f"May be repeated; the first is that of curves. {METRICS}")  # fmt: skip
@click.option("--methods", default="full,static,free,lossless",
              help=f"Names with commas between, of {', '.join(METHODS)}. static: the shallow decoder alone. free: "
              "exits above thresholds. calm: after any layer, states copied; calm-decay: with falling thresholds; "
              "calm-single: after the bundle's exit layer only. adaptive: above a threshold that is learned while "
              "decoding. lookup: lossless with drafts from the text alone, without the exit.")  # fmt: skip
@click.option("--threshold", "thresholds", type=float, multiple=True, default=THRESHOLDS,
              help="Run methods free and calm with exits above this confidence, free also at the calibrated one. "
              "May be repeated.")  # fmt: skip
@click.option("--target-quality", "quality", type=float, default=EvaluateOptions.quality,
              help="The share of the full model's metric that a winner keeps.")  # fmt: skip
@click.option("--calm-model", "calm_models", metavar="MODEL", multiple=True,
              help="Method calm: the checkpoint its bundle came from; one for each such bundle, in order.")  # fmt: skip
@click.option("--calm-from", type=click.IntRange(1), default=EvaluateOptions.calm_from,
              help="Method calm: the first layer to exit after.")  # fmt: skip
@section("Machine")
@click.option("--rounds", type=click.IntRange(1), default=EvaluateOptions.rounds,
              help="Interleaved rounds; the median counts.")  # fmt: skip
@click.option(
    "--threads", type=click.IntRange(1), help="CPU threads.  [default: one per physical core]"
)
@section("Results")
@click.option("--output", type=click.Path(path_type=Path), required=True,
              help="The directory of outputs and results. A run that was interrupted goes on there.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace what another run left in --output.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def command(bundles: tuple[str, ...], methods: str, as_json: bool, **given: Any) -> None:
    """Compare methods of decoding on a task: quality against references, and speed, interleaved line by line.

    BUNDLEs may be those of several checkpoints, each with the METHODS that it was trained for. What is relative is so
    to the full model of the same bundle, or where it has none, of the first one; `of first` columns compare all with
    the first one's. OUTPUT gets report.html,
    results.md, evaluation.json and .csv, curve.png and .svg, and outputs.jsonl.

    \b
    Example:
      freeexport evaluate bundle --data test.jsonl --metric rouge-l --output results
      freeexport evaluate fp32 int8 --data test.jsonl --metric per --metric exact --output results --rounds 3
      freeexport evaluate kd=full,free,lossless ce=full,static,calm --calm-model ce-checkpoint \\
        --data test.jsonl --metric bleu --output results
    """
    import matplotlib  # noqa: F401

    from freeexport.measure.evaluate import FILES, evaluate, facts, narrow, settings_sheet, write
    from freeexport.measure.table import terminal

    chosen = tuple(bundle_and_methods(text, methods_of(methods)) for text in bundles)
    found = evaluate(EvaluateOptions(bundles=chosen, **given))
    write(found)
    if as_json:
        click.echo(json.dumps(found.report, indent=2))
        return
    shown = narrow(settings_sheet(found), found.metrics)
    print_page([terminal(shown)])
    for name, text in [*facts(found, shown), *(("note", note) for note in found.report["notes"])]:
        click.echo(f"{name}: {text}")
    for text in found.report["verdicts"]:
        click.echo(f"\n{text}")
    click.echo(f"\n{found.options.output}: {FILES}")
