"""The losses of `freeexport train` on equal terms: one checkpoint, data set, seed and number of steps for each.

    python -m tools.quality.compare_losses MODEL WORK --data train.jsonl --validation valid.jsonl --exit-layer 2 \\
        --steps 400

Further options go to `freeexport train`. Prints accuracy of both exits on the validation file, and their agreement.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import click

from freeexport.checkpoints.exit_file import LossName
from freeexport.training.options import EXIT_LOSSES
from tools.data.splits import DataError, run


def measure(model: str, out: Path, loss: str, options: tuple[str, ...]) -> dict[str, float]:
    """Train with `loss` unless `out` has it already; the metrics of its last evaluation."""
    if not out.exists():
        command = [sys.executable, "-m", "freeexport", "train", model, str(out), "--loss", loss, *options]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            raise DataError(f"training with --loss {loss} failed; its message is above")
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found: dict[str, float] = next(record for record in reversed(records) if "eval_agreement" in record)
    return found


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("model")
@click.argument("work", type=click.Path(path_type=Path, file_okay=False))
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def command(model: str, work: Path, options: tuple[str, ...]) -> None:
    """Train MODEL with each loss into WORK/LOSS; OPTIONS are those of `freeexport train`."""
    work.mkdir(parents=True, exist_ok=True)
    frozen = any(pair == ("--tune", "exit") for pair in itertools.pairwise(options))
    click.echo("| loss | deep accuracy | shallow accuracy | agreement |\n|---|---|---|---|")
    for loss in EXIT_LOSSES if frozen else get_args(LossName):
        found = measure(model, work / loss, loss, (*options, "--patience", "0"))
        names = ("eval_deep_accuracy", "eval_shallow_accuracy", "eval_agreement")
        click.echo(f"| `{loss}` | " + " | ".join(f"{found[name]:.3f}" for name in names) + " |")


if __name__ == "__main__":
    run(command)
