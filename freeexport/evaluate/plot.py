"""Draws figures of evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from freeexport.system.page import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    YELLOW,
    legend_beside,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from freeexport.evaluate.scores import Row

# Colour and marker of each method.
_STYLES = {
    "full": (GREY, "s"),
    "static": (ORANGE, "^"),
    "published": ("#56B4E9", "o"),
    "free": (BLUE, "o"),
    "adaptive": (PURPLE, "D"),
    "rollback": ("black", "v"),
    "lookup": ("#8FBC8F", "p"),
    "phrases": ("#5F9E5F", "h"),
    "lossless": (GREEN, "P"),
}
# Colours and markers of other methods, whose records tools add.
_OTHER_STYLES = ((YELLOW, "X"), ("#8C6D00", "x"), ("#CC79A7", "*"))
# Line style of each bundle. Markers of all bundles but the first are hollow.
_LINES = ("-", "--", ":", "-.")
# Least difference in speed between labelled points.
_APART = 0.1
# Points further below the wanted quality become arrows at the lower edge. They would flatten the
# others.
_FAR = 0.12


def quality_speed(rows: Sequence[Row], metric: str, label: str, wanted: float) -> Figure:
    """Draw quality over the speed of requests, both relative to the full model."""
    figure = new_figure(9, 4.5)
    axes = figure.subplots()
    values = [one for row in rows if (one := row["scores"][metric]["relative"]) is not None]
    near = [value for value in values if value >= wanted - _FAR]
    floor = (
        min(near) - max(0.01, 0.12 * (max(near) - min(near)))
        if 0 < len(near) < len(values)
        else None
    )
    bundles = list(dict.fromkeys(row["bundle"] for row in rows))
    others = dict.fromkeys(row["method"] for row in rows if row["method"] not in _STYLES)
    styles = _STYLES | dict(zip(others, cycle(_OTHER_STYLES), strict=False))
    for bundle, method in dict.fromkeys((row["bundle"], row["method"]) for row in rows):
        some = [row for row in rows if (row["bundle"], row["method"]) == (bundle, method)]
        name = f"{method}, {bundle}" if len(bundles) > 1 else method
        number = bundles.index(bundle)
        _quality_curve(
            axes,
            sorted(some, key=itemgetter("request_speed")),
            metric,
            label=name,
            number=number,
            floor=floor,
            marks=styles[method],
        )
    axes.axhline(wanted, color=GREY, linewidth=0.8, linestyle="--", label=f"{wanted:.4g}")
    axes.set_xlabel("speed of requests, as a multiple of the full model's")
    axes.set_ylabel(f"{label}, relative to full")
    axes.margins(0.08, 0.12)
    if floor is not None:
        axes.set_ylim(bottom=floor)
    legend_beside(axes)
    return figure


def _quality_curve(
    axes: Axes,
    rows: Sequence[Row],
    metric: str,
    label: str,
    number: int,
    floor: float | None,
    marks: tuple[str, str],
) -> None:
    def note(text: str, x: float, y: float, above: int) -> None:
        axes.annotate(
            text, (x, y), textcoords="offset points", xytext=(0, above), ha="center", fontsize=7
        )

    colour, mark = marks
    inside = []
    bounds = []
    before = -1.0
    for row in rows:
        speed = row["request_speed"]
        at = "" if row["threshold"] is None else f"{row['threshold']:.2g}"
        kept, low, high = (row["scores"][metric][name] for name in ("relative", "low", "high"))
        if kept is None:
            continue
        if floor is not None and kept < floor:
            axes.plot(
                speed, floor, marker=r"$\downarrow$", color=colour, markersize=9, clip_on=False
            )
            note(f"{at}{': ' if at else ''}{100 * kept:.0f} %", speed, floor, 6)
            continue
        inside.append((speed, kept))
        bounds.append(
            (max(0.0, kept - low), max(0.0, high - kept)) if low is not None else (0.0, 0.0)
        )
        if at and speed - before > _APART:
            before = speed
            note(at, speed, kept, 7)
    if inside:
        style: dict[str, Any] = {
            "fillstyle": "none" if number else "full",
            "linestyle": _LINES[number % len(_LINES)],
        }
        speeds, values = zip(*inside, strict=True)
        errors = np.array(bounds).T
        axes.errorbar(
            speeds,
            values,
            errors,
            color=colour,
            marker=mark,
            label=label,
            capsize=2,
            elinewidth=0.7,
            **style,
        )


def speed_bars(title: str, rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw tokens per second of each setting, with the range over rounds.

    Marks the speed that the memory bandwidth allows.
    """
    rows = rows[::-1]
    figure = new_figure(10, 1.4 + 0.4 * len(rows))
    axes = figure.subplots()
    places = range(len(rows))
    rates = [row["tokens_per_second"] for row in rows]
    errors = [row["spread"] * row["tokens_per_second"] / 2 for row in rows]
    bars = axes.barh(
        places, rates, xerr=errors, color=BLUE, ecolor="black", capsize=3, label="tokens a second"
    )
    axes.bar_label(bars, [f"{rate:.1f}" for rate in rates], padding=4, fontsize="small")
    limits = [
        (place, row["decode_per_second"] / row["roofline"])
        for place, row in enumerate(rows)
        if row["roofline"]
    ]
    if limits:
        marked, ends = zip(*limits, strict=True)
        axes.plot(
            ends, marked, "D", color=ORANGE, markersize=6, label="as fast as the memory can be read"
        )
    axes.margins(x=0.08)
    axes.set_xlim(left=0)
    axes.set_yticks(places, [f"{row['name']} ({row['precision']})" for row in rows])
    axes.set_xlabel("tokens per second (black: the range of the rounds)")
    axes.set_title(title, fontsize="medium")
    legend_beside(axes)
    return figure
