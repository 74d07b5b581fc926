"""Run the steps of `freeexport fit`, which are commands of this program.

Their outputs stay in OUT.work until all are done. Finished steps are not repeated, so an
interrupted run can be resumed. OUT appears last, complete.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np

from freeexport.conversion.convert import convert
from freeexport.conversion.options import ConvertOptions
from freeexport.costs.timing import interleave
from freeexport.costs.verdict import Verdict, bundle_verdict
from freeexport.evaluate.evaluate import evaluate
from freeexport.evaluate.page import Story, write
from freeexport.evaluate.records import RUN
from freeexport.evaluate.scores import Row, speed_interval
from freeexport.evaluate.settings import EvaluateOptions, Method
from freeexport.evaluate.speed import speed_prompts
from freeexport.fit import splits
from freeexport.fit.paper import COMPARED, SEEDS, comparison, written
from freeexport.fit.plan import (
    SPEED_SECONDS,
    FitOptions,
    Plan,
    describe_plan,
    least_lines,
    make_plan,
)
from freeexport.system.child import ChildError, run_child
from freeexport.system.load import load_note, other_load
from freeexport.system.output import check_output, link_or_copy, output_directory, write_whole
from freeexport.system.page import human_bytes
from freeexport.system.progress import BY_PARENT, Advance, duration, progress
from freeexport.system.sheet import Sheet
from freeexport.task_metrics import metric_of
from freeexport.training.options import DISTILLING, BuiltInLoss
from freeexport.training.run_directory import last_checkpoint, run_directory
from runtime.bundle.beta import NEVER_EXIT
from runtime.bundle.bundle import Bundle, sha256_of
from runtime.bundle.manifest import MANIFEST, ExitInput
from runtime.bundle.schema import Reader
from runtime.errors import FreeExportError, OptionError
from runtime.json_file import read_object
from runtime.options import Mode
from runtime.session import Session

PLAN = "plan.json"
DONE = "done.json"
ANEW = "start anew with --overwrite"
AGAIN = "what was made is kept: give the same command again to go on"
FINISHED = "finished"  # key in DONE, which otherwise has the names of steps
# Options of both trainings. Then the weight of distillation, together and alone, and the learning
# rate of the exit alone.
PACE = ("--schedule", "hold", "--warmup", "0.03", "--patience", "0")
ALPHA = 2
ALPHA_ALONE = 4
RATE_ALONE: dict[ExitInput, float] = {"state": 5e-4, "feature": 1e-3, "fused": 1e-3}
# Time of a step that trains the exit alone, relative to one that trains all weights.
ALONE: dict[ExitInput, float] = {"state": 0.1, "feature": 0.2, "fused": 0.2}
EVALUATIONS = 6  # evaluations per training
# Thresholds shown beside the calibrated one. Nothing is chosen by them.
CURVE = (0.8, 0.95)
# Names of the bundles of the trained model and of the original one.
TRAINED = "trained"
GIVEN = "given"
# Speed measurement without data: prompts, tokens of each, and maximum rounds.
SPEED_PROMPTS = 4
SPEED_TOKENS = 64
SPEED_ROUNDS = 5
# Output lines that suggest next steps, which `fit` does itself.
UNASKED = ("next:", "does not pay:", "note: exit after layer")


@dataclass(frozen=True)
class Step:
    """A command to run.

    Attributes:
        name: Name of the step.
        arguments: Arguments of the command.
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


@dataclass(frozen=True)
class Places:
    """Paths that a run writes."""

    out: Path

    @classmethod
    def of(cls, options: FitOptions) -> Places:
        return cls(Path(os.path.abspath(options.out)))

    @property
    def work(self) -> Path:
        return self.out.with_name(f"{self.out.name}.work")

    @property
    def report(self) -> Path:
        return self.out.with_name(f"{self.out.name}.report")

    def data(self, split: str) -> Path:
        return self.work / "data" / f"{split}.jsonl"


def planned(options: FitOptions, keep: bool) -> Plan:
    """Return the plan of the interrupted run in OUT.work, or a new one.

    With `keep`, a new plan is stored there together with the splits of the data, provided there are
    data and the budget is large enough. Also raises the errors of `make_plan`.

    Raises:
        OutputError: If existing files would be lost.
        OptionError: If the interrupted run has different options.
    """
    places = Places.of(options)
    kept = keep and options.data is not None
    if keep:
        check_output(places.out, MANIFEST, options.overwrite)
    record = {
        **options.recorded(),
        "sha256": None if options.data is None else sha256_of(options.data),
    }
    if (places.work / PLAN).is_file():
        content = read_object(places.work / PLAN, ANEW, OptionError)
        before = content.get("options")
        before = before if isinstance(before, dict) else {}
        other = [name for name in record if record[name] != before.get(name)]
        if not other and not (options.overwrite and FINISHED in _done(places.work)):
            read: Plan = Reader(ANEW).read(Plan, content.get("plan"), str(places.work / PLAN))
            return read
        if kept and not options.overwrite:
            name = other[0]
            raise OptionError(
                f"{places.work} holds a run with {name} {before.get(name)!r}, not "
                f"{record[name]!r}; give the same options, choose another OUT, or {ANEW}"
            )
    if kept:
        check_output(places.work, PLAN, options.overwrite)
        check_output(places.report, RUN, options.overwrite)
    lines = [] if options.data is None else splits.read_lines(options.data, least_lines())
    plan = make_plan(options, lines)
    if kept and options.data is not None and not plan.missing:
        sizes = {name: count for name, count in plan.lines.items() if name != splits.TRAIN}
        parts = splits.split(lines, sizes, options.data)
        if plan.training is not None:
            parts["frozen"] = parts[splits.TRAIN][: plan.training.frozen_lines]
        with output_directory(places.work, PLAN, options.overwrite) as directory:
            (directory / "data").mkdir()
            splits.write(parts, directory / "data")
            content = {"options": record, "plan": asdict(plan)}
            (directory / PLAN).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(places.report, ignore_errors=True)
    return plan


def steps_of(options: FitOptions, plan: Plan, places: Places) -> list[Step]:
    """Return the steps of a run, in order.

    The original model is converted first, because that reveals problems soonest.
    """
    seconds = plan.seconds
    model = options.model
    most = str(plan.texts.most if plan.texts else 0)

    def converting(name: str, model: str, out: Path) -> Step:
        return Step(
            name, ("convert", model, str(out), "--precision", plan.precision), seconds[name], out
        )

    if options.data is None:
        step = converting("convert", model, places.out)
        more = [
            *(["--exit", plan.drafting] if plan.drafting else []),
            *(["--overwrite"] * options.overwrite),
        ]
        return [replace(step, arguments=(*step.arguments, *more))]
    threads = () if options.threads is None else ("--threads", str(options.threads))

    def calibrate(name: str, bundle: Path) -> Step:
        rule = (
            ()
            if options.quality is None
            else ("--target-quality", str(options.quality), "--metric", options.metric)
        )
        lines = ("--data", str(places.data("calibration")), "--max-new-tokens", most)
        return Step(
            name,
            ("calibrate", str(bundle), *lines, *rule, *threads),
            seconds.get(name) or seconds["calibrate"],
        )

    steps = [converting(GIVEN, model, places.work / GIVEN)]
    if "calibrate given" in seconds:
        steps.append(calibrate("calibrate given", places.work / GIVEN))
    if options.paper and plan.exit is not None:
        for name, seed in product(COMPARED, SEEDS):
            loss, methods = COMPARED[name]
            bundle = bundle_of(name, seed, places)
            steps.append(
                _training(
                    "joint",
                    model,
                    plan,
                    places,
                    f"{name}-{seed}-joint",
                    options.threads,
                    loss,
                    seed,
                )
            )
            if name == "exit":
                joint = str(steps[-1].output)
                steps.append(
                    _training(
                        "exit",
                        joint,
                        plan,
                        places,
                        f"{name}-{seed}-alone",
                        options.threads,
                        loss,
                        seed,
                    )
                )
            steps.append(
                replace(converting(TRAINED, str(steps[-1].output), bundle), name=bundle.name)
            )
            if "free" in methods:
                steps.append(calibrate(f"calibrate {bundle.name}", bundle))
    else:
        for tune in plan.training.tune if plan.training else ():
            name = "joint" if tune == "full" else "exit"
            steps.append(_training(name, model, plan, places, name, options.threads))
            model = str(steps[-1].output)
        if plan.exit is not None:
            bundle = places.work / TRAINED
            steps += [converting(TRAINED, model, bundle), calibrate("calibrate", bundle)]
    for seed, test in enumerate(evaluations(options, plan, places)):
        arguments = [f"{path}={','.join(methods)}" for path, methods in test.bundles]
        arguments += [
            "--data",
            str(test.data),
            "--samples",
            str(test.samples),
            "--max-new-tokens",
            most,
        ]
        arguments += [
            part for threshold in test.thresholds for part in ("--threshold", str(threshold))
        ]
        arguments += ["--metric", *test.metrics, "--target-quality", str(test.quality), *threads]
        command = ("evaluate", *arguments, "--output", str(test.output))
        steps.append(Step(f"evaluate {seed}" if seed else "evaluate", command, seconds["evaluate"]))
    return steps


def bundle_of(name: str, seed: int, places: Places) -> Path:
    """Return the path of the bundle of a compared training with a seed."""
    return places.work / f"{name}-{seed}"


def _training(
    kind: str,
    model: str,
    plan: Plan,
    places: Places,
    name: str,
    threads: int | None,
    loss: BuiltInLoss = "logit-kd",
    seed: int = 0,
) -> Step:
    """Return a step that trains all weights ("joint") or the exit alone ("exit").

    It writes OUT.work/NAME.
    """
    found = plan.exit
    training = plan.training
    alone = kind == "exit"
    assert found is not None
    assert plan.texts is not None
    assert training is not None
    chosen = found.training("exit" if alone else "full", loss)
    what: list[object] = [
        part for name, value in chosen.items() for part in (f"--{name.replace('_', '-')}", value)
    ]
    what += [
        "--data",
        places.data("frozen" if alone else splits.TRAIN),
        "--validation",
        places.data("validation"),
    ]
    alpha, rate = (
        (ALPHA_ALONE, RATE_ALONE[found.input]) if alone else (ALPHA, training.learning_rate)
    )
    steps = (
        plan.seconds[kind]
        / training.step
        / (ALONE[found.input] if alone and len(training.tune) > 1 else 1)
    )
    what += [*PACE, "--learning-rate", rate]
    what += ["--loss-alpha", alpha] if chosen["loss"] in DISTILLING else []
    what += [] if threads is None else ["--threads", threads]
    what += ["--batch-tokens", training.batch_tokens]
    what += [
        "--time-limit",
        f"{plan.seconds[kind] / 60:.2f}",
        "--evaluate-every",
        max(1, int(steps / EVALUATIONS)),
    ]
    what += ["--seed", seed] if seed else []
    out = places.work / name
    arguments = ("train", model, str(out), *map(str, what), *(["--bf16"] if training.bf16 else []))
    return Step(name, arguments, plan.seconds[kind], out)


def evaluations(options: FitOptions, plan: Plan, places: Places) -> list[EvaluateOptions]:
    """Return options for comparing the bundles on held-out lines, once or for each seed."""
    assert plan.texts is not None
    every: tuple[Method, ...] = ("full", "static", "free", "lossless")
    bundles = [
        (places.work / GIVEN, every if "calibrate given" in plan.seconds else ("full", "lossless"))
    ]
    if plan.exit is not None:
        bundles.append((places.work / TRAINED, every))
    once = EvaluateOptions(
        bundles=tuple(bundles),
        data=places.data("test"),
        output=places.report,
        metrics=(options.metric,),
        thresholds=CURVE,
        samples=plan.lines["test"],
        max_new_tokens=plan.texts.most,
        threads=options.threads,
        quality=options.quality or 1.0,
    )
    if not options.paper or plan.exit is None:
        return [once]
    return [
        replace(
            once,
            bundles=tuple(
                (bundle_of(name, seed, places), methods) for name, (_, methods) in COMPARED.items()
            ),
            output=places.work / f"evaluation-{seed}" if seed else places.report,
        )
        for seed in SEEDS
    ]


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
    done = _done(places.work)
    if options.data is None:
        # Runs in this process, which has imported the libraries for a conversion already.
        click.echo(
            f"{steps[0].name}, about {duration(steps[0].seconds)}: {steps[0].command}", err=True
        )
        manifest = convert(
            options.model,
            places.out,
            ConvertOptions(
                precision=plan.precision, exit=plan.drafting, overwrite=options.overwrite
            ),
        )
        size = human_bytes(sum(file.size for file in manifest.files.values()))
        click.echo(f"{options.out}: {size}, {'' if manifest.verified else 'not '}verified")
        of_exit = bundle_verdict(Bundle.open(places.out))
        if plan.drafting is not None and of_exit.level == "bad":
            click.echo(of_exit.text)
        speed = measured_speed(places.out, options.threads)
        text = (
            f"{plan.why}; lossless drafts {plan.drafts}, with every token "
            f"equal{speed and f': {speed}'}"
        )
        return Verdict("neutral", text, f"freeexport serve {shlex.quote(str(options.out))}")
    _run(steps, _pending(steps, done), done, places)
    found, *others = map(evaluate, evaluations(options, plan, places))
    bundle, verdict = conclude(found.rows, options, places)
    plan_sheet = Sheet("Plan", ("", ""), tuple(describe_plan(options, plan)))
    compared = [comparison([found, *others])] if others else []
    sheets = (*compared, plan_sheet, _tried(steps, done))
    write(
        found, places.report, Story(f"{plan.name}, fitted to {options.data.name}", verdict, sheets)
    )
    for name, text in (item for sheet in compared for item in written(sheet).items()):
        write_whole(places.report / name, text)
    with output_directory(places.out, MANIFEST, options.overwrite) as directory:
        shutil.copytree(bundle, directory, copy_function=link_or_copy, dirs_exist_ok=True)
    _mark(places, done, FINISHED, {})
    return verdict


def measured_speed(path: Path, threads: int | None) -> str:
    """Compare the speed of modes full and lossless on the built-in prompts, as a phrase.

    Takes at most SPEED_SECONDS. Returns "" for speech, which has no built-in prompts.
    """
    bundle = Bundle.open(path)
    if bundle.manifest.speech is not None:
        return ""
    prompts = speed_prompts(bundle, None, SPEED_PROMPTS)
    modes: tuple[Mode, ...] = ("full", "lossless")
    runs: dict[tuple[int, int], list[tuple[float, int]]] = defaultdict(list)
    with (
        Session(path, threads=threads, slots=1, draft_memory_mb=0) as session,
        other_load() as load,
    ):

        def decode(mode: Mode, prompt: list[int]) -> tuple[float, int]:
            ids = np.array(prompt, np.int64)
            began = time.monotonic()
            result = session.generate(ids, mode=mode, max_new_tokens=SPEED_TOKENS, ignore_eos=True)
            return time.monotonic() - began, len(result.token_ids)

        end = time.monotonic() + SPEED_SECONDS
        for turn in interleave(modes, prompts, SPEED_ROUNDS, decode, title="measuring speed"):
            for mode, run in enumerate(turn.runs):
                runs[turn.prompt, mode].append(run)
            if time.monotonic() > end:
                break
    measured = sorted({prompt for prompt, _ in runs})
    seconds = np.array(
        [
            [np.median([run[0] for run in runs[prompt, mode]]) for mode in (0, 1)]
            for prompt in measured
        ]
    )
    tokens = sum(runs[prompt, 0][0][1] for prompt in measured)
    full, lossless = seconds.sum(axis=0)
    low, high = speed_interval(seconds[:, 1], seconds[:, 0])
    bounds = "" if low is None or high is None else f", 95 %: {low:.2f} to {high:.2f}"
    text = (
        f"{full / lossless:.2f}x full ({tokens / lossless:.0f} tokens/s against "
        f"{tokens / full:.0f}{bounds}) on {len(measured)} built-in prompts, your own may gain more "
        "or less"
    )
    return "; ".join(filter(None, (text, load_note(load.cores))))


def conclude(rows: Sequence[Row], options: FitOptions, places: Places) -> tuple[Path, Verdict]:
    """Choose the bundle to serve, and explain why.

    A bundle whose full model scores worse than the other's is not served, however fast it is. Mode
    free counts only at its calibrated threshold.
    """
    metric = options.metric
    quality = options.quality
    full = {
        row["bundle"]: row["scores"][metric]["value"] for row in rows if row["method"] == "full"
    }
    least = (FitOptions.quality if quality is None else quality) or 0.0
    good = [row for row in rows if full[row["bundle"]] >= least * max(full.values())]
    keeps = [
        row
        for row in good
        if row["method"] == "lossless"
        or (
            quality is not None
            and row["calibrated"]
            and (row["scores"][metric]["low"] or 0.0) >= quality
        )
    ]
    best = max(keeps, key=lambda row: row["request_low"] or 0.0)
    speed, low, high = (best[name] for name in ("request_speed", "request_low", "request_high"))
    bounds = f"95 %: {low:.2f} to {high:.2f}, {best['lines']} lines"
    if best["method"] == "free":
        kept, worst, most = (
            100 * best["scores"][metric][name] for name in ("relative", "low", "high")
        )
        tokens = (
            f"at {kept:.1f} % of the full model's {metric_of(metric).label} ({worst:.1f} to "
            f"{most:.1f})"
        )
    elif best["same"] == 1:
        tokens = "with every token equal"
    else:
        tokens = f"with {best['same']:.1%} of the outputs equal"
    faster = low > 1
    mode = best["method"]
    text = f"{speed:.2f}x a request {tokens} ({bounds})"
    if not faster:
        best = max(good, key=lambda row: (full[row["bundle"]], row["method"] == "lossless"))
        mode = "lossless" if mode == "lossless" and speed >= 1 else "full"
        text = f"nothing is surely faster than the full model: the best gives {text}"
    if len(full) > 1 and best["bundle"] == GIVEN:
        text += "; the model as it was given, as the trained one is no better"
    if len(full) > 1:
        others = ", ".join(f"{name} {value:.3f}" for name, value in full.items())
        click.echo(f"{metric_of(metric).label} of the full models: {others}")
    bundle = places.work / best["bundle"]
    default = "free" if Bundle.open(bundle).manifest.threshold < NEVER_EXIT else "lossless"
    serve = (
        "freeexport",
        "serve",
        str(options.out),
        *(() if mode == default else ("--mode", mode)),
    )
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
        told = [
            line
            for line in lines
            if line.startswith(("agreement of", "warning", "verdict", "kept"))
        ] or lines[-1:]
        took = duration(entry["seconds"]) if "seconds" in entry else ""
        rows.append((step.name, took, step.command, "; ".join(told)))
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
                for test in (places.report, *places.work.glob("evaluation-*")):
                    shutil.rmtree(test, ignore_errors=True)  # measured at another threshold
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


def _done(work: Path) -> dict[str, Any]:
    path = work / DONE
    return read_object(path, ANEW, OptionError) if path.is_file() else {}


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
