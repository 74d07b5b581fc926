"""Quality by speed, a curve for each method that has thresholds and a mark for each that has none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from freeexport.evaluation.figures import Row
from freeexport.system.plot import BLUE, GREEN, GREY, ORANGE, PURPLE, YELLOW, legend_beside, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from freeexport.evaluation.evaluate import Evaluation

_COLOURS = {
    "full": GREY,
    "static": ORANGE,
    "calm": YELLOW,
    "free": BLUE,
    "adaptive": PURPLE,
    "rollback": "black",
    "lossless": GREEN,
}
_MARKS = {
    "full": "s",
    "static": "^",
    "calm": "X",
    "free": "o",
    "adaptive": "D",
    "rollback": "v",
    "lossless": "P",
}
# Of one bundle, beside the colour of the method; marks of all but the first are hollow.
_LINES = ("-", "--", ":", "-.")
_APART = 0.1


def quality_speed(found: Evaluation) -> Figure:
    """By the first metric, relative to the full model's; speeds are those of whole requests."""
    metric = found.metrics[0].name
    figure = new_figure(9, 4.5)
    axes = figure.subplots()
    several = len(found.entries) > 1
    for number, entry in enumerate(found.entries):
        for method in dict.fromkeys(setting.method for setting in entry.settings):
            some = [row for row in found.rows if (row.bundle, row.setting.method) == (entry.name, method)]
            label = f"{method}, {entry.name}" if several else method
            _draw(axes, sorted(some, key=lambda row: row.request_speed), metric, label, number)
    axes.axhline(found.options.quality, color=GREY, linewidth=0.8, linestyle="--", label=f"{found.options.quality:.4g}")
    axes.set_xlabel("speed of requests, as a multiple of the full model's")
    axes.set_ylabel(f"{found.metrics[0].label}, relative to full")
    axes.margins(0.08, 0.12)
    legend_beside(axes)
    return figure


def _draw(axes: Axes, rows: list[Row], metric: str, label: str, number: int) -> None:
    known = [(row, row.scores[metric]) for row in rows if row.scores[metric].relative is not None]
    if not known:
        return
    method = known[0][0].setting.method
    speeds = [row.request_speed for row, _ in known]
    values = np.array([score.relative for _, score in known], np.float64)
    low = np.array([score.relative if score.low is None else score.low for _, score in known], np.float64)
    high = np.array([score.relative if score.high is None else score.high for _, score in known], np.float64)
    axes.errorbar(
        speeds,
        values,
        np.maximum(0, [values - low, high - values]),
        color=_COLOURS[method],
        marker=_MARKS[method],
        fillstyle="none" if number else "full",
        linestyle=_LINES[number % len(_LINES)],
        label=label,
        capsize=2,
        elinewidth=0.7,
    )
    before = -1.0
    for (row, _), value in zip(known, values, strict=True):
        # Numbers that would stand on each other are left out.
        if row.setting.threshold is not None and row.request_speed - before > _APART:
            before, at = row.request_speed, (row.request_speed, value)
            text = f"{row.setting.threshold:.2g}"
            axes.annotate(text, at, textcoords="offset points", xytext=(0, 7), ha="center", fontsize=7)
