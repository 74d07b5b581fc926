"""`freeexport fit`: make a bundle from a checkpoint and examples in one command."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from freeexport.commands.verb_options import (
    DEVICE,
    METRICS,
    THREADS,
    MetricName,
    SectionedCommand,
    option_of,
    section,
)
from freeexport.fit.fit_options import FitOptions
from freeexport.system.page import pairs, print_page
from freeexport.system.progress import progress
from runtime.errors import shown

_UNITS = {"h": 3600, "m": 60, "min": 60, "s": 1}


class Time(click.ParamType):
    """A duration in seconds, given in hours and minutes such as 2h, 90min or 1h30min."""

    name = "time"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, float):
            return value
        text = "".join(str(value).split())
        parts = re.findall(r"(\d+(?:\.\d+)?)(h|min|m|s)", text)
        if not parts or "".join(map("".join, parts)) != text:
            self.fail(
                f"{shown(value)} is not a duration; give hours and minutes, as in 2h, 90min or "
                "1h30min",
                param,
                ctx,
            )
        return float(sum(float(number) * _UNITS[unit] for number, unit in parts))


option = option_of(FitOptions)


@click.command(cls=SectionedCommand)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@section("The task")
@option("data", "JSONL file with 'input' or 'audio', and 'target'.  [default: no training]")
@option(
    "metric",
    f"Metric that compares outputs with targets. {METRICS}  [with --lossless: exact]",
    type=MetricName(),
    default=None,
)
@click.option(
    "--quality", type=float, help="Share of the full model's metric to keep.  [default: 0.99]"
)
@click.option("--lossless", is_flag=True, help="Require exactly the full model's tokens.")
@section("Time")
@option("budget", "Total time, such as 2h, 90min or 1h30min.", type=Time(), default="2h")
@click.option("--plan", "only_plan", is_flag=True, help="Print the plan and exit.")
@section("Machine")
@option("device", DEVICE)
@option("threads", THREADS, type=click.IntRange(1))
@section("Result")
@option("overwrite", "Replace the bundle at OUT, its report, and an interrupted run.")
def command(
    model: str, out: Path, quality: float | None, lossless: bool, only_plan: bool, **given: Any
) -> None:
    """Make the fastest bundle of MODEL for a task, at OUT, with a report in OUT.report.

    First plans: whether and where an exit pays on this machine, and how long each step takes. Then
    trains the exit on the lines of --data, converts, calibrates and evaluates, each on separate
    lines. Intermediate results are kept in OUT.work. An interrupted run continues from there, and
    nothing is trained twice. Each step prints the command that runs it alone. With --device cuda:0
    the bundle is in fp16. Training uses a GPU whenever torch finds one.

    \b
    Example:
      freeexport fit path/to/checkpoint bundle --data task.jsonl --metric rouge-l --budget 2h
      freeexport fit model.gguf bundle
    """
    from freeexport.fit.plan_table import describe_plan
    from freeexport.fit.recipe import fit, planned

    if lossless and quality is not None:
        raise click.UsageError("--quality and --lossless are mutually exclusive; use one")
    if given["data"] is not None and given["metric"] is None and not lossless:
        raise click.UsageError(
            "--metric is missing; give the metric for the targets, such as rouge-l"
        )
    given["metric"] = given["metric"] or FitOptions.metric
    share = None if lossless else FitOptions.quality if quality is None else quality
    options = FitOptions(model, out, quality=share, **given)
    with progress("planning"):
        plan = planned(options, keep=not only_plan)
    print_page([pairs("Plan", describe_plan(options, plan))])
    if not only_plan:
        verdict = fit(options, plan)
        click.echo(f"{verdict.text}: {verdict.next_step}")
