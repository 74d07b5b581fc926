"""An evaluation, from its options to its figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freeexport import __version__
from freeexport.calibration.source import engines_hash, reference_of
from freeexport.checkpoints.examples import DataError, read_examples
from freeexport.evaluation.figures import Curve, Row, curves_of, rows_of
from freeexport.evaluation.measure import CALM, Entry, entries_of, measure
from freeexport.evaluation.options import EvaluateOptions
from freeexport.evaluation.records import Record, Records, check_output
from freeexport.metrics import Metric, Reference, metric_of
from freeexport.system.jsonl import Request
from freeexport.system.machine import Machine, detect_machine
from freeexport.system.output_file import write_whole
from freeexport.system.plot import save_figure
from runtime.bundle.beta_mixture import NEVER_EXIT
from runtime.bundle.bundle import sha256_of
from runtime.bundle.costs import TOLERATED
from runtime.machine.machine import usable_cores

# So many of the outputs may be cut by the limit of tokens before a note says so.
MOST_CUT = 0.1


@dataclass(frozen=True)
class Evaluation:
    """`rows` and `curves` of what was decoded; `records` by bundle and setting, then line; `notes` are sentences that
    the user should read."""

    options: EvaluateOptions
    entries: list[Entry]
    metrics: list[Metric]
    rows: list[Row]
    curves: list[Curve]
    requests: dict[int, Request]
    references: dict[int, Reference]
    records: Mapping[tuple[str, str], Mapping[int, Sequence[Record]]]
    notes: list[str]
    machine: Machine
    threads: int


def evaluate(options: EvaluateOptions) -> Evaluation:
    """Decode what the directory `output` does not have yet, and compare. Raises DataError, MetricError, BundleError,
    OptionError."""
    metrics = [metric_of(name) for name in options.metrics]
    entries = entries_of(options)
    requests = read_examples(options.data, options.samples)
    references = _references(requests, options.data)
    for metric in metrics:  # before long work: does it fit?
        metric.table([reference.texts[0] for reference in references.values()], list(references.values()))
    run = run_of(options, entries)
    check_output(options.output, run, options.overwrite)
    with Records(options.output, run, options.overwrite) as records:
        loss = _calm(options, entries)
        measure(entries, requests, options, records)
        found = records.by_setting()
    rows = rows_of(entries, found, references, metrics)
    return Evaluation(
        options=options,
        entries=entries,
        metrics=metrics,
        rows=rows,
        curves=curves_of(rows, metrics[0].name, options.quality),
        requests={request.line_number: request for request in requests},
        references=references,
        records=found,
        notes=[*_trained(options, entries, loss), *_doubts(rows, found)],
        machine=detect_machine(),
        threads=options.threads or usable_cores(),
    )


def _references(requests: Sequence[Request], data: Path) -> dict[int, Reference]:
    found = {}
    for request in requests:
        reference = reference_of(request)
        if reference is None:
            raise DataError(
                f"{data}, line {request.line_number} has no 'target' and no 'references' to compare with; give every "
                "line one"
            )
        found[request.line_number] = reference
    return found


def run_of(options: EvaluateOptions, entries: Sequence[Entry]) -> dict[str, Any]:
    """What outputs depend on. Metrics and rounds may change: nothing is decoded again for them."""
    return {
        "bundles": {
            entry.name: [engines_hash(entry.bundle.manifest), entry.bundle.manifest.threshold] for entry in entries
        },
        "settings": {entry.name: [setting.name for setting in entry.settings] for entry in entries},
        "data": sha256_of(options.data),
        "samples": options.samples,
        "max_new_tokens": options.max_new_tokens,
        "calm": [options.calm_from, options.calm_decay, options.calm_single] if options.calm_model else None,
        "threads": options.threads or usable_cores(),
        "freeexport": __version__,
    }


def _calm(options: EvaluateOptions, entries: Sequence[Entry]) -> str | None:
    """Engines of method calm, where it is asked for; the loss that they were trained with."""
    if options.calm_model is None:
        return None
    # The builder, which nothing else here needs.
    from freeexport.evaluation.calm_engines import write_calm

    entry = next(one for one in entries if any(setting.method == "calm" for setting in one.settings))
    return write_calm(options.calm_model, entry.bundle.manifest, options.calm_from, options.output / CALM)


def _trained(options: EvaluateOptions, entries: Sequence[Entry], loss: str | None) -> list[str]:
    """What numbers mean where a method is not run on what it was trained for."""
    notes = []
    if loss not in (None, "weighted-ce") and not options.calm_single:
        notes.append(
            f"calm ran on a checkpoint that was trained with {loss or 'an unknown loss'}, not weighted-ce: exits after "
            "layers that no loss looked at show what such exits give, not what CALM can do"
        )
    for entry in entries:
        manifest = entry.bundle.manifest
        exiting = [setting for setting in entry.settings if setting.method not in ("full", "calm")]
        methods = list(dict.fromkeys(setting.method for setting in exiting))
        if not methods:
            continue
        if not manifest.exit_trained:
            known = "was not trained" if manifest.exit_trained is False else "does not say whether it was trained"
            notes.append(
                f"{entry.name} {known} for its exit after layer {manifest.exit_layer}: its figures for "
                f"{', '.join(methods)} show what such an exit gives, not what the methods can do"
            )
        if manifest.threshold >= NEVER_EXIT and {"free", "rollback"} & set(methods):
            notes.append(f"{entry.name} is not calibrated: free ran at the given thresholds only, rollback never exits")
    return notes


def _doubts(rows: Sequence[Row], found: Mapping[tuple[str, str], Mapping[int, Sequence[Record]]]) -> list[str]:
    notes = []
    busy = max(one.busy for lines in found.values() for turns in lines.values() for one in turns)
    if busy > TOLERATED:
        notes.append(f"other processes kept up to {busy:.1f} cores busy, so speeds are not to be trusted")
    for row in rows:
        if row.setting.method != "full":
            continue
        notes.extend(
            f"{name} gives the full model of {row.bundle} 0: it does not fit these data, or this model; nothing is "
            "relative to that"
            for name, score in row.scores.items()
            if not score.value
        )
        if row.cut > MOST_CUT:
            notes.append(f"{row.cut:.0%} of the outputs of {row.bundle} were cut at the limit; raise --max-new-tokens")
    return notes


def write(found: Evaluation) -> None:
    """Figures, pictures and the page, beside the outputs. Needs matplotlib."""
    from freeexport.evaluation.page import page
    from freeexport.evaluation.picture import quality_speed
    from freeexport.evaluation.report import as_csv, as_dict, as_markdown

    out = found.options.output
    write_whole(out / "evaluation.json", json.dumps(as_dict(found), indent=2) + "\n")
    write_whole(out / "evaluation.csv", as_csv(found))
    write_whole(out / "results.md", as_markdown(found))
    figure = quality_speed(found)
    for name in ("curve.png", "curve.svg"):
        save_figure(figure, out / name)
    write_whole(out / "report.html", page(found))
