"""Comparison of decoding methods on a task, for `freeexport evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from freeexport import __version__
from freeexport.calibrate.sources import engines_hash, fitting_prompts, reference_of
from freeexport.checkpoints.examples import DataError, read_examples
from freeexport.costs.bytes import row_share
from freeexport.costs.verdict import Row, setting_verdicts
from freeexport.evaluate.measure import OpenSession, OtherDecoders, measure, open_session
from freeexport.evaluate.records import Lines, Records, busiest
from freeexport.evaluate.scores import curves_of, rows_of
from freeexport.evaluate.settings import METHODS, WITHOUT_EXIT, Entry, EvaluateOptions, entries_of
from freeexport.system.environment import environment
from freeexport.system.jsonl import InputLine
from freeexport.system.load import load_note
from freeexport.task_metrics import Metric, Reference, metric_of
from runtime import Session
from runtime.bundle.beta import NEVER_EXIT
from runtime.bundle.bundle import Bundle, sha256_of
from runtime.bundle.manifest import MANIFEST
from runtime.errors import OptionError

# Share of outputs that reach the token limit above which a note is added.
MOST_CUT = 0.1
_COMPARED_WITH_FULL = "no line has a target: outputs are compared with those of the full model"


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation.

    Attributes:
        requests: Requests by line.
        references: References by line.
        records: Records by bundle and setting, then by line.
        report: All results, as written to JSON.
    """

    options: EvaluateOptions
    entries: list[Entry]
    metrics: list[Metric]
    requests: dict[int, InputLine]
    references: dict[int, Reference]
    records: Mapping[tuple[str, str], Lines]
    report: dict[str, Any]

    @property
    def rows(self) -> list[Row]:
        rows: list[Row] = self.report["rows"]
        return rows


def evaluate(
    options: EvaluateOptions,
    entries: Sequence[Entry] | None = None,
    others: OtherDecoders | None = None,
    open_with: OpenSession = open_session,
) -> Evaluation:
    """Decode all requests without a record in `output`, and score and compare the settings.

    Args:
        entries: Bundles with their settings. Default: those of the options.
        others: Decoders of settings with methods that no session has.

    Raises:
        DataError: If the data cannot be used.
        MetricError: If a metric does not fit the data.
        BundleError: If a bundle cannot be opened.
        OptionError: If options do not fit together, or if `output` holds another run.
    """
    data = options.data
    if data is None or not options.metrics:
        raise OptionError("scores need a data file and metrics; measure_speed needs neither")
    metrics = [metric_of(name) for name in options.metrics]
    entries = entries_of(options) if entries is None else list(entries)
    requests = read_examples(data, options.samples)
    references = _references(data, requests, metrics)
    without_targets = not references
    records = Records(options.output, run_of(options, entries), options.overwrite)

    def prompts(session: Session) -> dict[int, Any]:
        return {
            request.line_number: prompt for request, prompt in fitting_prompts(session, requests)
        }

    measure(entries, options, records, prompts_of=prompts, others=others, open_with=open_with)
    found = records.by_setting()
    made = environment()
    if without_targets:
        whole = found[entries[0].name, "full"]
        references = {line: Reference((turns[0].text,)) for line, turns in whole.items()}
    instructions = made["machine"]["kernels"]
    rows = rows_of(entries, found, references, metrics=metrics, instructions=instructions)
    notes = _notes(entries, rows, found)
    if without_targets:
        notes.append(_COMPARED_WITH_FULL)
    report = {
        **made,
        "bundles": {entry.name: _about_bundle(entry.bundle) for entry in entries},
        "data": str(data),
        "data_sha256": sha256_of(data),
        "references": "full" if without_targets else "targets",
        "lines": rows[0]["lines"],
        "rounds": options.rounds,
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "threads": options.count,
        "quality": options.quality,
        "metrics": {metric.name: metric.signature for metric in metrics},
        "verdicts": setting_verdicts(rows, metrics[0], options.quality),
        # Byte model: cost of a further row of a call as a share of the first row's.
        "row_shares": {
            entry.name: row_share(entry.bundle.manifest.precision, instructions)
            for entry in entries
        },
        "rows": rows,
        "curves": curves_of(rows, metrics[0], options.quality),
        "notes": notes,
    }
    lines = {request.line_number: request for request in requests}
    return Evaluation(
        options,
        entries,
        metrics,
        requests=lines,
        references=references,
        records=found,
        report=report,
    )


def _references(
    data: Path, requests: Sequence[InputLine], metrics: Sequence[Metric]
) -> dict[int, Reference]:
    """Return the references by line. Empty if no line has any.

    Raises:
        DataError: If only some lines have references.
        MetricError: If a metric does not fit the references.
    """
    given = {request.line_number: reference_of(request) for request in requests}
    references = {line: reference for line, reference in given.items() if reference is not None}
    if references and len(references) < len(given):
        line = next(line for line, reference in given.items() if reference is None)
        raise DataError(
            f"{data}, line {line} has no 'target' and no 'references', "
            "which other lines have; give every line one, or none, "
            "to compare with what the full model writes"
        )
    if references:
        texts = [reference.texts[0] for reference in references.values()]
        for metric in metrics:  # raises before decoding if a metric does not fit
            metric.table(texts, list(references.values()))
    return references


def run_of(options: EvaluateOptions, entries: Sequence[Entry]) -> dict[str, Any]:
    """Return everything that outputs depend on.

    Metrics and rounds are left out, because changing them does not invalidate records.
    """
    manifests = {entry.name: entry.bundle.manifest for entry in entries}
    return {
        "bundles": {
            name: [engines_hash(manifest), manifest.threshold]
            for name, manifest in manifests.items()
        },
        "settings": {entry.name: [setting.name for setting in entry.settings] for entry in entries},
        "data": None if options.data is None else sha256_of(options.data),
        "samples": options.samples,
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "scored": bool(options.metrics),
        "threads": options.count,
        "device": options.device,
        "freeexport": __version__,
    }


def _about_bundle(bundle: Bundle) -> dict[str, Any]:
    """Return facts about the weights, engines and calibration of a bundle, for JSON."""
    facts = (
        "source",
        "source_sha256",
        "precision",
        "layers",
        "exit_layer",
        "threshold",
        "exit_trained",
        "kernels",
    )
    calibration = bundle.calibration
    rule = ("method", "target", "risk", "delta", "sequences", "max_pending")
    return {
        **{name: getattr(bundle.manifest, name) for name in facts},
        "manifest_sha256": sha256_of(bundle.path / MANIFEST),
        "calibration": None
        if calibration is None
        else {name: getattr(calibration, name) for name in rule},
    }


def _notes(
    entries: Sequence[Entry], rows: Sequence[Row], found: Mapping[tuple[str, str], Lines]
) -> list[str]:
    """Return notes on methods without the training they need, and on doubtful results."""
    notes = []
    for entry in entries:
        manifest = entry.bundle.manifest
        # Other decoders have their own notes.
        methods = [name for name in entry.methods if name in METHODS and name not in WITHOUT_EXIT]
        if methods and not manifest.exit_trained:
            known = (
                "was not trained"
                if manifest.exit_trained is False
                else "does not say whether it was trained"
            )
            notes.append(
                f"{entry.name} {known} for its exit after layer {manifest.exit_layer}: "
                f"its figures for {', '.join(methods)} show what such an exit gives, "
                "not what the methods can do"
            )
        if manifest.threshold >= NEVER_EXIT and {"published", "free", "rollback"} & set(methods):
            notes.append(
                f"{entry.name} is not calibrated: free ran at the given thresholds only, "
                "rollback without one never exits"
            )
    busy = load_note(busiest(found.values()))
    notes += [busy] if busy else []
    for row in rows:
        if row["method"] != "full":
            continue
        if zero := [name for name, score in row["scores"].items() if not score["value"]]:
            notes.append(
                f"{', '.join(zero)} of the full model of {row['bundle']}: 0, which does not fit "
                "these data, or this model; nothing is relative to that"
            )
        if row["cut"] > MOST_CUT:
            cut = f"{row['cut']:.0%} of the outputs of {row['bundle']}"
            notes.append(f"{cut} were cut at the limit; raise --max-new-tokens")
    return notes
