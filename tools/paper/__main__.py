"""The comparison of FREE's paper, and what only it needs.

python -m tools.paper data samsum --source train.json --output samsum/train.jsonl

python -m tools.paper compare MODEL --data samsum --exit-layer 6 --output comparison
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import click

from freeexport.commands.train import command as train_verb
from freeexport.commands.verb_options import MetricName, option_of
from tools.data.splits import run_tool
from tools.paper.compare_options import ROWS, CompareOptions
from tools.paper.datasets import DATA_SETS, convert_data_set
from tools.paper.losses import LOSSES


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command("data")
@click.argument("name", type=click.Choice(list(DATA_SETS)))
@click.option(
    "--source",
    "sources",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="Original file, or directory of such files. May be repeated.",
)
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, help="JSONL file to write."
)
def data(name: str, sources: tuple[Path, ...], output: Path) -> None:
    """Convert the original files of one split of a data set to JSON lines."""
    click.echo(f"{output}: {convert_data_set(name, sources, output)} lines")


option = option_of(CompareOptions)


@main.command("compare")
@click.argument("model")
@option(
    "data",
    "Directory with train.jsonl and test.jsonl, and calibration.jsonl or validation.jsonl, of "
    "'input' and 'target'.",
)
@option("exit_layer", "Exit layer of FREE and of CALM's single exit.")
@option("output", "Directory of all results. An interrupted run continues there.")
@option("device", "cpu, or cuda:0 (not yet run on a GPU).")
@option("engines", "Engines on a GPU.")
@click.option(
    "--rows",
    default=",".join(ROWS),
    callback=lambda context, parameter, value: tuple(name.strip() for name in value.split(",")),
    help=f"Comma-separated rows to measure.  [default: all of {', '.join(ROWS)}]",
    show_default=False,
)
@option(
    "seeds",
    "Seed of the trainings. May be repeated: each seed trains and measures all rows.",
    "--seed",
)
@option("steps", "Steps of each training.")
@option("epochs", "Epochs of each training.  [default: 3, without --steps and --minutes]")
@option("minutes", "Time limit of each training.")
@option("batch_tokens", "Padded tokens per micro-batch.")
@option("max_tokens", "Longest input. Longer ones are cut, in training and in tests.")
@click.option("--learning-rate", type=float, default=CompareOptions.learning_rate)
@option("bf16", "Train in bfloat16 mixed precision.")
@option(
    "leftover",
    "Teachers of kd-dyn that find no layer: reuse matches them to the first layer, as the "
    "authors do.",
)
@option(
    "lines",
    "Test lines to decode, and lines of each training's evaluations.",
    type=click.IntRange(1),
)
@option("calibration_lines", "Lines to calibrate on.", type=click.IntRange(1))
@option(
    "samples",
    "Smaller number of calibration lines to compare, in row samples. May be repeated.",
    type=click.IntRange(1),
)
@option("thresholds", "Fixed threshold of FREE, CALM and rollback. May be repeated.", "--threshold")
@option(
    "static_depths",
    "Depth of a static exit. May be repeated.  [default: quarters, and the exit layer]",
    "--static-depth",
)
@option(
    "depths",
    "Further exit layer of FREE, in row depth. May be repeated.  [default: half and twice the "
    "exit layer]",
    "--depth",
)
@option("calm_min_layer", "First layer after which CALM may exit (the authors' exit_min_layer).")
@option(
    "metrics",
    "Metric. May be repeated; the first is used for curves.  [default: ROUGE and BLEU, or "
    "SQuAD's for questions]",
    "--metric",
    type=MetricName(),
)
@click.option("--max-new-tokens", type=click.IntRange(2), default=CompareOptions.max_new_tokens)
@option("rounds", "Rounds of decoding. Times are medians over rounds.", type=click.IntRange(1))
@option("threads", "Threads.  [default: all usable cores]", type=click.IntRange(1))
@option(
    "precision",
    "Precision of the engines. PyTorch computes in fp16 and bf16 if they do, else in fp32.  "
    "[default: fp32, with TensorRT fp16]",
)
def compare_command(**given: Any) -> None:
    """Train, convert, calibrate and measure all rows of the paper's comparison.

    MODEL is a Hugging Face checkpoint directory, a hub name, or a GGUF file. OUTPUT gets report.md,
    report.json and curves.
    """
    from tools.paper.compare import compare
    from tools.paper.compare_check import checked_options
    from tools.paper.compare_report import FILES, write_comparison

    checked = checked_options(CompareOptions(**given))
    report = compare(checked, lambda name: click.echo(name, err=True))
    write_comparison(report, checked.options.output)
    for note in checked.notes:
        click.echo(f"note: {note}", err=True)
    click.echo(f"{checked.options.output}: {FILES}")


def train(model: str, out: Path, loss: str, **options: Any) -> None:
    """Fine-tune MODEL with a loss of the compared methods, as `freeexport train` does.

    All options are those of `freeexport train`, except --loss.
    """
    run = train_verb.callback
    assert run is not None
    run(model=model, out=out, loss=LOSSES[loss], **options)


def _loss() -> click.Option:
    return click.Option(
        ["--loss"],
        type=click.Choice(list(LOSSES)),
        default=next(iter(LOSSES)),
        help="weighted-ce: cross-entropies of all layers, weighted by depth, for CALM and static.",
    )


main.add_command(
    click.Command(
        "train",
        callback=train,
        help=train.__doc__,
        params=[
            _loss() if param.name == "loss" else copy.copy(param) for param in train_verb.params
        ],
    )
)

if __name__ == "__main__":
    run_tool(main)
