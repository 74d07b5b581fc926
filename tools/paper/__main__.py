"""The comparison of FREE's paper, and what only it needs.

python -m tools.paper data samsum --source train.json --output samsum/train.jsonl

python -m tools.paper compare MODEL --data samsum --exit-layer 6 --output comparison
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import click

from freeexport.commands.train import command as train_verb
from freeexport.commands.verb_options import MetricName
from runtime.bundle.manifest import Precision
from tools.data.splits import run_tool
from tools.paper.compare_options import ROWS, CompareOptions, GpuTarget, resolved
from tools.paper.datasets import DATA_SETS, convert
from tools.paper.losses import LOSSES, Leftover


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
    click.echo(f"{output}: {convert(name, sources, output)} lines")


class Listed(click.ParamType):
    """Comma-separated names, in the order of `known`."""

    name = "names"

    def __init__(self, known: Sequence[str]) -> None:
        self._known = known

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = [name.strip() for name in value.split(",")]
        for name in names:
            if name not in self._known:
                self.fail(f"{name!r} is none of {', '.join(self._known)}", param, ctx)
        return tuple(name for name in self._known if name in names)


@main.command("compare")
@click.argument("model")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    help=(
        "Directory with train.jsonl and test.jsonl, and calibration.jsonl or validation.jsonl, of "
        "'input' and 'target'."
    ),
)
@click.option(
    "--exit-layer", type=int, required=True, help="Exit layer of FREE and of CALM's single exit."
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="Directory of all results. An interrupted run continues there.",
)
@click.option(
    "--device", default=CompareOptions.device, help="cpu, or cuda:0 (not yet run on a GPU)."
)
@click.option(
    "--engines",
    type=click.Choice(get_args(GpuTarget)),
    default=CompareOptions.engines,
    help="Engines on a GPU.",
)
@click.option(
    "--rows",
    type=Listed(ROWS),
    default=",".join(ROWS),
    help=f"Comma-separated rows to measure.  [default: all of {', '.join(ROWS)}]",
    show_default=False,
)
@click.option(
    "--seed",
    "seeds",
    type=int,
    multiple=True,
    default=CompareOptions.seeds,
    help="Seed of the trainings. May be repeated: each seed trains and measures all rows.",
)
@click.option("--steps", type=int, help="Steps of each training.")
@click.option(
    "--epochs",
    type=float,
    help="Epochs of each training.  [default: 3, without --steps and --minutes]",
)
@click.option("--minutes", type=float, help="Time limit of each training.")
@click.option(
    "--batch-tokens",
    type=int,
    default=CompareOptions.batch_tokens,
    help="Padded tokens per micro-batch.",
)
@click.option("--max-tokens", type=int, help="Longest input in training. Longer ones are cut.")
@click.option("--learning-rate", type=float, default=CompareOptions.learning_rate)
@click.option("--bf16", is_flag=True, help="Train in bfloat16 mixed precision.")
@click.option(
    "--leftover",
    type=click.Choice(get_args(Leftover)),
    default=CompareOptions.leftover,
    help=(
        "Teachers of kd-dyn that find no layer: reuse matches them to the first layer, as the "
        "authors do."
    ),
)
@click.option(
    "--lines",
    type=click.IntRange(1),
    default=CompareOptions.lines,
    help="Test lines to decode, and lines of each training's evaluations.",
)
@click.option(
    "--calibration-lines",
    type=click.IntRange(1),
    default=CompareOptions.calibration_lines,
    help="Lines to calibrate on.",
)
@click.option(
    "--samples",
    type=click.IntRange(1),
    multiple=True,
    default=CompareOptions.samples,
    help="Smaller number of calibration lines to compare, in row samples. May be repeated.",
)
@click.option(
    "--threshold",
    "thresholds",
    type=float,
    multiple=True,
    default=CompareOptions.thresholds,
    help="Fixed threshold of FREE, CALM and rollback. May be repeated.",
)
@click.option(
    "--static-depth",
    "static_depths",
    type=int,
    multiple=True,
    help="Depth of a static exit. May be repeated.  [default: quarters, and the exit layer]",
)
@click.option(
    "--depth",
    "depths",
    type=int,
    multiple=True,
    help=(
        "Further exit layer of FREE, in row depth. May be repeated.  [default: half and twice the "
        "exit layer]"
    ),
)
@click.option(
    "--calm-min-layer",
    type=int,
    default=CompareOptions.calm_min_layer,
    help="First layer after which CALM may exit (the authors' exit_min_layer).",
)
@click.option(
    "--metric",
    "metrics",
    type=MetricName(),
    multiple=True,
    help=(
        "Metric. May be repeated; the first is used for curves.  [default: ROUGE and BLEU, or "
        "SQuAD's for questions]"
    ),
)
@click.option("--max-new-tokens", type=click.IntRange(2), default=CompareOptions.max_new_tokens)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=CompareOptions.rounds,
    help="Rounds of decoding. Times are medians over rounds.",
)
@click.option("--threads", type=click.IntRange(1), help="Threads.  [default: all usable cores]")
@click.option(
    "--precision",
    type=click.Choice(get_args(Precision)),
    default=CompareOptions.precision,
    help="Precision of the engines. PyTorch computes in fp16 and bf16 if they do, else in fp32.",
)
def compare_command(**given: Any) -> None:
    """Train, convert, calibrate and measure all rows of the paper's comparison.

    MODEL is a Hugging Face checkpoint directory, a hub name, or a GGUF file. OUTPUT gets report.md,
    report.json and curves.
    """
    import matplotlib  # noqa: F401

    from tools.paper.compare import compare
    from tools.paper.compare_report import FILES, write_report

    checked = resolved(CompareOptions(**given))
    report = compare(checked, lambda name: click.echo(name, err=True))
    write_report(report, checked.options.output)
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
