"""What an evaluation of exits comes to: a page, and JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from freeexport.system.page import pairs, table
from freeexport.traces.compare_layers import TARGETS, Exit, Report

if TYPE_CHECKING:
    from rich.table import Table

_CURVE_POINTS = 100


def as_dict(report: Report) -> dict[str, Any]:
    """The report for programs; curves at about a hundred exit rates."""
    best, targets = report.recommended, report.options.forcing == "targets"
    options = {
        **asdict(report.options),
        "bundle": None if report.options.bundle is None else str(report.options.bundle),
    }
    return {
        "model": report.model,
        "layers": report.layers,
        "tokens": report.tokens,
        "examples": report.examples,
        "options": options,
        "deep_accuracy": report.deep_accuracy if targets else None,
        "costs": {"layer": report.costs.layer, "head": report.costs.head, "measured": report.costs.measured},
        "recommended": None if best is None else best.exit_layer,
        "verdict": asdict(report.verdict),
        "exits": [
            {
                "exit_layer": one.exit_layer,
                "agreement": one.agreement,
                "accuracy": one.accuracy if targets else None,
                "chosen": asdict(one.point),
                "exit_rate": None if one.exit_rate is None else asdict(one.exit_rate),
                "exit_agreement": None if one.exit_agreement is None else asdict(one.exit_agreement),
                "at": {str(target): asdict(point) for target, point in one.at.items()},
                "speedup": one.speedup,
                "break_even": one.break_even,
                "curve": [asdict(point) for point in one.curve.sampled(_CURVE_POINTS)],
            }
            for one in report.exits
        ],
    }


def tables(report: Report) -> list[Table]:
    """The page: a line a layer, and what it comes to."""
    target = report.options.agreement
    # After the model's own output, accuracy would be agreement again, and that of all layers 100 %.
    accuracy = report.options.forcing == "targets"
    columns = ("exit layer#", "agreement#", *(["accuracy#"] if accuracy else []))
    columns += (*(f"exits at {one:.0%}#" for one in TARGETS), "threshold#", "exits#", "speedup#", "break-even#")
    return [
        table(f"Exits of {report.model}", columns, [_row(one, accuracy) for one in report.exits]),
        pairs("Summary", _summary(report, target)),
    ]


def _row(one: Exit, accuracy: bool) -> tuple[str, ...]:
    return (
        str(one.exit_layer),
        f"{one.agreement:.1%}",
        *([f"{one.accuracy:.1%}"] if accuracy else []),
        *(f"{one.at[target].exit_rate:.1%}" for target in TARGETS),
        f"{one.point.threshold:.3f}",
        f"{one.point.exit_rate:.1%}",
        f"{one.speedup:.2f}x",
        "never" if one.break_even is None else f"{one.break_even:.1%}",
    )


def _summary(report: Report, target: float) -> list[tuple[str, str]]:
    costs, own, verdict = report.costs, report.options.forcing == "output", report.verdict
    forced = "the model's own greedy output" if own else "the targets"
    unit = "ms, measured" if costs.measured else "MB of weights, not measured"
    scale = 1 if costs.measured else 1e-6
    return [
        ("tokens", f"{report.tokens} of {report.examples} examples, after {forced}"),
        *([] if own else [("accuracy of all layers", f"{report.deep_accuracy:.1%}")]),
        ("costs", f"a layer {costs.layer * scale:.3g}, the head {costs.head * scale:.3g} ({unit})"),
        ("threshold, exits, speedup", f"where {target:.4g} of the exits agree with the last layer"),
        ("verdict on the best layer", verdict.text),
        *([("next step", verdict.next_step)] if verdict.next_step else []),
    ]
