"""Run `freeexport fit`: convert, train, calibrate and compare.

Each step is a command of this program. Outputs stay in OUT.work until all are done, so an
interrupted run can be resumed. OUT appears last, complete.
"""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from freeexport.costs.verdict import Row, Verdict, keeps, too_few_lines
from freeexport.evaluate.evaluate import evaluate
from freeexport.evaluate.page import Story, write_evaluation
from freeexport.evaluate.records import RUN
from freeexport.evaluate.settings import EvaluateOptions, Method
from freeexport.evaluate.speed import measure_speed
from freeexport.fit.fit_options import FitOptions
from freeexport.fit.fit_plan import GIVEN, TRAINED, Plan, make_plan, min_lines, speed_options
from freeexport.fit.plan_table import describe_plan
from freeexport.fit.splits import TRAIN, read_lines, split_lines, write_splits
from freeexport.system.child import ChildError, run_child
from freeexport.system.load import load_note
from freeexport.system.output import check_output, link_or_copy, output_directory
from freeexport.system.progress import duration
from freeexport.system.sheet import Sheet
from freeexport.system.steps import Steps
from freeexport.task_metrics import metric_of
from freeexport.training.run_directory import last_checkpoint, run_directory
from freeexport.training.training_options import DISTILLING
from runtime.bundle.beta import NEVER_EXIT
from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import MANIFEST, ExitInput
from runtime.bundle.schema import Reader
from runtime.errors import FreeExportError, OptionError
from runtime.requests.thresholds import default_mode

AGAIN = "what was made is kept: give the same command again to go on"
ANEW = "start anew with --overwrite"
# Files and steps of OUT.work.
FIT = "fit.json"
PLAN = "plan"
FINISHED = "finished"
# Options of both trainings. Then the weight of distillation, together and alone, and the learning
# rate of the exit alone.
PACE = {"schedule": "hold", "warmup": 0.03, "patience": 0}
ALPHA = 2
ALPHA_ALONE = 4
RATE_ALONE: dict[ExitInput, float] = {"state": 5e-4, "feature": 1e-3, "fused": 1e-3}
# Thresholds shown beside the calibrated one. Nothing is chosen by them.
CURVE = (0.8, 0.95)
# Output lines that suggest next steps, which `fit` does itself.
UNASKED = ("next:", "does not pay:")


@dataclass(frozen=True)
class Step:
    """A command to run.

    Attributes:
        seconds: Expected duration.
        output: Path that exists only when complete. None: the command itself resumes its work.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: float
    output: Path | None = None

    @property
    def command(self) -> str:
        return shlex.join(("freeexport", *self.arguments))


def fit(options: FitOptions, plan: Plan) -> Verdict:
    """Run the remaining steps, and write the report and OUT.

    Returns the verdict. Its `next_step` is the command that serves OUT.

    Raises:
        FreeExportError: If a step fails. The same call resumes the run.
        OptionError: If the budget is too small.
    """
    if plan.missing:
        raise OptionError(plan.missing)
    steps = steps_of(options, plan)
    if options.data is None:
        _run(steps[0])
        return Verdict("neutral", _untrained(options, plan), shlex.join(_serving(options)))
    run = run_of(options)
    _run_pending(steps, run, options)
    found = evaluate(evaluation_of(options, plan))
    bundle, verdict = conclude(found.rows, options)
    plan_sheet = Sheet("Plan", ("", ""), tuple(describe_plan(options, plan)))
    title = f"{plan.name}, fitted to {options.data.name}"
    write_evaluation(found, options.report, Story(title, verdict, (plan_sheet, _done(steps, run))))
    with output_directory(options.out, MANIFEST, options.overwrite) as directory:
        shutil.copytree(bundle, directory, copy_function=link_or_copy, dirs_exist_ok=True)
    run.run(FINISHED, dict)
    return verdict


def planned(options: FitOptions, keep: bool) -> Plan:
    """Return the plan of the interrupted run in OUT.work, or a new one.

    With `keep`, a new plan is stored there together with the splits of the data, provided there are
    data and the budget is large enough. Also raises the errors of `make_plan`.

    Raises:
        OutputError: If existing files would be lost.
        OptionError: If the interrupted run has different options.
    """
    if keep:
        check_output(options.out, MANIFEST, options.overwrite)
    try:
        run = run_of(options)
        if run.finished(PLAN) and not (options.overwrite and run.finished(FINISHED)):
            plan: Plan = Reader(ANEW).read(Plan, run.read(PLAN), str(options.work))
            return plan
    except OptionError:
        if keep and not options.overwrite:
            raise
        if keep:
            check_output(options.work, FIT, overwrite=True)
    if options.data is None:
        return make_plan(options, [])
    if keep:
        check_output(options.report, RUN, options.overwrite)
    lines = read_lines(options.data, min_lines())
    plan = make_plan(options, lines)
    if not keep or plan.missing:
        return plan
    sizes = {name: count for name, count in plan.lines.items() if name != TRAIN}
    parts = split_lines(lines, sizes, options.data)
    if plan.training is not None:
        parts["frozen"] = parts[TRAIN][: plan.training.frozen_lines]
    for old in (options.work, options.report):
        shutil.rmtree(old, ignore_errors=True)
    run = run_of(options)
    run.begin()
    directory = options.split(TRAIN).parent
    directory.mkdir()
    write_splits(parts, directory)
    run.run(PLAN, asdict, plan)
    return plan


def run_of(options: FitOptions) -> Steps:
    """Return the steps in OUT.work that are done.

    Raises:
        OptionError: If there is a run with different options.
    """
    remedy = f"give the same options, choose another OUT, or {ANEW}"
    return Steps(options.work, FIT, options.recorded(), remedy=remedy)


def steps_of(options: FitOptions, plan: Plan) -> list[Step]:
    """Return the steps of a run, in order.

    The original model is converted first, because that reveals problems soonest.
    """
    if options.data is None:
        return [_conversion(options, plan, "convert", options.model)]
    steps = [_conversion(options, plan, GIVEN, options.model)]
    if plan.has_exit:
        steps.append(_calibration(options, plan, "calibrate given", GIVEN))
    model = options.model
    for kind in plan.trainings:
        steps.append(_training(options, plan, kind, model))
        model = str(options.work / kind)
    if plan.exit is not None:
        steps.append(_conversion(options, plan, TRAINED, model))
        steps.append(_calibration(options, plan, "calibrate", TRAINED))
    steps.append(_evaluation(options, plan))
    return steps


def _conversion(options: FitOptions, plan: Plan, name: str, model: str) -> Step:
    out = options.out if options.data is None else options.work / name
    given: dict[str, Any] = {} if options.target == "cpu" else {"target": options.target}
    given["precision"] = plan.precision
    if options.data is not None:
        given["phrases"] = options.split(TRAIN)
    elif plan.drafting:
        given["exit"] = plan.drafting
    overwrite = ["--overwrite"] if options.data is None and options.overwrite else []
    arguments = ("convert", model, str(out), *_flags(given), *overwrite)
    return Step(name, arguments, plan.seconds[name], out)


def _calibration(options: FitOptions, plan: Plan, name: str, bundle: str) -> Step:
    given: dict[str, Any] = {"data": options.split("calibration"), "max-new-tokens": _limit(plan)}
    if options.quality is not None:
        given |= {"target-quality": options.quality, "metric": options.metric}
    arguments = ("calibrate", str(options.work / bundle), *_flags(given), *_machine(options))
    return Step(name, arguments, plan.seconds[name])


def _training(options: FitOptions, plan: Plan, kind: str, model: str) -> Step:
    """Train all weights ("joint") or the exit alone ("exit"), to OUT.work/KIND."""
    training = plan.training
    assert plan.exit is not None
    assert training is not None
    alone = kind == "exit"
    chosen = plan.exit.training(kind)
    given: dict[str, Any] = {
        **{name.replace("_", "-"): value for name, value in chosen.items()},
        "data": options.split("frozen" if alone else TRAIN),
        "validation": options.split("validation"),
        **PACE,
        "learning-rate": RATE_ALONE[plan.exit.input] if alone else training.learning_rate,
    }
    if chosen["loss"] in DISTILLING:
        given["loss-alpha"] = ALPHA_ALONE if alone else ALPHA
    if options.threads is not None:
        given["threads"] = options.threads
    given["batch-tokens"] = training.batch_tokens
    given["time-limit"] = f"{plan.seconds[kind] / 60:.2f}"
    out = options.work / kind
    arguments = ("train", model, str(out), *_flags(given), *(["--bf16"] * training.bf16))
    return Step(kind, arguments, plan.seconds[kind], out)


def _evaluation(options: FitOptions, plan: Plan) -> Step:
    test = evaluation_of(options, plan)
    bundles = [f"{path}={','.join(methods)}" for path, methods in test.bundles]
    given = {"data": test.data, "samples": test.samples, "max-new-tokens": test.max_new_tokens}
    curve = [text for threshold in CURVE for text in ("--threshold", str(threshold))]
    scored = {"metric": options.metric, "target-quality": test.quality}
    output = ("--output", str(test.output))
    arguments = (*bundles, *_flags(given), *curve, *_flags(scored), *_machine(options), *output)
    return Step("evaluate", ("evaluate", *arguments), plan.seconds["evaluate"])


def evaluation_of(options: FitOptions, plan: Plan) -> EvaluateOptions:
    """Return the options for comparing the bundles on held-out lines."""
    every: tuple[Method, ...] = ("full", "static", "free", "lossless")
    bundles = [(options.work / GIVEN, every if plan.has_exit else ("full", "lossless"))]
    if plan.exit is not None:
        bundles.append((options.work / TRAINED, every))
    return EvaluateOptions(
        bundles=tuple(bundles),
        data=options.split("test"),
        output=options.report,
        metrics=(options.metric,),
        thresholds=CURVE,
        samples=plan.lines["test"],
        max_new_tokens=_limit(plan),
        threads=options.threads,
        device=options.device,
        quality=options.quality or 1.0,
    )


def _flags(given: dict[str, Any]) -> list[str]:
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def _machine(options: FitOptions) -> list[str]:
    given: dict[str, Any] = {} if options.target == "cpu" else {"device": options.device}
    if options.threads is not None:
        given["threads"] = options.threads
    return _flags(given)


def _limit(plan: Plan) -> int:
    """Return the maximum tokens of an output."""
    assert plan.texts is not None
    return plan.texts.max_output


def _serving(options: FitOptions) -> tuple[str, ...]:
    """Return the command that serves OUT."""
    place = () if options.target == "cpu" else ("--device", options.device)
    return ("freeexport", "serve", str(options.out), *place)


def pending_steps(steps: Sequence[Step], run: Steps) -> list[Step]:
    """Return the steps that are not done."""

    def is_done(step: Step) -> bool:
        if step.output is not None:
            return step.output.exists()
        return run.finished(step.name) and run.read(step.name)["arguments"] == list(step.arguments)

    return [step for step in steps if not is_done(step)]


def _run_pending(steps: Sequence[Step], run: Steps, options: FitOptions) -> None:
    """Run the steps that are not done."""
    pending = pending_steps(steps, run)
    if len(pending) < len(steps):
        done = ", ".join(step.name for step in steps if step not in pending)
        click.echo(f"done before: {done}", err=True)
    for step in pending:
        run.forget(step.name)
        run.run(step.name, _run, step)
        if step.arguments[0] == "calibrate":  # evaluated at another threshold
            shutil.rmtree(options.report, ignore_errors=True)


def _run(step: Step) -> dict[str, Any]:
    """Run a step in a child process, and return its arguments, seconds and output."""
    click.echo(f"{step.name}, about {duration(step.seconds)}: {step.command}", err=True)
    began = time.monotonic()
    try:
        said = run_child("freeexport", *_resumed(step))
    except ChildError as error:
        raise FreeExportError(f"{step.name} failed: {error}; {AGAIN}") from None
    except KeyboardInterrupt:
        click.echo(AGAIN, err=True)
        raise
    output = [line for line in said.splitlines() if not line.startswith(UNASKED)]
    for line in output:
        click.echo(line)
    seconds = time.monotonic() - began
    return {"arguments": step.arguments, "seconds": seconds, "output": output}


def _resumed(step: Step) -> tuple[str, ...]:
    """Return a step's arguments, with --resume if its training was interrupted."""
    interrupted = (
        step.arguments[0] == "train" and step.output and last_checkpoint(run_directory(step.output))
    )
    return (*step.arguments, "--resume") if interrupted else step.arguments


def _done(steps: Sequence[Step], run: Steps) -> Sheet:
    """Tabulate the steps with their times, commands and outcomes."""
    rows = []
    for step in steps:
        entry = run.read(step.name) if run.finished(step.name) else {}
        lines = [line for line in entry.get("output", ()) if line.strip()]
        lines = [line for line in lines if not line.startswith("written:")]
        told = ("agreement of", "warning", "verdict", "kept")
        outcome = [line for line in lines if line.startswith(told)] or lines[-1:]
        took = duration(entry["seconds"]) if entry else ""
        rows.append((step.name, took, step.command, "; ".join(outcome)))
    return Sheet("What was done", ("step", "time#", "command", "outcome"), tuple(rows))


def _untrained(options: FitOptions, plan: Plan) -> str:
    """Describe a bundle that was made without data, with the speed of mode lossless.

    Speech has no built-in prompts, so its speed is not measured.
    """
    bundle = Bundle.open(options.out)
    text = f"{plan.why}; {default_mode(bundle)}"
    if bundle.manifest.speech is not None:
        return text
    report = measure_speed(speed_options(options, plan))
    speed = f"{report['verdict']}, on built-in prompts; your own may gain more or less"
    busy = load_note(report["settings"]["busy"])
    return "; ".join(filter(None, (f"{text}: {speed}", busy)))


def conclude(rows: Sequence[Row], options: FitOptions) -> tuple[Path, Verdict]:
    """Choose the bundle to serve, and explain why.

    A bundle whose full model scores worse than the other's is not served, however fast it is. Mode
    free counts only at its calibrated threshold.
    """
    metric = metric_of(options.metric)
    quality = options.quality
    share = (FitOptions.quality if quality is None else quality) or 0.0
    full = {row["bundle"]: row["scores"][metric.name] for row in rows if row["method"] == "full"}
    highest = max(score["value"] for score in full.values())
    good = [row for row in rows if full[row["bundle"]]["value"] >= share * highest]
    kept = [
        row
        for row in good
        if row["method"] == "lossless"
        or (quality is not None and row["calibrated"] and keeps(row, metric, quality))
    ]
    best = max(kept, key=lambda row: row["request_low"] or 0.0)
    speed, low, high = (best[name] for name in ("request_speed", "request_low", "request_high"))
    bounds = f"95 %: {low:.2f} to {high:.2f}, {best['lines']} lines"
    if best["method"] == "free":
        value, lower, upper = (
            100 * best["scores"][metric.name][name] for name in ("relative", "low", "high")
        )
        tokens = f"at {value:.1f} % of the full model's {metric.label} ({lower:.1f} to {upper:.1f})"
    elif best["same"] == 1:
        tokens = "with every token equal"
    else:
        tokens = f"with {best['same']:.1%} of the outputs equal"
    faster = low > 1
    mode = best["method"]
    text = f"{speed:.2f}x a request {tokens} ({bounds})"
    too_few = too_few_lines(full[best["bundle"]], best["lines"], metric, share)
    if not faster:
        whose = "the trained model" if best["bundle"] == TRAINED else "the given model"
        scope = (
            f"every token of {whose}"
            if quality is None or too_few
            else f"{100 * quality:.4g} % of the {metric.label} of {whose}"
        )
        text = (
            "nothing is surely faster than the full model: of the settings that keep "
            f"{scope}, the best gives {text}"
        )
        best = max(
            good, key=lambda row: (full[row["bundle"]]["value"], row["method"] == "lossless")
        )
        mode = "lossless" if mode == "lossless" and speed >= 1 else "full"
    if too_few and (quality is not None or len(full) > 1):
        text += f"; no verdict on quality: {too_few}"
    if len(full) > 1 and best["bundle"] == GIVEN:
        text += "; the model as it was given, as the trained one is no better"
    if len(full) > 1:
        others = ", ".join(f"{name} {score['value']:.3f}" for name, score in full.items())
        click.echo(f"{metric.label} of the full models: {others}")
    bundle = options.work / best["bundle"]
    default = "free" if Bundle.open(bundle).manifest.threshold < NEVER_EXIT else "lossless"
    serve = (*_serving(options), *(() if mode == default else ("--mode", mode)))
    return bundle, Verdict("good" if faster else "neutral", text, shlex.join(serve))
