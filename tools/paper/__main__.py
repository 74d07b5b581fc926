"""What only the comparison of FREE's paper needs.

python -m tools.paper train MODEL OUT --data train.jsonl --exit-layer 6 --loss weighted-ce
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import click

from freeexport.commands.train import command as train_verb
from runtime.errors import FreeExportError
from tools.paper.losses import LOSSES


@click.group(help=__doc__)
def main() -> None:
    pass


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
    try:
        main()
    except FreeExportError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(1) from None
