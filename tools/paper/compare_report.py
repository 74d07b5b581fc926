"""Tables and curves of the comparison, in the paper's arrangement."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from freeexport.evaluate.plot import quality_speed
from freeexport.evaluate.scores import Row
from freeexport.evaluate.tables import relative_score, speed_interval_of
from freeexport.system.output import write_whole
from freeexport.system.page import save_figure
from freeexport.system.sheet import Sheet, markdown, sheet
from freeexport.task_metrics import Metric, metric_of
from runtime.bundle.beta import NEVER_EXIT
from tools.paper.compare_plan import SAMPLES

FILES = "report.md, report.json, and a curve for each table (.svg)"
METHODS = {
    "full": "Full model",
    "eager": "Full model, generate of transformers",
    "static": "Static",
    "published": "FREE",
    "adaptive": "FREE, adaptive threshold",
    "rollback": "FREE, rollback policy",
    "lossless": "FREE, lossless",
    "eager-full": "Full model, PyTorch",
    "eager-static": "Static, PyTorch",
    "calm": "CALM, PyTorch",
    "calm-single": "One exit, states copied, PyTorch",
    "eager-free": "FREE, PyTorch",
}
# Methods in which no token can exit.
WITHOUT_EXIT = ("full", "eager", "eager-full")
TITLES = {
    "main": "Early-exit methods",
    "static": "Static exits by depth",
    "mapping": "FREE by layer mapping",
    "depth": "FREE by exit layer",
    SAMPLES: "FREE by number of calibration lines",
    "copying": "Parallel decoding against state copying, on the weights of FREE",
    "lora": "FREE by LoRA (rank 64, alpha 128)",
}
# Quality that curves mark.
QUALITY = 0.99
# Columns that stay even if all rows have one value.
KEPT = ("method", "per token", "per request", "per token, PyTorch", "per request, PyTorch")
# Order of the methods in tables.
_ORDER = list(METHODS)
Columns = dict[str, Callable[[Row], str]]


def pooled(rows: Sequence[Row], metrics: Sequence[str]) -> Row:
    """Combine the rows of a setting over seeds: means, and the range over seeds as interval.

    A single row keeps its bootstrap intervals.
    """
    first = dict(rows[0])
    if len(rows) == 1:
        return first
    first |= {name: _mean(rows, name) for name in ("exit_rate", "layers", "tokens_per_second")}
    first |= {name: _mean(rows, name) for name in ("predicted", "threshold", "same")}
    first |= _speed_ranges(rows)
    compared = [row["eager"] for row in rows if row["eager"] is not None]
    first["eager"] = _speed_ranges(compared) if compared else None
    scores = {}
    for metric in metrics:
        each = [row["scores"][metric] for row in rows]
        kept = [one["relative"] for one in each if one["relative"] is not None]
        scores[metric] = {
            "value": fmean(one["value"] for one in each),
            "relative": fmean(kept) if kept else None,
            "low": min(kept, default=None),
            "high": max(kept, default=None),
        }
    return first | {"scores": scores}


def _mean(rows: Sequence[Row], name: str) -> float | None:
    known = [row[name] for row in rows if row[name] is not None]
    return fmean(known) if known else None


def _speed_ranges(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for kind in ("token", "request"):
        values = [row[f"{kind}_speed"] for row in rows]
        found |= {f"{kind}_speed": fmean(values)}
        found |= {f"{kind}_low": min(values), f"{kind}_high": max(values)}
    return found


def rows_by_table(report: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Return the rows of each table, combined over seeds, in the order of METHODS.

    The calibrated threshold of FREE differs between seeds. Its rows are combined all the same.
    """
    metrics = report["run"]["metrics"]
    found: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for made in report["seeds"].values():
        for name, measured in made["measurements"].items():
            for row in measured["rows"]:
                at = "calibrated" if row["calibrated"] else str(row["threshold"])
                found[name.partition("/")[0], row["bundle"], row["method"], at].append(row)
    tables: dict[str, list[Row]] = defaultdict(list)
    for (table, *_), rows in found.items():
        tables[table].append(pooled(rows, metrics))
    _move_from_main(tables)
    for name in ("main", "mapping", "depth", "lora"):
        if name in tables:
            tables[name].sort(key=lambda row: _ORDER.index(row["method"]))
    return {name: tables[name] for name in TITLES if name in tables}


def _move_from_main(tables: dict[str, list[Row]]) -> None:
    """Give the rows of the main measurement to the tables of static exits and of state copying."""
    measured = tables.get("main", [])
    free = [row for row in measured if row["recipe"].startswith("free")]
    copied = [row for row in free if row["method"] == "calm-single"]
    if copied:
        fixed = [row for row in free if row["method"] == "eager-free"]
        tables["copying"] = sorted([*copied, *fixed], key=lambda row: row["threshold"])
        tables["main"] = [row for row in measured if row not in copied]
    if "static" in tables:
        # The full model is the same at all depths.
        full = [row for row in measured if (row["method"], row["recipe"]) == ("full", "static")]
        shown = [row for row in (*measured, *tables["static"]) if row["method"] == "static"]
        tables["static"] = [*full, *sorted(shown, key=lambda row: row["exit_layer"])]


def table_of(name: str, rows: Sequence[Row], metrics: Sequence[Metric]) -> Sheet:
    """Return a table of rows. Empty columns, and columns with one value, are left out."""

    def layer(row: Row) -> str:
        if row["method"] in WITHOUT_EXIT:
            return str(row["exit_layer"]) if name == "depth" else ""
        return f"{row['exit_layer']}{'+' if row['method'] == 'calm' else ''}"

    def threshold(row: Row) -> str:
        at = row["threshold"]
        return "" if at is None else f"{at:.3g}{' *' if row['calibrated'] else ''}"

    columns: Columns = {
        "method": lambda row: METHODS[row["method"]],
        "weights": lambda row: row["recipe"],
        "exit layer#": layer,
        "threshold#": threshold,
    }
    for metric in metrics:
        columns[f"{metric.name}#"] = partial(_score, metric.name)
    columns[f"% of full's {metrics[0].name}#"] = partial(relative_score, metrics[0].name)
    columns |= {
        "exits#": lambda row: "" if row["method"] in WITHOUT_EXIT else f"{row['exit_rate']:.0%}",
        "layers#": lambda row: f"{row['layers']:.1f}",
        "tokens/s#": lambda row: f"{row['tokens_per_second']:.0f}",
        "per token#": lambda row: speed_interval_of(row, "token"),
        "byte model#": lambda row: "" if row["predicted"] is None else f"{row['predicted']:.2f}x",
        "per request#": lambda row: speed_interval_of(row, "request"),
        "per token, PyTorch#": partial(_against_eager, "token"),
        "per request, PyTorch#": partial(_against_eager, "request"),
    }
    return sheet(TITLES[name], columns, rows, keep=(*KEPT, *(metric.name for metric in metrics)))


def _score(metric: str, row: Row) -> str:
    return f"{100 * row['scores'][metric]['value']:.2f}"


def _against_eager(kind: str, row: Row) -> str:
    return "" if row["eager"] is None else speed_interval_of(row["eager"], kind)


def samples_table(report: Mapping[str, Any]) -> Sheet | None:
    """Return the thresholds chosen from numbers of calibration lines. None if none was measured."""
    free = [
        (seed, made["calibrations"][made["measurements"][SAMPLES]["rows"][0]["bundle"]])
        for seed, made in report["seeds"].items()
        if SAMPLES in made["measurements"]
    ]
    chosen = [(seed, count, rules) for seed, one in free for count, rules in one["chosen"].items()]
    if not chosen:
        return None
    columns: dict[str, Callable[[Any], str]] = {
        "seed": lambda one: one[0],
        "lines#": lambda one: one[1],
        "threshold, ours#": lambda one: _chosen(one[2]["product"]),
        "threshold, authors' rule#": lambda one: _chosen(one[2]["authors"]),
    }
    return sheet("Thresholds by number of calibration lines", columns, chosen)


def _chosen(threshold: float) -> str:
    return "none" if threshold >= NEVER_EXIT else f"{threshold:.3g}"


def trainings_table(report: Mapping[str, Any]) -> Sheet:
    """Return the table of trainings."""
    every = [
        (seed, one) for seed, made in report["seeds"].items() for one in made["trainings"].values()
    ]
    columns: dict[str, Callable[[Any], str]] = {
        "seed": lambda row: row[0],
        "weights": lambda row: row[1]["recipe"],
        "loss": lambda row: row[1]["description"],
        "exit layer#": lambda row: str(row[1]["exit_layer"]),
        "seconds#": lambda row: f"{row[1]['seconds']:.0f}",
        "sha256": lambda row: row[1]["sha256"][:12],
    }
    return sheet("Trainings", columns, every)


def facts_of(report: Mapping[str, Any]) -> list[str]:
    """Describe the conditions and the meaning of the columns."""
    run = report["run"]
    first = next(iter(next(iter(report["seeds"].values()))["measurements"].values()))
    machine = first["machine"]
    seeds = ", ".join(map(str, run["seeds"]))
    interval = (
        "half a 95 % interval of a paired bootstrap over lines"
        if len(run["seeds"]) == 1
        else "half the range over seeds, beside their mean"
    )
    return [
        f"model: {run['model']} ({run['model_sha256'][:12]}), engines in {run['precision']} "
        f"on {run['device']}, {first['threads']} thread(s)",
        f"machine: {machine['processor']}, commit {first['commit']}",
        f"data: {first['lines']} lines of test.jsonl, {run['rounds']} round(s), "
        f"at most {run['max_new_tokens']} new tokens, greedy; seeds {seeds}",
        "per token, per request: speed as a multiple of the full model of the same weights, "
        "on the same engines, or for rows of PyTorch in the same loop. In columns of PyTorch: of "
        "generate of transformers on the same device. Tokens are those after the first",
        f"±: {interval}",
        "% of full: relative to the full model of the same weights",
        "byte model: predicted speed per token, from the bytes that are read",
        "exit layer: N+ may exit after layer N or any later one",
        "*: the threshold that was calibrated before the measurement",
    ]


def notes_of(report: Mapping[str, Any]) -> list[str]:
    """List the notes of all measurements, each once."""
    every: Iterable[str] = (
        note
        for made in report["seeds"].values()
        for measured in made["measurements"].values()
        for note in measured["notes"]
    )
    return list(dict.fromkeys([*report["notes"], *every]))


def as_page(report: Mapping[str, Any]) -> str:
    """Format the report as Markdown."""
    metrics = [metric_of(name) for name in report["run"]["metrics"]]
    parts = ["# Comparison of early-exit methods", ""]
    parts += [f"- {text}" for text in facts_of(report)]
    for name, rows in rows_by_table(report).items():
        shown = table_of(name, rows, metrics)
        parts += ["", f"## {shown.title}", "", markdown(shown), ""]
        parts += [f"- {column}: {text}" for column, text in shown.facts]
    for shown in filter(None, (samples_table(report), trainings_table(report))):
        parts += ["", f"## {shown.title}", "", markdown(shown)]
    if notes := notes_of(report):
        parts += ["", "## Notes", "", *(f"- {note}" for note in notes)]
    return "\n".join([*parts, ""])


def write_comparison(report: Mapping[str, Any], output: Path) -> None:
    """Write report.md, report.json and the curves. Requires matplotlib."""
    metric = metric_of(report["run"]["metrics"][0])
    for name, rows in rows_by_table(report).items():
        figure = quality_speed(rows, metric.name, metric.label, QUALITY)
        save_figure(figure, output / f"{name}.svg")
    write_whole(output / "report.json", json.dumps(report, indent=2) + "\n")
    write_whole(output / "report.md", as_page(report))
