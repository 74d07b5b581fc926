"""Pictures of a calibration: the mixture, what thresholds give, and whether P(agree) is what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from freeexport.calibration import Calibrated

MIXTURE, THRESHOLDS, RELIABILITY = "mixture.png", "thresholds.png", "reliability.png"
BINS = 10  # of equally many tokens


def write_plots(result: Calibrated, directory: Path) -> list[str]:
    """PNGs in `directory`; returns their names. Without a mixture there is no reliability diagram."""
    drawings = {MIXTURE: _mixture, THRESHOLDS: _thresholds}
    if result.calibration.mixture is not None:
        drawings[RELIABILITY] = _reliability
    for name, draw in drawings.items():
        _save(result, draw, directory / name)
    return list(drawings)


def _save(result: Calibrated, draw: Callable[[Calibrated, Axes], None], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    draw(result, figure.subplots())
    figure.savefig(path, format="png", dpi=110)


def _mixture(result: Calibrated, axes: Axes) -> None:
    """Both densities, weighted, over the histogram of the tokens; P(agree) on the right axis."""
    traces, mixture = result.traces, result.calibration.mixture
    edges = np.linspace(0, 1, 41).tolist()
    for agrees, colour, name in ((True, "tab:green", "agree"), (False, "tab:red", "disagree")):
        values = traces.confidence[traces.agrees == agrees]
        weights = np.full(len(values), len(edges[1:]) / max(1, traces.tokens))
        axes.hist(values, edges, weights=weights, color=colour, alpha=0.3, label=f"tokens that {name}")
    axes.set(xlabel=f"confidence ({result.calibration.confidence})", ylabel="density", xlim=(0, 1))
    top = axes.get_ylim()[1]
    if mixture is not None:
        grid = np.linspace(0.002, 0.998, 500)
        axes.plot(grid, mixture.weight_agree * mixture.agree.density(grid), color="tab:green")
        axes.plot(grid, (1 - mixture.weight_agree) * mixture.disagree.density(grid), color="tab:red")
        right = axes.twinx()
        right.plot(grid, mixture.posterior(grid), color="black", label="P(agree | confidence)")
        right.set(ylabel="P(agree | confidence)", ylim=(0, 1.02))
        right.legend(loc="upper center", fontsize="small")
    axes.set_ylim(0, top)
    axes.axvline(result.calibration.threshold, color="tab:blue", linestyle="--", label="threshold")
    axes.legend(loc="upper left", fontsize="small")


def _thresholds(result: Calibrated, axes: Axes) -> None:
    """Exit rate, agreement and speedup by threshold."""
    rows = result.calibration.table
    thresholds = [row.threshold for row in rows]
    axes.plot(thresholds, [row.exit_rate for row in rows], marker=".", label="tokens that exit")
    agreeing = [(row.threshold, row.agreement) for row in rows if row.agreement is not None]
    if agreeing:
        axes.plot(*zip(*agreeing, strict=True), marker=".", label="exits that agree")
    kept = [(row.threshold, row.quality) for row in rows if row.quality is not None]
    if kept:
        axes.plot(*zip(*kept, strict=True), "s", label="quality kept")
    if result.break_even is not None:
        axes.axhline(result.break_even, color="grey", linestyle=":", label="break-even exit rate")
    axes.axvline(result.calibration.threshold, color="tab:blue", linestyle="--", label="threshold")
    axes.set(xlabel="threshold", ylabel="share", xlim=(0, 1), ylim=(0, 1.03))
    right = axes.twinx()
    right.plot(
        thresholds, [row.predicted_speedup or np.nan for row in rows], color="tab:purple", label="speedup, predicted"
    )
    measured = [(row.threshold, row.measured_speedup) for row in rows if row.measured_speedup is not None]
    if measured:
        right.plot(*zip(*measured, strict=True), "o", color="tab:purple", label="speedup, measured")
    right.set(ylabel="speed as a multiple of mode full")
    right.legend(loc="lower right", fontsize="small")
    axes.legend(loc="lower left", fontsize="small")


def _reliability(result: Calibrated, axes: Axes) -> None:
    """What P(agree | confidence) says against what was seen, in bins of equally many tokens."""
    said, seen, error = reliability(result)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    axes.errorbar(said, seen, 2 * error, fmt="o", capsize=3)
    axes.set(xlabel="P(agree | confidence) of the mixture", ylabel="tokens that agree", xlim=(0, 1.02), ylim=(0, 1.02))


def reliability(result: Calibrated) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By bin of tokens sorted by confidence: the mean P(agree) that the mixture gives, the share that agrees, and its
    standard error (of independent tokens); [BINS] each, fewer with fewer tokens."""
    mixture, traces = result.calibration.mixture, result.traces
    assert mixture is not None
    order = np.argsort(traces.confidence, kind="stable")
    parts = [part for part in np.array_split(order, BINS) if len(part)]
    said = np.array([float(np.mean(mixture.posterior(traces.confidence[part]))) for part in parts])
    seen = np.array([float(np.mean(traces.agrees[part])) for part in parts])
    sizes = np.array([len(part) for part in parts])
    return said, seen, np.sqrt(np.maximum(seen * (1 - seen), 1e-9) / sizes)
