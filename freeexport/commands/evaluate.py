"""`freeexport evaluate`: compare decoding methods, by speed alone or also by quality on a task."""

from __future__ import annotations

import json
from typing import Any

import click

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
from freeexport.evaluate.settings import (
    METHODS,
    SPEED_DEFAULTS,
    THRESHOLDS,
    EvaluateOptions,
    bundle_and_methods,
    methods_of,
)
from freeexport.system.page import print_page
from runtime.bundle.hub import find_bundle


def _defaults(name: str) -> str:
    """Describe the defaults of an option, with scores and without."""
    return f"{getattr(EvaluateOptions, name)}, or {SPEED_DEFAULTS[name]} without --metric"


option = option_of(EvaluateOptions)


@click.command(cls=SectionedCommand)
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE[=METHODS]...")
@section("Data")
@option(
    "data",
    "JSONL file with 'input' or 'audio', and 'target'. Without targets, outputs are compared "
    "with those of the full model. Required with --metric.",
    show_default="four sample texts",
)
@option("samples", SAMPLES, type=click.IntRange(1), default=None, show_default=_defaults("samples"))
@option(
    "max_new_tokens",
    f"{MAX_NEW_TOKENS} Without --metric, exactly this number.",
    type=click.IntRange(2),
    default=None,
    show_default=_defaults("max_new_tokens"),
)
@section("What is compared")
@option(
    "metrics",
    f"Also score outputs by this metric. May be repeated; the first is used for curves. {METRICS}",
    "--metric",
    type=MetricName(),
)
@click.option(
    "--methods",
    default="full,static,free,lossless",
    help=(
        f"Comma-separated methods, of {', '.join(METHODS)}. static: only the shallow decoder. "
        "free: exits above thresholds. adaptive: exits above a threshold that is learned while "
        "decoding. lookup, phrases, exit-drafts: lossless with drafts from the text only, also "
        "from the bundle's phrases, or from the exit only."
    ),
)
@option(
    "temperature",
    "Sampling temperature. Each line is sampled with its number as seed. 0 is greedy decoding.",
    show_default="0",
)
@option(
    "thresholds",
    "Confidence above which a token exits, in method free, which also runs at the calibrated "
    "threshold. May be repeated.",
    "--threshold",
    default=None,
    show_default=f"{', '.join(map(str, THRESHOLDS))}, or none without --metric",
)
@option(
    "quality",
    "Share of the full model's metric that a winner must keep.",
    "--target-quality",
    default=None,
    show_default=str(EvaluateOptions.quality),
)
@section("Machine")
@option(
    "rounds",
    "Number of interleaved rounds. The median is reported.",
    type=click.IntRange(1),
    default=None,
    show_default=_defaults("rounds"),
)
@option("device", DEVICE)
@option("threads", THREADS, type=click.IntRange(1))
@section("Results")
@option(
    "output",
    "Directory for outputs and results. An interrupted run continues there. Required with "
    "--metric.",
)
@option("overwrite", "Replace the results of another run in --output.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def command(bundles: tuple[str, ...], methods: str, as_json: bool, **given: Any) -> None:
    """Compare the speed of decoding methods, and with --metric their quality on a task.

    Methods are interleaved line by line. Without --metric, all BUNDLEs must come from one
    checkpoint, ends of sequence are ignored, and tokens are compared with those of the first row.
    Figures measured on a busy machine are marked.

    With --metric, BUNDLEs may come from several checkpoints, each with the METHODS that it was
    trained for. Relative values refer to the full model of the same bundle, or of the first bundle
    if that one has none. Columns `of first` compare all bundles with the first.

    OUTPUT gets results.md, evaluation.json and .csv, outputs.jsonl, and figures; with --metric also
    report.html.

    \b
    Example:
      freeexport evaluate bundle
      freeexport evaluate fp32 int8 --threshold 0.5 --methods full,free,lookup --output speed
      freeexport evaluate bundle --data test.jsonl --metric rouge-l --output results
      freeexport evaluate fp32 int8 --data test.jsonl --metric per --metric exact --output results --rounds 3
      freeexport evaluate kd=full,free,lossless ce=full,static --data test.jsonl --metric bleu --output results
    """  # noqa: E501
    chosen = tuple(bundle_and_methods(text, methods_of(methods)) for text in bundles)
    scored = bool(given["metrics"])
    if not scored and given["quality"] is not None:
        raise click.UsageError("--target-quality is a share of a metric; give --metric")
    named = {name: value for name, value in given.items() if value not in (None, ())}
    chosen = tuple((find_bundle(bundle), each) for bundle, each in chosen)
    options = EvaluateOptions(chosen, **({} if scored else SPEED_DEFAULTS) | named)
    if scored:
        _scored(options, as_json)
    else:
        _speed(options, as_json)


def _speed(options: EvaluateOptions, as_json: bool) -> None:
    """Measure speed, and print and write the results."""
    from freeexport.evaluate.speed import SPEED_FILES, measure_speed, write_speed
    from freeexport.evaluate.speed_rows import speed_lines, speed_sheet
    from freeexport.evaluate.tables import narrow
    from freeexport.system.sheet import terminal

    if options.output is not None:
        import matplotlib  # noqa: F401

    report = measure_speed(options)
    if options.output is not None:
        write_speed(report, options.output)
    if as_json:
        click.echo(json.dumps(report))
        return
    shown = narrow(speed_sheet(report))
    print_page([terminal(shown)])
    for text in (*speed_lines(report, shown), "", report["verdict"]):
        click.echo(text)
    if options.output is not None:
        click.echo(f"\n{options.output}: {SPEED_FILES}")


def _scored(options: EvaluateOptions, as_json: bool) -> None:
    """Evaluate, and print and write the results."""
    assert options.output is not None
    import matplotlib  # noqa: F401

    from freeexport.evaluate.evaluate import evaluate
    from freeexport.evaluate.page import FILES, write_evaluation
    from freeexport.evaluate.tables import facts, narrow, settings_sheet
    from freeexport.system.sheet import terminal

    found = evaluate(options)
    write_evaluation(found, options.output)
    if as_json:
        click.echo(json.dumps(found.report, indent=2))
        return
    shown = narrow(settings_sheet(found), found.metrics)
    print_page([terminal(shown)])
    for name, text in [*facts(found, shown), *(("note", note) for note in found.report["notes"])]:
        click.echo(f"{name}: {text}")
    for text in found.report["verdicts"]:
        click.echo(f"\n{text}")
    click.echo(f"\n{options.output}: {FILES}")
