"""Steps of `freeexport fit`: commands of this program, and the evaluations at the end."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from freeexport.evaluate.records import RUN
from freeexport.evaluate.settings import EvaluateOptions, Method
from freeexport.fit import splits
from freeexport.fit.options import FitOptions
from freeexport.fit.plan import Plan, least_lines, make_plan
from freeexport.system.output import check_output, output_directory
from freeexport.training.options import DISTILLING
from runtime.bundle.bundle import sha256_of
from runtime.bundle.json_file import read_object
from runtime.bundle.manifest import MANIFEST, ExitInput
from runtime.bundle.schema import Reader
from runtime.errors import OptionError

PLAN = "plan.json"
DONE = "done.json"
ANEW = "start anew with --overwrite"
FINISHED = "finished"  # key in DONE, which otherwise has the names of steps
# Options of both trainings. Then the weight of distillation, together and alone, and the learning
# rate of the exit alone.
PACE = {"schedule": "hold", "warmup": 0.03, "patience": 0}
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
        if not other and not (options.overwrite and FINISHED in finished_steps(places.work)):
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
        parts = splits.split_lines(lines, sizes, options.data)
        if plan.training is not None:
            parts["frozen"] = parts[splits.TRAIN][: plan.training.frozen_lines]
        with output_directory(places.work, PLAN, options.overwrite) as directory:
            (directory / "data").mkdir()
            splits.write_splits(parts, directory / "data")
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
        target = () if options.target == "cpu" else ("--target", options.target)
        phrases = () if options.data is None else ("--phrases", str(places.data("train")))
        arguments = ("convert", model, str(out), *target, "--precision", plan.precision, *phrases)
        return Step(name, arguments, seconds[name], out)

    if options.data is None:
        step = converting("convert", model, places.out)
        more = [
            *(["--exit", plan.drafting] if plan.drafting else []),
            *(["--overwrite"] * options.overwrite),
        ]
        return [replace(step, arguments=(*step.arguments, *more))]
    place = () if options.target == "cpu" else ("--device", options.device)
    threads = () if options.threads is None else ("--threads", str(options.threads))
    machine = (*place, *threads)

    def calibrate(name: str, bundle: Path) -> Step:
        rule = (
            ()
            if options.quality is None
            else ("--target-quality", str(options.quality), "--metric", options.metric)
        )
        lines = ("--data", str(places.data("calibration")), "--max-new-tokens", most)
        return Step(
            name,
            ("calibrate", str(bundle), *lines, *rule, *machine),
            seconds.get(name) or seconds["calibrate"],
        )

    def training(kind: str, model: str) -> Step:
        """Train all weights ("joint") or the exit alone ("exit"), to OUT.work/KIND."""
        found = plan.exit
        planned = plan.training
        alone = kind == "exit"
        assert found is not None
        assert planned is not None
        chosen = found.training("exit" if alone else "full")
        rate = RATE_ALONE[found.input] if alone else planned.learning_rate
        steps = seconds[kind] / planned.step
        if alone and len(planned.tune) > 1:
            steps /= ALONE[found.input]
        given: dict[str, object] = {
            **{name.replace("_", "-"): value for name, value in chosen.items()},
            "data": places.data("frozen" if alone else splits.TRAIN),
            "validation": places.data("validation"),
            **PACE,
            "learning-rate": rate,
        }
        if chosen["loss"] in DISTILLING:
            given["loss-alpha"] = ALPHA_ALONE if alone else ALPHA
        if options.threads is not None:
            given["threads"] = options.threads
        given |= {
            "batch-tokens": planned.batch_tokens,
            "time-limit": f"{seconds[kind] / 60:.2f}",
            "evaluate-every": max(1, int(steps / EVALUATIONS)),
        }
        listed = [text for name, value in given.items() for text in (f"--{name}", str(value))]
        out = places.work / kind
        arguments = ("train", model, str(out), *listed, *(["--bf16"] * planned.bf16))
        return Step(kind, arguments, seconds[kind], out)

    steps = [converting(GIVEN, model, places.work / GIVEN)]
    if "calibrate given" in seconds:
        steps.append(calibrate("calibrate given", places.work / GIVEN))
    for tune in plan.training.tune if plan.training else ():
        name = "joint" if tune == "full" else "exit"
        steps.append(training(name, model))
        model = str(steps[-1].output)
    if plan.exit is not None:
        bundle = places.work / TRAINED
        steps += [converting(TRAINED, model, bundle), calibrate("calibrate", bundle)]
    test = evaluation_of(options, plan, places)
    arguments = [f"{path}={','.join(methods)}" for path, methods in test.bundles]
    arguments += ["--data", str(test.data), "--samples", str(test.samples)]
    arguments += ["--max-new-tokens", most]
    for threshold in test.thresholds:
        arguments += ["--threshold", str(threshold)]
    arguments += ["--metric", *test.metrics, "--target-quality", str(test.quality), *machine]
    command = ("evaluate", *arguments, "--output", str(test.output))
    steps.append(Step("evaluate", command, seconds["evaluate"]))
    return steps


def evaluation_of(options: FitOptions, plan: Plan, places: Places) -> EvaluateOptions:
    """Return the options for comparing the bundles on held-out lines."""
    assert plan.texts is not None
    every: tuple[Method, ...] = ("full", "static", "free", "lossless")
    bundles = [
        (places.work / GIVEN, every if "calibrate given" in plan.seconds else ("full", "lossless"))
    ]
    if plan.exit is not None:
        bundles.append((places.work / TRAINED, every))
    return EvaluateOptions(
        bundles=tuple(bundles),
        data=places.data("test"),
        output=places.report,
        metrics=(options.metric,),
        thresholds=CURVE,
        samples=plan.lines["test"],
        max_new_tokens=plan.texts.most,
        threads=options.threads,
        device=options.device,
        quality=options.quality or 1.0,
    )


def finished_steps(work: Path) -> dict[str, Any]:
    """Return the record of the steps that are done, by name."""
    path = work / DONE
    return read_object(path, ANEW, OptionError) if path.is_file() else {}
