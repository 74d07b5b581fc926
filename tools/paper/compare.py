"""The comparison of FREE's paper: trains, converts, calibrates and measures every row.

Every finished step is a JSON file below the output, so that an interrupted run continues.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from freeexport.calibrate.calibrate import CalibrateOptions, calibrate
from freeexport.calibrate.threshold import Rule, choose, rollback_limit
from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.tokenizer_files import load_tokenizer
from freeexport.conversion.convert import build_and_test, convert
from freeexport.conversion.convert_options import DEFAULT_ENCODER_CAPACITY, Verify
from freeexport.conversion.recalibrate import update_bundle
from freeexport.evaluate import page
from freeexport.system.output import write_whole
from freeexport.system.steps import Steps
from runtime.bundle.beta import NEVER_EXIT
from runtime.bundle.manifest import Manifest
from tools.paper.compare_check import Resolved
from tools.paper.compare_measure import described_rows, evaluated
from tools.paper.compare_options import CompareOptions
from tools.paper.compare_plan import (
    MAIN_TABLE,
    SAMPLES,
    Contestant,
    Measurement,
    PaperTraining,
    bundles_of,
    measurements_of,
    trainings_of,
)
from tools.paper.recipes import RECIPES, recipe_options, train_recipe
from tools.paper.threshold import paper_choice

RUN = "compare.json"
# Tokens of the line that is decoded before any training.
CHECKED_TOKENS = 8
# Recipes whose training needs the most memory. One step of each is tried first.
LARGEST = ("free", "free-drop", "static")


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
    steps.run("check", _check, options)
    steps.run("data", _cut_data, options)
    found: dict[str, Any] = {}
    for seed in options.seeds:
        made: dict[str, Any] = {"trainings": {}, "calibrations": {}, "measurements": {}}
        for training in trainings_of(measurements):
            name = training.name
            made["trainings"][name] = steps.run(
                f"train-{seed}-{name}", _train, options, seed, training
            )
        for name, bundle in bundles_of(measurements).items():
            steps.run(f"convert-{seed}-{name}", _convert, options, seed, bundle)
            if bundle.calibrated:
                made["calibrations"][name] = steps.run(
                    f"calibrate-{seed}-{name}", _calibrate, options, seed, bundle
                )
        for measurement in measurements:
            step = f"measure-{seed}-{measurement.name.replace('/', '-')}"
            made["measurements"][measurement.name] = steps.run(
                step, _measure, options, seed, measurement, made["calibrations"]
            )
        found[str(seed)] = made
    return {"run": checked.run, "notes": list(checked.notes), "seeds": found}


def _check(options: CompareOptions) -> dict[str, Any]:
    """Train a step, convert, and decode a line in every method of the largest measurement.

    What does not work on this device, or does not fit into its memory, fails here and not after
    hours.
    """
    place = options.output / "check"
    shutil.rmtree(place, ignore_errors=True)
    short = replace(options, output=place, steps=1, epochs=None, minutes=None, lines=1, rounds=1)
    seed = options.seeds[0]
    plan = measurements_of(options)
    trainings = trainings_of(plan)
    of_recipe = {one.recipe: one for one in reversed(trainings)}
    tried = [of_recipe[name] for name in LARGEST if name in of_recipe] or trainings[:1]
    model = str(_place(short, "checkpoints", seed, tried[0]))
    place.mkdir(parents=True)
    try:
        _cut_data(short)
        for training in tried:
            _train(short, seed, training)
        manifest = _built(model, place / "bundle", tried[0].exit_layer, short)
        found, _ = evaluated(
            plan[0],
            replace(short, max_new_tokens=CHECKED_TOKENS),
            {one.name: (place / "bundle", model) for one in plan[0].contestants},
            options.thresholds[:1],
            place / "measured",
        )
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return {
        "trained": [training.name for training in tried],
        "target": manifest.target,
        "precision": manifest.precision,
        "decoded": [row["setting"] for row in found.rows],
    }


def _cut_data(options: CompareOptions) -> dict[str, Any]:
    """Write the lines that are read, with inputs cut to the length of those in training.

    A prompt is cut at the end, as the authors do, and keeps the special tokens around it. Trainings
    evaluate on the validation lines, and keep the last weights.
    """
    checkpoint = open_checkpoint(options.model)
    cuts = checkpoint.described().encoder is not None
    tokenizer = load_tokenizer(checkpoint)
    limit = options.max_tokens or DEFAULT_ENCODER_CAPACITY
    files = {
        "validation": (options.validation, options.lines),
        "calibration": (options.calibration, options.calibration_lines),
        "test": (options.data / "test.jsonl", options.lines),
    }
    counts = {}
    for name, (path, max_lines) in files.items():
        with path.open(encoding="utf-8") as file:
            lines = [json.loads(line) for line in islice(filter(str.strip, file), max_lines)]
        long = 0
        for line in lines if cuts else ():
            if isinstance(line.get("input"), str):
                encoded = tokenizer(
                    line["input"],
                    truncation=True,
                    max_length=limit,
                    return_offsets_mapping=True,
                )
                kept = line["input"][: max(end for _, end in encoded["offset_mapping"])]
                long += kept.strip() != line["input"].strip()
                line["input"] = kept
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_whole(options.output / f"{name}.jsonl", text)
        counts[name] = {"lines": len(lines), "cut": long}
    return counts


def _place(
    options: CompareOptions, kind: str, seed: int, one: PaperTraining | Contestant | Measurement
) -> Path:
    """Return the directory of a checkpoint, bundle or measurement."""
    return options.output / kind / f"seed-{seed}" / one.name


def _train(options: CompareOptions, seed: int, training: PaperTraining) -> dict[str, Any]:
    """Train a checkpoint, unless a run that was killed before its step was written has."""
    out = _place(options, "checkpoints", seed, training)
    recipe = RECIPES[training.recipe]
    began = time.monotonic()
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        training_options = recipe_options(
            recipe,
            options.data / "train.jsonl",
            validation=options.output / "validation.jsonl",
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


def _convert(options: CompareOptions, seed: int, one: Contestant) -> dict[str, Any]:
    """Convert a checkpoint. A bundle of the exit that it was trained for is verified and timed."""
    whole = one.depth == one.training.exit_layer
    manifest = _built(
        str(_place(options, "checkpoints", seed, one.training)),
        _place(options, "bundles", seed, one),
        one.depth,
        options,
        verify="quick" if whole else "none",
        measure=whole,
    )
    return {"source_sha256": manifest.source_sha256, "weight_bytes": manifest.weight_bytes}


def _built(
    model: str,
    out: Path,
    depth: int,
    options: CompareOptions,
    verify: Verify = "quick",
    measure: bool = False,
) -> Manifest:
    """Write the bundle of a checkpoint, with its TensorRT engines."""
    out.parent.mkdir(parents=True, exist_ok=True)
    given = options.conversion(open_checkpoint(model).described(), depth)
    manifest = convert(model, out, replace(given, verify=verify, measure=measure))
    if manifest.target == "tensorrt":
        build_and_test(out, max_batch=1)
    return manifest


def _calibrate(options: CompareOptions, seed: int, one: Contestant) -> dict[str, Any]:
    """Calibrate a bundle, and choose thresholds from fewer lines, too.

    `product` is the product's rule, `authors` that of the authors' code.
    """
    path = _place(options, "bundles", seed, one)
    given = CalibrateOptions(
        samples=options.calibration_lines,
        max_new_tokens=options.max_new_tokens,
        device=options.device,
        threads=options.count,
    )
    result = calibrate(str(path), options.output / "calibration.jsonl", given)
    traces = result.traces
    chosen = {}
    every = options.calibration_lines
    for count in sorted({every, *(count for count in options.samples if count < every)}):
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
    options: CompareOptions,
    seed: int,
    measurement: Measurement,
    calibrations: Mapping[str, Any],
) -> dict[str, Any]:
    """Measure the settings of a measurement, interleaved. The main one gets pages of its own."""
    thresholds: Sequence[float] = options.thresholds
    if measurement.name == SAMPLES:
        chosen = calibrations[measurement.contestants[0].name]["chosen"].values()
        every = {threshold for one in chosen for threshold in one.values()}
        thresholds = sorted(one for one in every if one < NEVER_EXIT)
    places = {
        one.name: (
            _place(options, "bundles", seed, one),
            str(_place(options, "checkpoints", seed, one.training)),
        )
        for one in measurement.contestants
    }
    out = _place(options, "measured", seed, measurement)
    found, notes = evaluated(measurement, options, places, thresholds, out)
    if measurement.name == MAIN_TABLE:
        page.write_evaluation(found, out)
    report = found.report
    return {
        **{name: value for name, value in report.items() if name != "rows"},
        "notes": [*report["notes"], *notes],
        "rows": described_rows(found, measurement, options),
    }
