"""An evaluation as tables for a terminal, JSON and CSV."""

from __future__ import annotations

import csv
import io
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

import onnxruntime

from freeexport import __version__
from freeexport.evaluation.figures import Curve, Row, Score
from freeexport.system.page import filled, pairs, table

if TYPE_CHECKING:
    from rich.table import Table

    from freeexport.evaluation.evaluate import Evaluation


def tables(found: Evaluation) -> list[Table]:
    title = f"{found.options.data.name}, {found.rows[0].lines} lines, {found.threads} thread(s)"
    name = found.metrics[0].label
    return [
        table(title, columns(found), [cells(row, found) for row in found.rows]),
        table(f"Quality-speed curves by {name}", curve_columns(found), [curve_cells(one) for one in found.curves]),
        pairs("Settings", about(found)),
    ]


def curve_columns(found: Evaluation) -> list[str]:
    wanted = f"fastest with {found.options.quality:.4g} of full"
    return ["bundle", "method", wanted, "speed, request#", "area#"]


def columns(found: Evaluation) -> list[str]:
    scores = [name for metric in found.metrics for name in (f"{metric.label}#", "of full (95 %)#")]
    fixed = ["bundle", "precision", "setting", *scores, "exits#", "first exits#", "layers#"]
    speeds = ["speed, token#", "speed, first#", "speed, request#"]
    return [*fixed, *speeds, "tokens/s#", "same as full#", "mJ/token#"]


def cells(row: Row, found: Evaluation) -> list[str]:
    scores = [cell for metric in found.metrics for cell in score_cells(row.scores[metric.name])]
    joules = "" if row.joules_per_token is None else f"{1e3 * row.joules_per_token:.3g}"
    return [
        row.bundle,
        row.precision,
        row.setting.name,
        *scores,
        f"{row.exit_rate:.0%}",
        f"{row.first_exits:.0%}",
        f"{row.layers:.2f}",
        f"{row.token_speed:.2f}x",
        f"{row.first_speed:.2f}x",
        f"{row.request_speed:.2f}x",
        f"{row.tokens_per_second:.0f}",
        f"{row.same:.1%}",
        joules,
    ]


def score_cells(score: Score) -> list[str]:
    relative = "" if score.relative is None else f"{score.relative:.1%}"
    if score.low is not None and score.high is not None:
        relative += f" ({100 * score.low:.1f} to {100 * score.high:.1f})"
    return [f"{score.value:.4f}", relative]


def curve_cells(curve: Curve) -> list[str]:
    name = "none" if curve.fastest is None else curve.fastest.name
    speed = "" if curve.speed is None else f"{curve.speed:.2f}x"
    return [curve.bundle, curve.method, name, speed, "" if curve.area is None else f"{curve.area:.3f}"]


def about(found: Evaluation) -> list[tuple[str, str]]:
    machine, options = found.machine, found.options
    signatures = [(metric.name, metric.signature) for metric in found.metrics if metric.signature]
    return [
        ("processor", f"{machine.cpu} ({' '.join(machine.features)}), {found.threads} thread(s)"),
        ("versions", ", ".join(f"{name} {value}" for name, value in versions().items())),
        (
            "decoding",
            f"greedy, at most {options.max_new_tokens} tokens; the median of {options.rounds} round(s) a line",
        ),
        *[(f"metric {name}", signature) for name, signature in signatures],
        *[("note", note) for note in found.notes],
    ]


def versions() -> dict[str, str]:
    return {"freeexport": __version__, "onnxruntime": onnxruntime.__version__, "python": platform.python_version()}


def as_markdown(found: Evaluation) -> str:
    """The tables for a page of results."""
    shown = [
        filled(columns(found), [cells(row, found) for row in found.rows]),
        filled(curve_columns(found), [curve_cells(curve) for curve in found.curves]),
    ]
    facts = "\n".join(f"- {name}: {value}" for name, value in about(found))
    return "\n\n".join([*(_markdown(*one) for one in shown), facts]) + "\n"


def _markdown(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(name.rstrip("#") for name in names) + " |"]
    lines.append("|" + "|".join("--:" if name.endswith("#") else ":--" for name in names) + "|")
    lines.extend("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return "\n".join(lines)


def as_dict(found: Evaluation) -> dict[str, Any]:
    """Everything but the outputs, for JSON."""
    options = found.options
    return {
        "made": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": {"processor": found.machine.cpu, "features": list(found.machine.features)},
        "versions": versions(),
        "bundles": {
            entry.name: {
                name: getattr(entry.bundle.manifest, name)
                for name in ("source", "precision", "layers", "exit_layer", "threshold", "exit_trained", "kernels")
            }
            for entry in found.entries
        },
        "data": str(options.data),
        "lines": found.rows[0].lines,
        "rounds": options.rounds,
        "max_new_tokens": options.max_new_tokens,
        "threads": found.threads,
        "quality": options.quality,
        "metrics": {metric.name: metric.signature for metric in found.metrics},
        "rows": [{**asdict(row), "setting": row.setting.name, "method": row.setting.method} for row in found.rows],
        "curves": [_curve(curve) for curve in found.curves],
        "notes": found.notes,
    }


def _curve(curve: Curve) -> dict[str, Any]:
    return {**asdict(curve), "fastest": None if curve.fastest is None else curve.fastest.name}


def as_csv(found: Evaluation) -> str:
    """A line for each bundle and setting."""
    rows = []
    for row in as_dict(found)["rows"]:
        scores = row.pop("scores")
        flat = {f"{name} {part}": value for name, score in scores.items() for part, value in score.items()}
        rows.append({**row, **flat})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
