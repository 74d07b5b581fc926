"""`freeexport bench`: the speed of a bundle and of other decoders of the same checkpoint, interleaved in one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import click

from freeexport.benchmark import plot as bench_plot
from freeexport.benchmark.benchmark import benchmark
from freeexport.benchmark.options import BenchOptions
from freeexport.benchmark.peers.catalog import PEERS
from freeexport.benchmark.report import as_dict, table
from freeexport.commands.verb_options import SAMPLES, RenamedOption, SectionedCommand, section
from freeexport.measure.layers_report import check_plot
from freeexport.system.output_file import check_writable, write_whole
from runtime.options import Drafts


@click.command(cls=SectionedCommand)
@click.argument("bundle", type=click.Path(path_type=Path))
@section("Prompts")
@click.option("--data", type=click.Path(path_type=Path), help="JSON lines with prompts.  [default: four sample texts]")
@click.option("--samples", type=click.IntRange(1), default=4, help=SAMPLES)
@click.option("--max-new-tokens", "tokens", cls=RenamedOption, old="--tokens", type=click.IntRange(2), default=64,
              help="Tokens to generate for a prompt; ends of sequence are ignored.")  # fmt: skip
@section("What is compared")
@click.option(
    "--against",
    multiple=True,
    metavar="PEER|MODEL",
    help="Another decoder of the same checkpoint, in an environment of its own that is built in the user's cache: "
    f"{', '.join(PEERS)}. Or the checkpoint, which transformers then runs in this environment. May be repeated.",
)
@click.option("--model", metavar="MODEL", help="The checkpoint that the bundle came from, for peers.")
@click.option("--also", type=click.Path(path_type=Path), multiple=True,
              help="Another bundle of that checkpoint, e.g. at another precision. May be repeated.")  # fmt: skip
@section("Early exits")
@click.option(
    "--threshold",
    type=float,
    multiple=True,
    help="Also run the modes, with exits above this confidence. May be repeated.",
)
@click.option(
    "--mode",
    type=click.Choice(["free", "rollback", "lossless", "shallow"]),
    multiple=True,
    default=["free"],
    help="Modes to run at the thresholds; shallow, the shallow decoder alone, has none. May be repeated.",
)
@click.option(
    "--drafts",
    type=click.Choice(get_args(Drafts)),
    multiple=True,
    help="Also run lossless with drafts of the exit, of repeated text (lookup), both (auto) or none. May be repeated.",
)
@click.option("--rollback-threshold", type=float, help="Nats, for mode rollback.  [default: the bundle's]")
@click.option(
    "--replay",
    metavar="RATE|FILE",
    multiple=True,
    help="Also run mode free with exits forced at this rate, or those of `generate --output`. May be repeated.",
)
@click.option(
    "--replay-drafts",
    type=float,
    metavar="RATE",
    multiple=True,
    help="Also run mode lossless with this share of correct drafts. May be repeated.",
)
@section("Machine")
@click.option("--rounds", type=click.IntRange(1), default=5, help="Interleaved rounds; the median counts.")
@click.option("--device", default="cpu", help="For the bundles: cpu, or cuda:0 for the first GPU.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: one per physical core]")
@click.option("--force", is_flag=True, help="Print ratios even if the machine is busy.")
@section("Results")
@click.option("--plot", type=click.Path(path_type=Path), metavar="PNG", help="Also plot the speeds.")
@click.option("--save", type=click.Path(path_type=Path), metavar="FILE", help="Also write the figures as JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def command(plot: Path | None, save: Path | None, as_json: bool, **given: Any) -> None:
    """Measure BUNDLE: mode full, modes that exit at thresholds, and other decoders, interleaved on an idle machine.

    All contenders decode the same prompts greedily to the same number of tokens, on the same number of threads, each in
    a process of its own. Speed counts from prompt to last token.

    \b
    Example:
      freeexport bench bundle --against path/to/checkpoint --threshold 0.8
      freeexport bench bundle --against hf --against genai --model path/to/checkpoint
      freeexport bench bundle --threshold 0.5 --threshold 0 --mode free --mode lossless
      freeexport bench bundle --drafts lookup --against hf-lookup --model path/to/checkpoint
    """
    options = BenchOptions(**given)
    if plot is not None:
        check_plot(plot)
    check_writable(save, "--save")
    report = benchmark(options)
    if plot is not None:
        bench_plot.write(report, plot)
    found = as_dict(report)
    if save is not None:
        write_whole(save, json.dumps(found, indent=2) + "\n")
    click.echo(json.dumps(found) if as_json else table(report))
