"""Run the steps of `freeexport fit`, which are commands of this program.

Their outputs stay in OUT.work until all are done. Finished steps are not repeated, so an
interrupted run can be resumed. OUT appears last, complete.
"""

from __future__ import annotations

import json
import shlex
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np

from freeexport.conversion.convert import convert
from freeexport.conversion.options import ConvertOptions
from freeexport.costs.exit_gain import timed_requests
from freeexport.costs.verdict import Row, Verdict, bundle_verdict, keeps, too_few_lines
from freeexport.evaluate.evaluate import evaluate
from freeexport.evaluate.page import Story, write_evaluation
from freeexport.evaluate.speed import speed_prompts
from freeexport.fit.options import FitOptions
from freeexport.fit.plan import SPEED_SECONDS, Plan
from freeexport.fit.plan_table import describe_plan
from freeexport.fit.steps import (
    DONE,
    FINISHED,
    GIVEN,
    TRAINED,
    Places,
    Step,
    evaluation_of,
    finished_steps,
    steps_of,
)
from freeexport.system.child import ChildError, run_child
from freeexport.system.load import load_note
from freeexport.system.output import link_or_copy, output_directory, write_whole
from freeexport.system.page import human_bytes
from freeexport.system.progress import BY_PARENT, Advance, duration, progress
from freeexport.system.sheet import Sheet
from freeexport.task_metrics import metric_of
from freeexport.training.run_directory import last_checkpoint, run_directory
from runtime.bundle.beta import NEVER_EXIT
from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import MANIFEST
from runtime.errors import FreeExportError, OptionError
from runtime.options.generation_options import Mode
from runtime.requests.thresholds import default_mode
from runtime.session import Session

AGAIN = "what was made is kept: give the same command again to go on"
# Speed measurement without data: prompts, tokens of each, and maximum rounds.
SPEED_PROMPTS = 4
SPEED_TOKENS = 64
SPEED_ROUNDS = 5
# Output lines that suggest next steps, which `fit` does itself.
UNASKED = ("next:", "does not pay:", "note: exit after layer")


def fit(options: FitOptions, plan: Plan) -> Verdict:
    """Run the remaining steps, and write the report and OUT.

    Returns the verdict. Its `next_step` is the command that serves OUT.

    Raises:
        FreeExportError: If a step fails. The same call resumes the run.
        OptionError: If the budget is too small.
    """
    if plan.missing:
        raise OptionError(plan.missing)
    places = Places.of(options)
    steps = steps_of(options, plan, places)
    done = finished_steps(places.work)
    if options.data is None:
        # Runs in this process, which has imported the libraries for a conversion already.
        click.echo(
            f"{steps[0].name}, about {duration(steps[0].seconds)}: {steps[0].command}", err=True
        )
        manifest = convert(
            options.model,
            places.out,
            ConvertOptions(
                precision=plan.precision,
                target=options.target,
                exit=plan.drafting,
                overwrite=options.overwrite,
            ),
        )
        size = human_bytes(sum(file.size for file in manifest.files.values()))
        click.echo(f"{options.out}: {size}, {'' if manifest.verified else 'not '}verified")
        opened = Bundle.open(places.out)
        of_exit = bundle_verdict(opened)
        if plan.drafting is not None and of_exit.level == "bad":
            click.echo(of_exit.text)
        speed = measured_speed(places.out, options.threads, options.device)
        text = f"{plan.why}; {default_mode(opened)}{speed and f': {speed}'}"
        return Verdict("neutral", text, shlex.join(_serving(options)))
    _run(steps, _pending(steps, done), done, places)
    found = evaluate(evaluation_of(options, plan, places))
    bundle, verdict = conclude(found.rows, options, places)
    plan_sheet = Sheet("Plan", ("", ""), tuple(describe_plan(options, plan)))
    title = f"{plan.name}, fitted to {options.data.name}"
    story = Story(title, verdict, (plan_sheet, _tried(steps, done)))
    write_evaluation(found, places.report, story)
    with output_directory(places.out, MANIFEST, options.overwrite) as directory:
        shutil.copytree(bundle, directory, copy_function=link_or_copy, dirs_exist_ok=True)
    _mark(places, done, FINISHED, {})
    return verdict


def _serving(options: FitOptions) -> tuple[str, ...]:
    """Return the command that serves OUT."""
    place = () if options.target == "cpu" else ("--device", options.device)
    return ("freeexport", "serve", str(options.out), *place)


def measured_speed(path: Path, threads: int | None, device: str = "cpu") -> str:
    """Compare the speed of modes full and lossless on the built-in prompts, as a phrase.

    Takes at most SPEED_SECONDS. Returns "" for speech, which has no built-in prompts.
    """
    bundle = Bundle.open(path)
    if bundle.manifest.speech is not None:
        return ""
    prompts = [np.array(ids, np.int64) for ids in speed_prompts(bundle, None, SPEED_PROMPTS)]
    modes: tuple[Mode, ...] = ("full", "lossless")
    settings = [
        {"mode": mode, "max_new_tokens": SPEED_TOKENS, "ignore_eos": True} for mode in modes
    ]
    with Session(
        path, threads=threads, slots=1, device=device, draft_memory_mb=0, prefix_cache_mb=0
    ) as session:
        times = timed_requests(session, settings, prompts, rounds=SPEED_ROUNDS, limit=SPEED_SECONDS)
    full, lossless = times.tokens / times.seconds.sum(axis=0)
    low, high = times.interval(1, 0)
    bounds = "" if low is None or high is None else f", 95 %: {low:.2f} to {high:.2f}"
    text = (
        f"{times.speed(1, 0):.2f}x full ({lossless:.0f} tokens/s against {full:.0f}{bounds}) on "
        f"{len(times.seconds)} built-in prompts, your own may gain more or less"
    )
    return "; ".join(filter(None, (text, load_note(times.cores))))


def conclude(rows: Sequence[Row], options: FitOptions, places: Places) -> tuple[Path, Verdict]:
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
        value, worst, most = (
            100 * best["scores"][metric.name][name] for name in ("relative", "low", "high")
        )
        tokens = f"at {value:.1f} % of the full model's {metric.label} ({worst:.1f} to {most:.1f})"
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
    bundle = places.work / best["bundle"]
    default = "free" if Bundle.open(bundle).manifest.threshold < NEVER_EXIT else "lossless"
    serve = (*_serving(options), *(() if mode == default else ("--mode", mode)))
    return bundle, Verdict("good" if faster else "neutral", text, shlex.join(serve))


def _tried(steps: Sequence[Step], done: Mapping[str, Any]) -> Sheet:
    """Tabulate the steps with their times, commands and outcomes."""
    rows = []
    for step in steps:
        entry = done.get(step.name, {})
        lines = [
            line
            for line in str(entry.get("output", "")).splitlines()
            if line.strip() and line[:8] != "written:"
        ]
        outcome = [
            line
            for line in lines
            if line.startswith(("agreement of", "warning", "verdict", "kept"))
        ] or lines[-1:]
        took = duration(entry["seconds"]) if "seconds" in entry else ""
        rows.append((step.name, took, step.command, "; ".join(outcome)))
    return Sheet("What was done", ("step", "time#", "command", "outcome"), tuple(rows))


def _pending(steps: Sequence[Step], done: Mapping[str, Any]) -> list[Step]:
    """Return the steps to run: all from the first unfinished one, except complete ones.

    Each step depends on the ones before it.
    """
    for place, step in enumerate(steps):
        complete = step.output is not None and step.output.exists()
        if not complete and done.get(step.name, {}).get("arguments") != list(step.arguments):
            return [
                step for step in steps[place:] if step.output is None or not step.output.exists()
            ]
    return []


def _run(
    steps: Sequence[Step], pending: Sequence[Step], done: dict[str, Any], places: Places
) -> None:
    """Run the pending steps, with progress over all steps."""
    total = sum(step.seconds for step in steps)
    clock = RunProgress(total, total - sum(step.seconds for step in pending))
    if len(pending) < len(steps):
        click.echo(
            f"done before: {', '.join(step.name for step in steps if step not in pending)}",
            err=True,
        )
    with progress("fit, seconds", total, clock.passed, left=clock.left) as advance:
        for step in pending:
            click.echo(f"{step.name}, about {duration(step.seconds)}: {step.command}", err=True)
            began = time.monotonic()
            try:
                with clock.ticking(step.seconds, advance):
                    said = run_child(
                        "freeexport",
                        *_going_on(step, places),
                        variables={BY_PARENT: "1"},
                        show=_show,
                    )
            except ChildError as error:
                raise FreeExportError(f"{step.name} failed: {error}; {AGAIN}") from None
            except KeyboardInterrupt:
                click.echo(AGAIN, err=True)
                raise
            output = "".join(
                f"{line}\n" for line in said.splitlines() if not line.startswith(UNASKED)
            )
            click.echo(output, nl=False)
            if step.arguments[0] == "calibrate":
                # Measured at another threshold.
                shutil.rmtree(places.report, ignore_errors=True)
            if places.work.exists():
                entry = {
                    "arguments": step.arguments,
                    "seconds": time.monotonic() - began,
                    "output": output,
                }
                _mark(places, done, step.name, entry)


def _show(line: str) -> None:
    if not line.startswith(UNASKED):
        click.echo(line, err=True)


def _going_on(step: Step, places: Places) -> tuple[str, ...]:
    """Return a step's arguments, with --resume if its training was interrupted."""
    interrupted = (
        step.arguments[0] == "train" and step.output and last_checkpoint(run_directory(step.output))
    )
    return (*step.arguments, "--resume") if interrupted else step.arguments


def _mark(places: Places, done: dict[str, Any], name: str, entry: Mapping[str, Any]) -> None:
    done[name] = entry
    write_whole(places.work / DONE, json.dumps(done, indent=2) + "\n")


class RunProgress:
    """Progress of a run in estimated seconds.

    A step counts for at most its estimate.

    Args:
        total: Estimated seconds of all steps.
        passed: Those of finished steps.
    """

    def __init__(self, total: float, passed: float) -> None:
        self.total = total
        self.passed = passed

    def left(self) -> float | None:
        """Return the estimated seconds left. None if the last step takes longer than estimated."""
        left = self.total - self.passed
        return left if left >= 1 else None

    @contextmanager
    def ticking(self, seconds: float, advance: Advance) -> Iterator[None]:
        """Advance once a second while the block runs, and by the rest of `seconds` at its end."""
        end = self.passed + seconds
        over = threading.Event()

        def tick() -> None:
            while not over.wait(1.0):
                self._move(min(1.0, end - self.passed), advance)

        thread = threading.Thread(target=tick, name="fit", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        self._move(end - self.passed, advance)

    def _move(self, seconds: float, advance: Advance) -> None:
        self.passed += seconds
        advance(seconds)
