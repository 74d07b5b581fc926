"""Figures of evaluations, benchmarks, layers and calibrations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from freeexport.system.page import BLUE, GREEN, GREY, ORANGE, PURPLE, YELLOW, legend_beside, new_figure
from runtime.bundle.beta import NEVER_EXIT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from freeexport.measure.calibrate import Calibrated
    from freeexport.measure.quality import Row

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
    "lookup": ("#8FBC8F", "p"),
    "lossless": (GREEN, "P"),
}
# Lines of one bundle, beside the colour of the method; marks of all but the first are hollow.
_LINES = ("-", "--", ":", "-.")
# Numbers of points that are nearer to each other are left out.
_APART = 0.1
# A point so far below the wanted quality is an arrow at the lower edge: it would flatten all others.
_FAR = 0.12
_MOST_CURVES, _MOST_VALUES = 12, 16  # of layers that are drawn, and bars that have room for a number above each
_TICKS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998)
_TOP = 0.999  # agreement beyond this is drawn here
_EDGES = 41


def quality_speed(rows: Sequence[Row], metric: str, label: str, wanted: float) -> Figure:
    """Draw quality, relative to the full model's by the metric of that label, over the speed of whole requests."""
    figure = new_figure(9, 4.5)
    axes = figure.subplots()
    values = [one for row in rows if (one := row["scores"][metric]["relative"]) is not None]
    near = [value for value in values if value >= wanted - _FAR]
    floor = min(near) - max(0.01, 0.12 * (max(near) - min(near))) if 0 < len(near) < len(values) else None
    bundles = list(dict.fromkeys(row["bundle"] for row in rows))
    for bundle, method in dict.fromkeys((row["bundle"], row["method"]) for row in rows):
        some = [row for row in rows if (row["bundle"], row["method"]) == (bundle, method)]
        name = f"{method}, {bundle}" if len(bundles) > 1 else method
        number = bundles.index(bundle)
        _quality_curve(axes, sorted(some, key=itemgetter("request_speed")), metric, name, number, floor)
    axes.axhline(wanted, color=GREY, linewidth=0.8, linestyle="--", label=f"{wanted:.4g}")
    axes.set_xlabel("speed of requests, as a multiple of the full model's")
    axes.set_ylabel(f"{label}, relative to full")
    axes.margins(0.08, 0.12)
    if floor is not None:
        axes.set_ylim(bottom=floor)
    legend_beside(axes)
    return figure


def _quality_curve(axes: Axes, rows: Sequence[Row], metric: str, label: str, number: int, floor: float | None) -> None:
    def note(text: str, x: float, y: float, above: int) -> None:
        axes.annotate(text, (x, y), textcoords="offset points", xytext=(0, above), ha="center", fontsize=7)

    colour, mark = _STYLES[rows[0]["method"]]
    inside, bounds, before = [], [], -1.0
    for row in rows:
        speed, at = row["request_speed"], "" if row["threshold"] is None else f"{row['threshold']:.2g}"
        kept, low, high = (row["scores"][metric][name] for name in ("relative", "low", "high"))
        if kept is None:
            continue
        if floor is not None and kept < floor:
            axes.plot(speed, floor, marker=r"$\downarrow$", color=colour, markersize=9, clip_on=False)
            note(f"{at}{': ' if at else ''}{100 * kept:.0f} %", speed, floor, 6)
            continue
        inside.append((speed, kept))
        bounds.append((max(0.0, kept - low), max(0.0, high - kept)) if low is not None else (0.0, 0.0))
        if at and speed - before > _APART:
            before = speed
            note(at, speed, kept, 7)
    if inside:
        style: dict[str, Any] = {"fillstyle": "none" if number else "full", "linestyle": _LINES[number % len(_LINES)]}
        speeds, values = zip(*inside, strict=True)
        errors = np.array(bounds).T
        axes.errorbar(
            speeds, values, errors, color=colour, marker=mark, label=label, capsize=2, elinewidth=0.7, **style
        )


def bench_speeds(title: str, rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw tokens a second, a bar a setting with the range of its rounds, and, where the memory's bandwidth would allow
    more, how much. `rows` as bench's JSON has them."""
    rows = rows[::-1]
    figure = new_figure(10, 1.4 + 0.4 * len(rows))
    axes = figure.subplots()
    places, rates = range(len(rows)), [row["tokens_per_second"] for row in rows]
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


def layer_curves(report: Mapping[str, Any]) -> Figure:
    """Draw agreement of exits against exit rate, a curve a layer (evenly spaced layers, where there are many), and the
    predicted speedup by layer. `report` as `evaluate --layers --json` prints it."""
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(13, 5)
    left, right = figure.subplots(1, 2, width_ratios=(5, 4))
    figure.suptitle(f"{report['model']}: exits after each of {report['layers']} layers")
    exits, target = report["exits"], report["options"]["agreement"]
    step = -(-len(exits) // _MOST_CURVES)
    shown = exits[step - 1 :: step]
    # Dark to light with depth, which survives grey printing, and dashes for neighbours.
    shades = colormaps["viridis"](np.linspace(0, 0.9, len(shown)))
    for one, shade, dashes in zip(shown, shades, cycle(("-", "--", "-.", ":"))):
        rates, disagree = [], []
        for point in one["curve"]:
            rates.append(point["exit_rate"])
            disagree.append(1 - min(point["agreement"], _TOP))
        left.plot(rates, disagree, color=shade, linestyle=dashes, label=f"layer {one['exit_layer']}")
    left.axhline(1 - min(target, _TOP), color=GREY, linewidth=0.8, linestyle="--", label=f"{100 * target:.4g} % agree")
    # By the logarithm of those that disagree: exits matter between 90 and 99.9 %, and bad layers are at 20.
    left.set_yscale("log")
    left.set(
        xlabel="tokens that exit", ylabel="exits that agree with the last layer", xlim=(0, 1), ylim=(1.1, 1 - _TOP)
    )
    names = [*(f"{100 * tick:.4g} %" for tick in _TICKS), f"{100 * _TOP:.4g} % or more"]
    left.set_yticks([1 - tick for tick in (*_TICKS, _TOP)], names)
    left.minorticks_off()
    left.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    legend_beside(left)

    # Bars from 1.0, which is mode full; those below are slower.
    layers, speeds = zip(*((one["exit_layer"], one["speedup"]) for one in exits), strict=True)
    colours = [BLUE if speed >= 1 else ORANGE for speed in speeds]
    bars = right.bar(layers, [speed - 1 for speed in speeds], bottom=1, color=colours)
    if len(layers) <= _MOST_VALUES:
        right.bar_label(bars, [f"{speed:.2f}x" for speed in speeds], padding=2, fontsize="small")
    right.axhline(1, color="black", linewidth=0.9)
    low, high = min(1.0, *speeds), max(1.0, *speeds)
    room = 0.1 * max(high - low, 0.05)
    right.set(xlim=(0.4, report["layers"] - 0.4), ylim=(low - room, high + room))
    right.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    right.yaxis.set_major_formatter(_times)
    right.set(xlabel="exit layer", ylabel="predicted speed over mode full")
    right.set_title(f"where {100 * target:.4g} % of the exits agree", fontsize="medium")
    return figure


def trade_figure(result: Calibrated) -> Figure:
    """Draw tokens that are the full model's, and the quality kept where it was decoded, over the speed."""
    rows, chosen = result.calibration.table, result.calibration.threshold
    figure = new_figure(9, 4.6)
    axes = figure.subplots()
    kept = [1 - row.exit_rate * (1 - (1 if row.agreement is None else row.agreement)) for row in rows]
    predicted = [row.predicted_speedup or 1.0 for row in rows]
    axes.plot(predicted, kept, "o-", color=BLUE, markersize=4, label="tokens kept, speed predicted")
    measured = [(row.measured_speedup, same) for row, same in zip(rows, kept, strict=True) if row.measured_speedup]
    if measured:
        axes.plot(*zip(*measured, strict=True), "D", color="black", label="tokens kept, speed measured")
    quality = [(row.measured_speedup or row.predicted_speedup or 1.0, row.quality) for row in rows if row.quality]
    if quality:
        axes.plot(*zip(*quality, strict=True), "s", color=GREEN, label="quality kept")
    place = [row.threshold for row in rows].index(chosen)
    name = f"chosen: {'never' if chosen >= NEVER_EXIT else f'{chosen:.4g}'}"
    axes.plot(predicted[place], kept[place], "o", color=ORANGE, markersize=11, fillstyle="none", label=name)
    axes.axvline(1, color="black", linewidth=0.9, label="1.0x: mode full")
    axes.set(xlabel="speed over mode full", ylabel="kept of the full model's output")
    axes.xaxis.set_major_formatter(_times)
    axes.yaxis.set_major_formatter(_percent)
    legend_beside(axes)
    return figure


def mixture_figure(result: Calibrated) -> Figure:
    """Draw the tokens by confidence with the fitted densities; below, P(agree | confidence) beside what was seen."""
    mixture, traces, threshold = result.calibration.mixture, result.traces, result.calibration.threshold
    figure = new_figure(9, 6)
    upper, lower = figure.subplots(2, 1, sharex=True)
    edges, grid, counts = np.linspace(0, 1, _EDGES), np.linspace(0.002, 0.998, 500), []
    least = 1 / max(1, traces.tokens)
    for agrees, colour, hatch, line, name in (
        (True, BLUE, "", "-", "agree"),
        (False, ORANGE, "////", "--", "disagree"),
    ):
        values = traces.confidence[traces.agrees == agrees]
        counts.append(np.histogram(values, edges)[0])
        style: dict[str, Any] = {"facecolor": f"{colour}40", "edgecolor": colour, "hatch": hatch, "linewidth": 0.8}
        weights = np.full(len(values), least)
        upper.hist(values, edges.tolist(), weights=weights, histtype="stepfilled", label=f"tokens that {name}", **style)
        if mixture is not None:
            share = mixture.weight_agree if agrees else 1 - mixture.weight_agree
            component = mixture.agree if agrees else mixture.disagree
            fitted = share * component.density(grid) / (_EDGES - 1)
            upper.plot(grid, fitted, color=colour, linestyle=line, label=f"fitted, {name}")
    # Few tokens decide: most are confident and agree, and on a linear scale the others could not be seen.
    upper.set(ylabel="share of all tokens (log)", yscale="log", xlim=(0, 1), ylim=(0.5 * least, 1))
    tokens = counts[0] + counts[1]
    some = tokens > 0
    centres, sizes = (edges[:-1] + edges[1:])[some] / 2, 8 + 60 * np.sqrt(tokens[some] / max(1, tokens.max()))
    lower.scatter(centres, counts[0][some] / tokens[some], s=sizes, color=GREEN, label="seen (larger: more tokens)")
    if mixture is not None:
        lower.plot(grid, mixture.posterior(grid), color="black", label="P(agree | confidence)")
    lower.set(xlabel=f"confidence ({result.calibration.confidence})", ylabel="tokens that agree", ylim=(-0.03, 1.03))
    for axes in (upper, lower):
        axes.yaxis.set_major_formatter(_percent)
        if threshold < NEVER_EXIT:
            axes.axvline(threshold, color=GREY, linestyle=":", label="threshold")
        legend_beside(axes)
    return figure


def _percent(value: float, _: float) -> str:
    return f"{100 * value:.3g} %"


def _times(value: float, _: float) -> str:
    return f"{value:.2f}x"
