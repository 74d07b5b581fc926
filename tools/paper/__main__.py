"""What only the comparison of FREE's paper needs.

python -m tools.paper train MODEL OUT --data train.jsonl --exit-layer 6 --loss weighted-ce
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import click

from freeexport.commands.train import command as train_verb
from tools.data.splits import run_tool
from tools.paper.datasets import DATA_SETS, convert
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
    click.echo(f"{output}: {convert(name, sources, output)} lines")


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
