"""Pictures of a calibration: the mixture, what thresholds give, and whether P(agree) is calibrated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from freeexport.system.plot import BLUE, GREEN, GREY, ORANGE, PURPLE, legend_beside, new_figure, save_figure
from runtime.bundle.beta_mixture import NEVER_EXIT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from freeexport.calibration.calibrate import Calibrated

MIXTURE, THRESHOLDS, RELIABILITY = "mixture.png", "thresholds.png", "reliability.png"
BINS = 10  # of equally many tokens
_EDGES = 41
# Where not even the surest tenth agrees more often than not, there is no threshold, and no chance to check.
_LITTLE = 0.5


def write_plots(result: Calibrated, directory: Path) -> list[str]:
    """PNGs in `directory`; returns their names. The reliability diagram is left out where `unreliable` says why."""
    drawings: dict[str, Callable[[Calibrated], Figure]] = {MIXTURE: mixture_figure, THRESHOLDS: thresholds_figure}
    if unreliable(result) is None:
        drawings[RELIABILITY] = reliability_figure
    for name, draw in drawings.items():
        save_figure(draw(result), directory / name)
    return list(drawings)


def unreliable(result: Calibrated) -> str | None:
    """Why there is no reliability diagram, as a sentence; None where there is one."""
    if result.calibration.mixture is None:
        return "There is no reliability diagram: this method fits no chance of agreement to check."
    _, seen, _ = reliability(result)
    if seen.max() >= _LITTLE:
        return None
    return (
        f"There is no reliability diagram: little agrees. Of all tokens {result.calibration.agreement:.1%} agree, and "
        f"even in the best tenth of the tokens, by confidence, only {seen.max():.1%} do."
    )


def mixture_figure(result: Calibrated) -> Figure:
    """Above, the tokens by confidence with the fitted densities; below, P(agree | confidence) beside what was seen."""
    mixture, traces = result.calibration.mixture, result.traces
    figure = new_figure(9, 6)
    upper, lower = figure.subplots(2, 1, sharex=True)
    edges = np.linspace(0, 1, _EDGES)
    grid = np.linspace(0.002, 0.998, 500)
    counts = {}
    for agrees, colour, hatch, line, name in (
        (True, BLUE, "", "-", "agree"),
        (False, ORANGE, "////", "--", "disagree"),
    ):
        values = traces.confidence[traces.agrees == agrees]
        counts[agrees] = np.histogram(values, edges)[0]
        style = {"facecolor": (*_rgb(colour), 0.25), "edgecolor": colour, "hatch": hatch, "linewidth": 0.8}
        weights = np.full(len(values), 1 / max(1, traces.tokens))
        upper.hist(values, edges.tolist(), weights=weights, histtype="stepfilled", label=f"tokens that {name}", **style)
        if mixture is not None:
            share = mixture.weight_agree if agrees else 1 - mixture.weight_agree
            component = mixture.agree if agrees else mixture.disagree
            fitted = share * component.density(grid) / (_EDGES - 1)
            upper.plot(grid, fitted, color=colour, linestyle=line, label=f"fitted, {name}")
    # Few tokens decide: most are sure and agree, and on a linear scale the others could not be seen.
    upper.set(ylabel="share of all tokens (log)", yscale="log", xlim=(0, 1), ylim=(0.5 / max(1, traces.tokens), 1))
    upper.yaxis.set_major_formatter(_percent)
    _seen_chance(lower, edges, counts[True], counts[False])
    if mixture is not None:
        lower.plot(grid, mixture.posterior(grid), color="black", label="P(agree | confidence)")
    lower.set(xlabel=f"confidence ({result.calibration.confidence})", ylabel="tokens that agree", ylim=(-0.03, 1.03))
    lower.yaxis.set_major_formatter(_percent)
    for axes in (upper, lower):
        if result.calibration.threshold < NEVER_EXIT:
            axes.axvline(result.calibration.threshold, color=GREY, linestyle=":", label="threshold")
        legend_beside(axes)
    return figure


def _seen_chance(axes: Axes, edges: np.ndarray, agree: np.ndarray, disagree: np.ndarray) -> None:
    """The share that agrees of each bin's tokens."""
    tokens = agree + disagree
    some = tokens > 0
    centres = (edges[:-1] + edges[1:])[some] / 2
    sizes = 8 + 60 * np.sqrt(tokens[some] / tokens.max()) if some.any() else []
    axes.scatter(centres, agree[some] / tokens[some], s=sizes, color=GREEN, label="seen (larger: more tokens)")


def thresholds_figure(result: Calibrated) -> Figure:
    """Above, exit rate, agreement and quality by threshold; below, speed as a multiple of mode full, where known."""
    rows = result.calibration.table
    fast = any(row.predicted_speedup is not None or row.measured_speedup is not None for row in rows)
    figure = new_figure(9, 6.5 if fast else 4)
    panels = np.atleast_1d(figure.subplots(1 + fast, 1, sharex=True)).tolist()
    shares = panels[0]
    _line(shares, [row.exit_rate for row in rows], BLUE, "o-", "tokens that exit")
    _line(shares, [row.agreement for row in rows], ORANGE, "^--", "exits that agree")
    _line(shares, [row.quality for row in rows], GREEN, "s-.", "quality kept")
    if result.break_even is not None and result.costs.trusted:
        shares.axhline(result.break_even, color=GREY, linestyle="-.", label=f"exits pay above {result.break_even:.1%}")
    top = max([1.0, *(row.quality for row in rows if row.quality is not None)])
    shares.set(ylabel="share", ylim=(-0.03, top + 0.05))
    shares.yaxis.set_major_formatter(_percent)
    if fast:
        _speeds(panels[1], [row.predicted_speedup for row in rows], [row.measured_speedup for row in rows])
    names = ["never" if row.threshold >= NEVER_EXIT else f"{row.threshold:.4g}" for row in rows]
    chosen = [number for number, row in enumerate(rows) if row.threshold == result.calibration.threshold]
    for axes in panels:
        for number in chosen:
            axes.axvline(number, color=GREY, linestyle=":", label=f"chosen: {names[number]}")
        legend_beside(axes)
    panels[-1].set_xticks(range(len(rows)), names, rotation=90 if len(rows) > 12 else 0, fontsize="small")
    panels[-1].set_xlabel("threshold (the rows of the table, evenly spaced)")
    return figure


def _speeds(axes: Axes, predicted: Sequence[float | None], measured: Sequence[float | None]) -> None:
    _line(axes, predicted, PURPLE, "o-", "predicted")
    _line(axes, measured, "black", "D", "measured")
    axes.axhline(1, color="black", linewidth=0.9, label="1.0x: mode full")
    known = [1.0, *(value for value in (*predicted, *measured) if value is not None)]
    room = 0.08 * max(max(known) - min(known), 0.5)
    axes.set(ylabel="speed over mode full", ylim=(min(known) - room, max(known) + room))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.2f}x")


def _line(axes: Axes, values: Sequence[float | None], colour: str, style: str, label: str) -> None:
    """Points at 0, 1, 2 ...; those that are not known are left out, and a line of which none is."""
    known = [(number, value) for number, value in enumerate(values) if value is not None]
    if known:
        axes.plot(*zip(*known, strict=True), style, color=colour, markersize=4, label=label)


def reliability_figure(result: Calibrated) -> Figure:
    """What P(agree | confidence) says against what was seen, in bins of equally many tokens, as near as they are."""
    expected, seen, error = reliability(result)
    low = min(expected.min(), (seen - 2 * error).min())
    high = max(expected.max(), (seen + 2 * error).max())
    room = 0.06 * max(high - low, 0.05)
    limits = (max(-room, low - room), min(1 + room, high + room))
    figure = new_figure(9, 4.6)
    axes = figure.subplots()
    axes.plot(limits, limits, color=GREY, linewidth=0.8, label="the mixture is right")
    axes.errorbar(expected, seen, 2 * error, fmt="o", color=BLUE, capsize=3, label="a tenth of the tokens")
    axes.set(xlabel="P(agree | confidence) of the mixture", ylabel="tokens that agree", xlim=limits, ylim=limits)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_percent)
    legend_beside(axes)
    return figure


def reliability(result: Calibrated) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By bin of tokens sorted by confidence: the mean P(agree) that the mixture gives, the share that agrees, and its
    standard error (of independent tokens); [BINS] each, fewer with fewer tokens."""
    mixture, traces = result.calibration.mixture, result.traces
    assert mixture is not None
    order = np.argsort(traces.confidence, kind="stable")
    parts = [part for part in np.array_split(order, BINS) if len(part)]
    expected = np.array([float(np.mean(mixture.posterior(traces.confidence[part]))) for part in parts])
    seen = np.array([float(np.mean(traces.agrees[part])) for part in parts])
    sizes = np.array([len(part) for part in parts])
    return expected, seen, np.sqrt(np.maximum(seen * (1 - seen), 1e-9) / sizes)


def _percent(value: float, _: float) -> str:
    return f"{100 * value:.3g} %"


def _rgb(colour: str) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    return to_rgb(colour)
