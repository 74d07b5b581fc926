"""The comparison of FREE's paper: trains, converts, calibrates and measures every row.

Every finished step is a JSON file below the output, so that an interrupted run continues.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from freeexport.calibrate.calibrate import CalibrateOptions, calibrate
from freeexport.calibrate.threshold import Rule, choose, rollback_limit
from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.conversion.convert import build_and_test, convert
from freeexport.conversion.options import ConvertOptions
from freeexport.conversion.recalibrate import update_bundle
from freeexport.evaluate import page
from freeexport.evaluate.evaluate import Evaluation, evaluate
from freeexport.evaluate.measure import OtherDecoder, open_session
from freeexport.evaluate.records import Records
from freeexport.evaluate.scores import speeds
from freeexport.evaluate.settings import Entry, EvaluateOptions
from freeexport.system.output import write_whole
from runtime import Session
from runtime.bundle.beta import NEVER_EXIT
from runtime.bundle.bundle import Bundle
from runtime.machine.device import Device
from tools.paper.calm import CalmDecoder
from tools.paper.compare_options import CompareOptions, Resolved
from tools.paper.compare_plan import (
    MAIN_TABLE,
    SAMPLES,
    Contestant,
    Measurement,
    PaperTraining,
    bundles_of,
    measurements_of,
    settings,
    trainings_of,
)
from tools.paper.eager import EagerDecoder
from tools.paper.recipes import RECIPES, recipe_options, train_recipe
from tools.paper.threshold import PaperSession, paper_choice
from tools.steps import Steps

VALIDATION = "validation.jsonl"
RUN = "compare.json"


def compare(
    checked: Resolved, announce: Callable[[str], object] = lambda name: None
) -> dict[str, Any]:
    """Run all steps that are not finished, and return the results by seed.

    Args:
        checked: Checked options.
        announce: Called with the name of each step that begins.

    Raises:
        OptionError: If the output holds another comparison.
        FreeExportError: If a step fails.
    """
    options = checked.options
    steps = Steps(options.output, RUN, checked.run, announce)
    measurements = measurements_of(options)
    steps.run("validation", _cut_validation, options)
    found: dict[str, Any] = {}
    for seed in options.seeds:
        directories = SeedDirectories(options.output, f"seed-{seed}")
        made: dict[str, Any] = {"trainings": {}, "calibrations": {}, "measurements": {}}
        for training in trainings_of(measurements):
            name = training.name
            made["trainings"][name] = steps.run(
                f"train-{seed}-{name}", _train, training, seed, options, directories
            )
        for name, bundle in bundles_of(measurements).items():
            steps.run(f"convert-{seed}-{name}", _convert, bundle, options, directories)
            if bundle.calibrated:
                made["calibrations"][name] = steps.run(
                    f"calibrate-{seed}-{name}", _calibrate, bundle, options, directories
                )
        for measurement in measurements:
            step = f"measure-{seed}-{measurement.name.replace('/', '-')}"
            made["measurements"][measurement.name] = steps.run(
                step, _measure, measurement, options, directories, made["calibrations"]
            )
        found[str(seed)] = made
    return {"run": checked.run, "notes": list(checked.notes), "seeds": found}


def _cut_validation(options: CompareOptions) -> dict[str, Any]:
    """Write the first validation lines. Trainings evaluate on them, and keep the last weights."""
    with options.validation.open(encoding="utf-8") as file:
        lines = list(islice((line for line in file if line.strip()), options.lines))
    write_whole(options.output / VALIDATION, "".join(lines))
    return {"lines": len(lines)}


class SeedDirectories(NamedTuple):
    """Directories of one seed: its part `seed` in directories below `output`."""

    output: Path
    seed: str

    def checkpoint(self, training: PaperTraining) -> Path:
        return self.output / "checkpoints" / self.seed / training.name

    def bundle(self, one: Contestant) -> Path:
        return self.output / "bundles" / self.seed / one.name

    def calm(self, one: Contestant) -> Path:
        return self.output / "calm" / self.seed / one.name

    def measured(self, measurement: Measurement) -> Path:
        return self.output / "measured" / self.seed / measurement.name


def _train(
    training: PaperTraining, seed: int, options: CompareOptions, directories: SeedDirectories
) -> dict[str, Any]:
    """Train a checkpoint, unless a run that was killed before its step was written has."""
    out = directories.checkpoint(training)
    recipe = RECIPES[training.recipe]
    began = time.monotonic()
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        training_options = recipe_options(
            recipe,
            options.data / "train.jsonl",
            validation=options.output / VALIDATION,
            exit_layer=training.exit_layer,
            steps=options.steps,
            epochs=options.epochs,
            batch_tokens=options.batch_tokens,
            learning_rate=options.learning_rate,
            seed=seed,
            time_limit=options.minutes,
            max_tokens=options.max_tokens,
            evaluate_every=options.steps,
            bf16=options.bf16,
            threads=options.threads,
        )
        train_recipe(options.model, out, training_options, options.device)
    checkpoint = open_checkpoint(str(out))
    trained = None if checkpoint.exit is None else asdict(checkpoint.exit)
    return {
        "recipe": recipe.name,
        "description": recipe.description,
        "exit_layer": training.exit_layer,
        "sha256": checkpoint.sha256,
        "exit": trained,
        "seconds": round(time.monotonic() - began, 1),
    }


def _convert(
    one: Contestant, options: CompareOptions, directories: SeedDirectories
) -> dict[str, Any]:
    """Convert a checkpoint. A bundle of the exit that it was trained for is verified and timed."""
    out = directories.bundle(one)
    out.parent.mkdir(parents=True, exist_ok=True)
    whole = one.depth == one.training.exit_layer
    on_cpu = Device.parse(options.device).index is None
    manifest = convert(
        str(directories.checkpoint(one.training)),
        out,
        ConvertOptions(
            exit_layer=one.depth,
            precision=options.precision,
            target="cpu" if on_cpu else options.engines,
            verify="quick" if whole else "none",
            measure=whole,
            overwrite=True,
        ),
    )
    if manifest.target == "tensorrt":
        build_and_test(out, max_batch=1)
    return {"source_sha256": manifest.source_sha256, "weight_bytes": manifest.weight_bytes}


def _calibrate(
    one: Contestant, options: CompareOptions, directories: SeedDirectories
) -> dict[str, Any]:
    """Calibrate a bundle, and choose thresholds from fewer lines, too.

    `product` is the product's rule, `authors` that of the authors' code.
    """
    path = directories.bundle(one)
    most = options.calibration_lines
    given = CalibrateOptions(
        samples=most,
        max_new_tokens=options.max_new_tokens,
        device=options.device,
        threads=options.count,
    )
    result = calibrate(str(path), options.calibration, given)
    traces = result.traces
    chosen = {}
    for count in sorted({most, *(count for count in options.samples if count < most)}):
        first = traces.part(np.arange(len(traces.length)) < count)
        chosen[str(len(first.length))] = {
            "product": choose(first, Rule()).threshold,
            "authors": paper_choice(first).threshold,
        }
    calibration = result.calibration
    if calibration.rollback_threshold is None:  # nothing exits at the calibrated threshold
        limit, _ = rollback_limit(traces, min(options.thresholds))
        calibration = replace(calibration, rollback_threshold=limit)
    update_bundle(path, calibration)
    return {
        "agreement": traces.agreement,
        "tokens": traces.tokens,
        "sequences": len(traces.length),
        "threshold": calibration.threshold,
        "rollback_threshold": calibration.rollback_threshold,
        "chosen": chosen,
    }


def _measure(
    measurement: Measurement,
    options: CompareOptions,
    directories: SeedDirectories,
    calibrations: Mapping[str, Any],
) -> dict[str, Any]:
    """Measure the settings of a measurement, interleaved. The main one gets pages of its own."""
    thresholds: Sequence[float] = options.thresholds
    if measurement.name == SAMPLES:
        chosen = calibrations[measurement.contestants[0].name]["chosen"].values()
        every = {threshold for one in chosen for threshold in one.values()}
        thresholds = sorted(one for one in every if one < NEVER_EXIT)
    entries = []
    others: dict[tuple[str, str], OtherDecoder] = {}
    notes: list[str] = []
    for one in measurement.contestants:
        bundle = Bundle.open(directories.bundle(one))
        entries.append(Entry(one.name, bundle, settings(one, thresholds, bundle.manifest)))
        if "rollback" in one.methods and bundle.manifest.rollback_threshold is None:
            notes.append(f"rollback is left out on {one.name}: no token of its calibration exits")
        decoders, said = other_decoders(one, bundle, options, directories)
        others |= {(one.name, method): decoder for method, decoder in decoders.items()}
        notes += said
    out = directories.measured(measurement)
    found = evaluate(
        EvaluateOptions(
            tuple((entry.bundle.path, ("full",)) for entry in entries),
            data=options.data / "test.jsonl",
            output=out,
            metrics=options.metrics,
            samples=options.lines,
            rounds=options.rounds,
            max_new_tokens=options.max_new_tokens,
            threads=options.threads,
            device=options.device,
        ),
        entries,
        others,
        open_paper_session,
    )
    if measurement.name == MAIN_TABLE:
        page.write_evaluation(found, out)
    others.clear()
    gc.collect()  # engines and the model of PyTorch
    report = found.report
    return {
        **{name: value for name, value in report.items() if name != "rows"},
        "notes": [*report["notes"], *notes],
        "rows": described_rows(found, measurement, options),
    }


def other_decoders(
    one: Contestant, bundle: Bundle, options: CompareOptions, directories: SeedDirectories
) -> tuple[dict[str, OtherDecoder], list[str]]:
    """Return the decoders of methods that no session has, by method, and notes on them."""
    checkpoint = str(directories.checkpoint(one.training))
    found: dict[str, OtherDecoder] = {}
    notes: list[str] = []
    calm = [method for method in one.methods if method.startswith("calm")]
    if calm:
        least = options.calm_min_layer if "calm" in calm else one.depth
        decoder = CalmDecoder(bundle, checkpoint, directories.calm(one), least, options.count)
        found |= dict.fromkeys(calm, decoder.decode)
        notes += decoder.notes if "calm" in calm else []
    if "eager" in one.methods:
        eager = EagerDecoder(bundle, checkpoint, options.device, options.count)
        found["eager"] = eager.decode
    return found, notes


def open_paper_session(entry: Entry, options: EvaluateOptions, records: Records) -> Session:
    """Open the session of a bundle, whose adaptive threshold is that of the authors' code."""
    if "adaptive" not in entry.methods:
        return open_session(entry, options, records)
    return PaperSession(
        entry.bundle.path,
        state=records.last_state(entry.name, "adaptive"),
        threads=options.count,
        slots=1,
        device=options.device,
        draft_memory_mb=0,
        prefix_cache_mb=0,
    )


def described_rows(
    found: Evaluation, measurement: Measurement, options: CompareOptions
) -> list[dict[str, Any]]:
    """Return the rows with their recipe and first exit layer, and with speeds relative to PyTorch.

    `eager` is None if PyTorch was not measured with them.
    """
    contestants = {one.name: one for one in measurement.contestants}
    whole = found.records.get((measurement.contestants[0].name, "eager"))
    rows = []
    for row in found.rows:
        one = contestants[row["bundle"]]
        records = found.records[one.name, row["setting"]]
        rows.append(
            {
                **row,
                "recipe": one.training.recipe,
                "exit_layer": options.calm_min_layer if row["method"] == "calm" else one.depth,
                "eager": None if whole is None else speeds(records, whole),
            }
        )
    return rows
