"""`freeexport evaluate`: compare decoding methods on a task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from freeexport.commands.verb_options import (
    MAX_NEW_TOKENS,
    METRICS,
    SAMPLES,
    THREADS,
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
    help=(
        "JSONL file with 'input' or 'audio', and 'target'. Without targets, outputs are compared "
        "with those of the full model."
    ),
)
@click.option("--samples", type=click.IntRange(1), default=EvaluateOptions.samples, help=SAMPLES)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(2),
    default=EvaluateOptions.max_new_tokens,
    help=MAX_NEW_TOKENS,
)
@section("What is compared")
@click.option(
    "--metric",
    "metrics",
    type=MetricName(),
    multiple=True,
    required=True,
    help=f"Metric to report. May be repeated; the first is used for curves. {METRICS}",
)
@click.option(
    "--methods",
    default="full,static,free,lossless",
    help=(
        f"Comma-separated methods, of {', '.join(METHODS)}. static: only the shallow decoder. "
        "free: exits above thresholds. calm: exits after any layer, with copied states. "
        "calm-decay: calm with falling thresholds. calm-single: calm after the bundle's exit "
        "layer only. adaptive: exits above a threshold that is learned while decoding. lookup: "
        "lossless with drafts from the text only, without the exit."
    ),
)
@click.option(
    "--threshold",
    "thresholds",
    type=float,
    multiple=True,
    default=THRESHOLDS,
    help=(
        "Confidence above which a token exits, in methods free and calm. free also runs at the "
        "calibrated threshold. May be repeated."
    ),
)
@click.option(
    "--target-quality",
    "quality",
    type=float,
    default=EvaluateOptions.quality,
    help="Share of the full model's metric that a winner must keep.",
)
@click.option(
    "--calm-model",
    "calm_models",
    metavar="MODEL",
    multiple=True,
    help=(
        "Method calm: checkpoint that the bundle was converted from. Give one for each bundle "
        "with this method, in order."
    ),
)
@click.option(
    "--calm-from",
    type=click.IntRange(1),
    default=EvaluateOptions.calm_from,
    help="Method calm: first layer after which tokens can exit.",
)
@section("Machine")
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=EvaluateOptions.rounds,
    help="Number of interleaved rounds. The median is reported.",
)
@click.option("--threads", type=click.IntRange(1), help=THREADS)
@section("Results")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="Directory for outputs and results. An interrupted run continues there.",
)
@click.option("--overwrite", is_flag=True, help="Replace the results of another run in --output.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def command(bundles: tuple[str, ...], methods: str, as_json: bool, **given: Any) -> None:
    """Compare decoding methods on a task: quality against references, and speed.

    Methods are interleaved line by line. BUNDLEs may come from several checkpoints, each with the
    METHODS that it was trained for. Relative values refer to the full model of the same bundle, or
    of the first bundle if that one has none. Columns `of first` compare all bundles with the first.
    OUTPUT gets report.html, results.md, evaluation.json and .csv, curve.png and .svg, and
    outputs.jsonl.

    \b
    Example:
      freeexport evaluate bundle --data test.jsonl --metric rouge-l --output results
      freeexport evaluate fp32 int8 --data test.jsonl --metric per --metric exact --output results --rounds 3
      freeexport evaluate kd=full,free,lossless ce=full,static,calm --calm-model ce-checkpoint \\
        --data test.jsonl --metric bleu --output results
    """  # noqa: E501
    import matplotlib  # noqa: F401

    from freeexport.measure.evaluate import FILES, evaluate, facts, narrow, settings_sheet, write
    from freeexport.measure.table import terminal

    chosen = tuple(bundle_and_methods(text, methods_of(methods)) for text in bundles)
    result = evaluate(EvaluateOptions(bundles=chosen, **given))
    write(result)
    if as_json:
        click.echo(json.dumps(result.report, indent=2))
        return
    shown = narrow(settings_sheet(result), result.metrics)
    print_page([terminal(shown)])
    for name, text in [*facts(result, shown), *(("note", note) for note in result.report["notes"])]:
        click.echo(f"{name}: {text}")
    for text in result.report["verdicts"]:
        click.echo(f"\n{text}")
    click.echo(f"\n{result.options.output}: {FILES}")
