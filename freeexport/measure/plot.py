"""Plots of evaluations and benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from freeexport.measure.quality import Row, Score
from freeexport.system.page import BLUE, GREEN, GREY, ORANGE, PURPLE, YELLOW, legend_beside, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from freeexport.measure.evaluate import Evaluation

# Colour and mark of each method.
_STYLES = {
    "full": (GREY, "s"),
    "static": (ORANGE, "^"),
    "calm": (YELLOW, "X"),
    "calm-decay": ("#8C6D00", "x"),
    "calm-single": ("#56B4E9", "*"),
    "free": (BLUE, "o"),
    "adaptive": (PURPLE, "D"),
    "rollback": ("black", "v"),
    "lossless": (GREEN, "P"),
}
# Lines of one bundle, beside the colour of the method; marks of all but the first are hollow.
_LINES = ("-", "--", ":", "-.")
_APART = 0.1
# What lies so far below the wanted quality is an arrow at the lower edge: one such point would flatten all others.
_FAR = 0.12


def quality_speed(found: Evaluation) -> Figure:
    """Draw quality, relative to the full model's by the first metric, over the speed of whole requests."""
    metric, wanted = found.metrics[0].name, found.options.quality
    figure = new_figure(9, 4.5)
    axes = figure.subplots()
    known = [row.scores[metric] for row in found.rows if row.scores[metric].relative is not None]
    floor = _floor(known, wanted)
    several = len(found.entries) > 1
    for number, entry in enumerate(found.entries):
        for method in entry.methods:
            some = [row for row in found.rows if (row.bundle, row.method) == (entry.name, method)]
            label = f"{method}, {entry.name}" if several else method
            _draw(axes, sorted(some, key=lambda row: row.request_speed), metric, label, number, floor)
    axes.axhline(wanted, color=GREY, linewidth=0.8, linestyle="--", label=f"{wanted:.4g}")
    axes.set_xlabel("speed of requests, as a multiple of the full model's")
    axes.set_ylabel(f"{found.metrics[0].label}, relative to full")
    axes.margins(0.08, 0.12)
    if floor is not None:
        axes.set_ylim(bottom=floor)
    legend_beside(axes)
    return figure


def _floor(scores: Sequence[Score], wanted: float) -> float | None:
    """The lower edge where points lie far below the wanted quality; None where none does."""
    values = [score.relative for score in scores if score.relative is not None]
    near = [value for value in values if value >= wanted - _FAR]
    if len(near) == len(values) or not near:
        return None
    return min(near) - max(0.01, 0.12 * (max(near) - min(near)))


def _draw(axes: Axes, rows: list[Row], metric: str, label: str, number: int, floor: float | None) -> None:
    known = [(row, row.scores[metric]) for row in rows if row.scores[metric].relative is not None]
    if not known:
        return
    colour, mark = _STYLES[known[0][0].method]
    inside = [(row, one) for row, one in known if floor is None or (one.relative or 0.0) >= floor]
    speeds = [row.request_speed for row, _ in inside]
    values = np.array([score.relative for _, score in inside], np.float64)
    low = np.array([score.relative if score.low is None else score.low for _, score in inside], np.float64)
    high = np.array([score.relative if score.high is None else score.high for _, score in inside], np.float64)
    axes.errorbar(
        speeds,
        values,
        np.maximum(0, [values - low, high - values]),
        color=colour,
        marker=mark,
        fillstyle="none" if number else "full",
        linestyle=_LINES[number % len(_LINES)],
        label=label,
        capsize=2,
        elinewidth=0.7,
    )
    before = -1.0
    for (row, _), value in zip(inside, values, strict=True):
        # Numbers that would stand on each other are left out.
        if row.threshold is not None and row.request_speed - before > _APART:
            before = row.request_speed
            _note(axes, f"{row.threshold:.2g}", row.request_speed, float(value), 7)
    for row, score in known:
        if floor is not None and (score.relative or 0.0) < floor:
            axes.plot(row.request_speed, floor, marker=r"$\downarrow$", color=colour, markersize=9, clip_on=False)
            at = "" if row.threshold is None else f"{row.threshold:.2g}: "
            _note(axes, f"{at}{100 * (score.relative or 0.0):.0f} %", row.request_speed, floor, 6)


def _note(axes: Axes, text: str, x: float, y: float, above: int) -> None:
    axes.annotate(text, (x, y), textcoords="offset points", xytext=(0, above), ha="center", fontsize=7)


def bench_speeds(title: str, rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw tokens a second, a bar a setting with the range of its rounds, and, where the memory's bandwidth would allow
    more, how much. `rows` as bench's JSON has them."""
    rows = rows[::-1]
    figure = new_figure(10, 1.4 + 0.4 * len(rows))
    axes = figure.subplots()
    places = range(len(rows))
    rates = [row["tokens_per_second"] for row in rows]
    errors = [row["spread"] * row["tokens_per_second"] / 2 for row in rows]
    bars = axes.barh(places, rates, xerr=errors, color=BLUE, ecolor="black", capsize=3, label="tokens a second")
    axes.bar_label(bars, [f"{rate:.1f}" for rate in rates], padding=4, fontsize="small")
    limits = [(place, row["decode_per_second"] / row["roofline"]) for place, row in enumerate(rows) if row["roofline"]]
    if limits:
        marked, ends = zip(*limits, strict=True)
        axes.plot(ends, marked, "D", color=ORANGE, markersize=6, label="as fast as the memory can be read")
    axes.margins(x=0.08)
    axes.set_xlim(left=0)
    axes.set_yticks(places, [f"{row['name']} ({row['precision']})" for row in rows])
    axes.set_xlabel("tokens per second (black: the range of the rounds)")
    axes.set_title(title, fontsize="medium")
    legend_beside(axes)
    return figure
