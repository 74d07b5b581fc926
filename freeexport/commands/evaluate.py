"""`freeexport evaluate`: methods of decoding on a task, by quality and speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from freeexport.commands.verb_options import MAX_NEW_TOKENS, METRICS, SAMPLES, MetricName, SectionedCommand, section
from freeexport.evaluation.options import METHODS, THRESHOLDS, EvaluateOptions, bundle_and_methods, methods_of
from freeexport.system.page import print_page


@click.command(cls=SectionedCommand)
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE[=METHODS]...")
@section("Data")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="JSONL with 'input' and 'target'.")
@click.option("--samples", type=click.IntRange(1), default=EvaluateOptions.samples, show_default=True,
              help=SAMPLES)  # fmt: skip
@click.option("--max-new-tokens", type=click.IntRange(2), default=EvaluateOptions.max_new_tokens, show_default=True,
              help=MAX_NEW_TOKENS)  # fmt: skip
@section("What is compared")
@click.option("--metric", "metrics", type=MetricName(), multiple=True, required=True,
              help=f"May be repeated; the first is that of curves. {METRICS}")  # fmt: skip
@click.option("--methods", default="full,static,free,lossless", show_default=True,
              help=f"Names with commas between, of {', '.join(METHODS)}. static: the shallow decoder alone. free: "
              "exits above thresholds. adaptive: above one that is learned while decoding.")  # fmt: skip
@click.option("--threshold", "thresholds", type=float, multiple=True, default=THRESHOLDS, show_default=True,
              help="Run method free with exits above this confidence, beside the calibrated one. "
              "May be repeated.")  # fmt: skip
@click.option("--target-quality", "quality", type=float, default=EvaluateOptions.quality, show_default=True,
              help="The share of the full model's metric to keep.")  # fmt: skip
@section("Machine")
@click.option("--rounds", type=click.IntRange(1), default=EvaluateOptions.rounds, show_default=True,
              help="Interleaved rounds; the median counts.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: one per physical core]")
@section("Results")
@click.option("--output", type=click.Path(path_type=Path), required=True,
              help="The directory of outputs and results. A run that was interrupted goes on there.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace what another run left in --output.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def command(bundles: tuple[str, ...], methods: str, as_json: bool, **given: Any) -> None:
    """Compare methods of decoding on a task: quality against references, and speed, interleaved line by line.

    BUNDLEs may be those of several checkpoints, each with the METHODS that it was trained for. What is relative is so
    to the full model of the same bundle, or of the first one. OUTPUT gets evaluation.json and .csv, curve.png and .svg,
    report.html and outputs.jsonl.

    \b
    Example:
      freeexport evaluate bundle --data test.jsonl --metric rouge-l --output results
      freeexport evaluate fp32 int8 --data test.jsonl --metric per --metric exact --output results --rounds 3
      freeexport evaluate kd=full,free,lossless ce=static --data test.jsonl --metric bleu --output results
    """
    import matplotlib  # noqa: F401

    from freeexport.evaluation.evaluate import evaluate, write
    from freeexport.evaluation.report import as_dict, tables

    chosen = tuple(bundle_and_methods(text, methods_of(methods)) for text in bundles)
    found = evaluate(EvaluateOptions(bundles=chosen, **given))
    write(found)
    if as_json:
        click.echo(json.dumps(as_dict(found), indent=2))
        return
    print_page(tables(found))
    click.echo(f"{found.options.output}: report.html, evaluation.json, evaluation.csv, curve.png, curve.svg")
