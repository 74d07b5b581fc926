"""Steps of a recipe: modules of this project, run as commands; what they have written is not made again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from freeexport.system.machine import multiplies_bfloat16
from runtime.bundle.calibration import CALIBRATION
from tools.data.splits import DataError

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: object) -> None:
    """Run a module of this project; DataError where it fails."""
    command = [str(argument) for argument in arguments]
    click.echo("$ python -m " + " ".join(command))
    if subprocess.run([sys.executable, "-m", *command], cwd=ROOT).returncode:
        raise DataError(f"python -m {command[0]} failed; its message is above; run this again to go on")


def splits(data: Path) -> tuple[object, ...]:
    """Options that train on one split of a data set and stop by another."""
    return "--data", data / "train.jsonl", "--validation", data / "validation.jsonl"


def train(model: object, out: Path, *options: object) -> Path:
    """`freeexport train`, in bfloat16 where the processor has it; goes on where it was stopped; returns `out`."""
    if not out.exists():
        resume = ("--resume",) if out.with_name(out.name + ".training").exists() else ()
        bf16 = ("--bf16",) if multiplies_bfloat16() else ()
        python("freeexport", "train", model, out, *options, *bf16, *resume)
    return out


def convert(model: Path, bundle: Path, options: Sequence[object], calibrate: Sequence[object] = ()) -> Path:
    """A bundle of a checkpoint, calibrated where there are options for it; returns `bundle`."""
    if not bundle.exists():
        python("freeexport", "convert", model, bundle, *options)
    if calibrate and not (bundle / CALIBRATION).exists():
        python("freeexport", "calibrate", bundle, *calibrate)
    return bundle
