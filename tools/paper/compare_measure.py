"""Measures the bundles of the paper's comparison, and their PyTorch models, interleaved."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from freeexport.evaluate.evaluate import Evaluation, evaluate
from freeexport.evaluate.measure import OtherDecoder
from freeexport.evaluate.records import Records
from freeexport.evaluate.scores import speeds
from freeexport.evaluate.settings import Entry, EvaluateOptions
from runtime import Session
from runtime.bundle.bundle import Bundle
from tools.paper.compare_options import CompareOptions
from tools.paper.compare_plan import Measurement, settings
from tools.paper.eager import EAGER, EARLY, EagerDecoder
from tools.paper.threshold import PaperSession


def evaluated(
    measurement: Measurement,
    options: CompareOptions,
    places: Mapping[str, tuple[Path, str]],
    thresholds: Sequence[float],
    out: Path,
) -> tuple[Evaluation, list[str]]:
    """Evaluate the settings of a measurement, and return notes on those that are left out.

    Args:
        places: Bundle and checkpoint of each contestant, by name.
    """
    entries = []
    others: dict[tuple[str, str], OtherDecoder] = {}
    notes = []
    for one in measurement.contestants:
        path, checkpoint = places[one.name]
        bundle = Bundle.open(path)
        entries.append(Entry(one.name, bundle, settings(one, thresholds, bundle.manifest)))
        if "rollback" in one.methods and bundle.manifest.rollback_threshold is None:
            notes.append(f"rollback is left out on {one.name}: no token of its calibration exits")
        if methods := [method for method in one.methods if method in EAGER]:
            eager = EagerDecoder(
                bundle,
                checkpoint,
                options.device,
                threads=options.count,
                min_layer=options.calm_min_layer,
            )
            others |= {(one.name, method): eager.decode for method in methods}
    found = evaluate(
        EvaluateOptions(
            ((entries[0].bundle.path, ("full",)),),
            data=options.output / "test.jsonl",
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
    others.clear()
    gc.collect()  # engines and the models of PyTorch
    return found, notes


def open_paper_session(entry: Entry, options: EvaluateOptions, records: Records) -> Session:
    """Open a session that decodes as the authors' code does.

    Deep passes never run in the background, and an adaptive threshold is that of the authors.
    """
    given: dict[str, Any] = {
        "threads": options.count,
        "slots": 1,
        "device": options.device,
        "overlap": False,
        # A line must not use the output or the prompt of another setting.
        "draft_memory_mb": 0,
        "prefix_cache_mb": 0,
    }
    if "adaptive" not in entry.methods:
        return Session(entry.bundle.path, **given)
    state = records.last_state(entry.name, "adaptive")
    return PaperSession(entry.bundle.path, state=state, **given)


def described_rows(
    found: Evaluation, measurement: Measurement, options: CompareOptions
) -> list[dict[str, Any]]:
    """Return the rows with their recipe and first exit layer, and with speeds relative to PyTorch.

    Rows of `EarlyExits` are compared with its full model, which the first bundle then has. `eager`
    is the speed relative to `generate` of transformers, None if that was not measured.
    """
    contestants = {one.name: one for one in measurement.contestants}
    first = measurement.contestants[0].name
    generate = found.records.get((first, "eager"))
    loop = found.records.get((first, "eager-full"))
    rows = []
    for row in found.rows:
        one = contestants[row["bundle"]]
        records = found.records[one.name, row["setting"]]
        own = speeds(records, loop) if loop is not None and row["method"] in EARLY else {}
        rows.append(
            {
                **row,
                **own,
                "recipe": one.training.recipe,
                "exit_layer": options.calm_min_layer if row["method"] == "calm" else one.depth,
                "eager": None if generate is None else speeds(records, generate),
            }
        )
    return rows
