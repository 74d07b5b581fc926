"""`freeexport evaluate-exits`: which layer of a checkpoint to exit after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import click

from freeexport.checkpoints.transformers_model import Dtype
from freeexport.commands.verb_options import DEVICE, MAX_NEW_TOKENS, SAMPLES
from freeexport.system.page import print_page
from freeexport.traces import layers_plot
from freeexport.traces.compare_layers import Options, evaluate_exits
from freeexport.traces.exit_report import as_dict, tables


@click.command()
@click.argument("model")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="JSONL with 'input' (and 'target').")
@click.option(
    "--on",
    "forcing",
    type=click.Choice(["output", "targets"]),
    default=Options.forcing,
    show_default=True,
    help="Text that the decoder reads: its own greedy output, or the data's targets.",
)
@click.option("--samples", type=click.IntRange(1), default=Options.samples, show_default=True, help=SAMPLES)
@click.option("--agreement", type=click.FloatRange(0, 1), default=Options.agreement, show_default=True,
              help="The share of exits that must agree with the last layer.")  # fmt: skip
@click.option("--max-new-tokens", type=click.IntRange(1), default=Options.max_new_tokens, show_default=True,
              help=MAX_NEW_TOKENS)  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(2), default=Options.max_tokens, show_default=True,
              help="Read at most so many tokens of a line, prompt included.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1), default=Options.batch_size, show_default=True,
              help="Lines to decode at once.")  # fmt: skip
@click.option(
    "--max-pending",
    type=click.IntRange(1),
    default=Options.max_pending,
    show_default=True,
    help="Maximum tokens in a sync pass.",
)
@click.option(
    "--bundle", type=click.Path(path_type=Path), help="Use the costs that were measured on this bundle of MODEL."
)
@click.option("--device", default=Options.device, show_default=True, help=DEVICE)
@click.option(
    "--dtype",
    type=click.Choice(get_args(Dtype)),
    default=Options.dtype,
    show_default=True,
    help="Type of the weights in torch.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report, with the curves, as JSON.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write the curves to this PNG (needs the extra bench).")
def command(model: str, data: Path, as_json: bool, plot: Path | None, **options: Any) -> None:
    """Compare the layers of the checkpoint MODEL as exits, on the lines of a JSONL file.

    Agreement is with the last layer, over all tokens but the first of an output. A confidence above the threshold
    exits; `exits at 99%` is the largest share of tokens that can exit so that 99 % of them agree. Speedups are
    predicted, from the sizes of layers and head, or from a bundle's measurements.

    \b
    Example:
      freeexport evaluate-exits path/to/checkpoint --data validation.jsonl --plot exits.png
    """
    if plot is not None:
        layers_plot.check(plot)
    report = evaluate_exits(model, data, Options(**options))
    if plot is not None:
        layers_plot.write(report, plot)
    if as_json:
        click.echo(json.dumps(as_dict(report), indent=2))
    else:
        print_page(tables(report))
