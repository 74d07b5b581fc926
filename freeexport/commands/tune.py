"""`freeexport tune`: exit layer, threshold and max_pending, the fastest that keep a wanted quality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from freeexport.commands.verb_options import DEVICE, MAX_NEW_TOKENS, METRICS, SAMPLES, MetricName
from freeexport.system.output_file import check_writable, write_whole
from freeexport.system.page import print_page
from freeexport.tuning.options import TuneOptions


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="JSONL with 'input' (and 'target').")
@click.option("--target-quality", "quality", type=float, default=TuneOptions.quality, show_default=True,
              help="The share of the full model's metric to keep.")  # fmt: skip
@click.option("--metric", type=MetricName(), default=TuneOptions.metric, show_default=True,
              help=f"Compares outputs. {METRICS}")  # fmt: skip
@click.option("--samples", type=click.IntRange(1), default=TuneOptions.samples, show_default=True,
              help=f"{SAMPLES} Every third is held out.")  # fmt: skip
@click.option("--max-new-tokens", type=click.IntRange(2), default=TuneOptions.max_new_tokens, show_default=True,
              help=MAX_NEW_TOKENS)  # fmt: skip
@click.option("--candidates", type=click.IntRange(1), default=TuneOptions.candidates, show_default=True,
              help="Maximum choices to decode on the held-out lines, and to time.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(1), default=TuneOptions.rounds, show_default=True,
              help="Interleaved rounds; the median counts.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: one per physical core]")
@click.option("--device", default=TuneOptions.device, show_default=True, help=DEVICE)
@click.option("--write", is_flag=True, help="Store the choice in its bundle, as calibrate does.")
@click.option("--force", is_flag=True, help="Run on a busy machine too, where speeds mean little.")
@click.option("--save", type=click.Path(path_type=Path), help="Write the result to this file as JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    bundles: tuple[Path, ...], data: Path, write: bool, save: Path | None, as_json: bool, **options: Any
) -> None:
    """Choose the fastest bundle, threshold and max_pending that keep the quality, among BUNDLES of one model with exits
    after different layers. One bundle is enough.

    Speed and agreement of every choice are predicted from one run over two thirds of the lines. Choices near the wanted
    quality are decoded there, and the best few on the other lines, interleaved with mode full and timed.

    \b
    Example:
      freeexport tune exit-4 exit-6 exit-8 --data calibration.jsonl --target-quality 0.99 --metric rouge-l
      freeexport tune bundle --data calibration.jsonl --metric per --write
    """
    from freeexport.conversion.recalibrate import update_bundle
    from freeexport.tuning.report import advice, as_dict, notes, tables
    from freeexport.tuning.tune import tune

    check_writable(save, "--save")
    tuned = tune(bundles, data, TuneOptions(**options))
    chosen = tuned.chosen_bundle if write else None
    if chosen is not None and tuned.calibrated is not None:
        update_bundle(chosen, tuned.calibrated.calibration)
    found = as_dict(tuned, written=chosen is not None)
    if save is not None:
        write_whole(save, json.dumps(found, indent=2) + "\n")
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    print_page(tables(tuned))
    for note in notes(tuned):
        click.echo(f"note: {note}")
    click.echo(advice(tuned))
    if write:
        click.echo("nothing was written" if chosen is None else f"written into {chosen}")
