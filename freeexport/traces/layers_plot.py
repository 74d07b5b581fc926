"""The curves of an exit evaluation as a picture."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from freeexport.system.plot import BLUE, GREY, ORANGE, legend_beside, new_figure, save_figure
from runtime.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from freeexport.traces.compare_layers import Report

_MOST_CURVES = 12
_MOST_VALUES = 16  # bars that have room for a number above each
_TICKS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998)
_TOP = 0.999  # agreement beyond this is drawn here


def check(path: Path) -> None:
    """Raise, before any long work, what would keep `write` from writing: no matplotlib, no directory, no PNG."""
    import matplotlib  # noqa: F401

    if path.suffix.lower() != ".png":
        raise OptionError(f"--plot is {path}, which is no PNG; end its name in .png")
    if not path.parent.is_dir():
        raise OptionError(f"--plot: there is no directory {path.parent}; make it first")


def write(report: Report, path: Path) -> None:
    """The picture as PNG. Replaces `path`, whole or not at all."""
    save_figure(draw(report), path)


def draw(report: Report) -> Figure:
    """Agreement of exits against exit rate, a curve a layer (evenly spaced layers, where there are many), and the
    predicted speedup by layer."""
    figure = new_figure(13, 5)
    left, right = figure.subplots(1, 2, width_ratios=(5, 4))
    figure.suptitle(f"{report.model}: exits after each of {report.layers} layers")
    _curves(left, report)
    _speedups(right, report)
    return figure


def _curves(axes: Axes, report: Report) -> None:
    from matplotlib import colormaps

    step = -(-len(report.exits) // _MOST_CURVES)
    shown = report.exits[step - 1 :: step]
    # Dark to light with depth, which survives grey printing, and dashes for neighbours.
    shades = colormaps["viridis"](np.linspace(0, 0.9, len(shown)))
    for one, shade, dashes in zip(shown, shades, cycle(("-", "--", "-.", ":"))):
        disagree = 1 - np.minimum(one.curve.agreement, _TOP)
        axes.plot(one.curve.exit_rate, disagree, color=shade, linestyle=dashes, label=f"layer {one.exit_layer}")
    target = report.options.agreement
    axes.axhline(1 - min(target, _TOP), color=GREY, linewidth=0.8, linestyle="--", label=f"{100 * target:.4g} % agree")
    # By the logarithm of those that disagree: exits matter between 90 and 99.9 %, and bad layers are at 20.
    axes.set_yscale("log")
    axes.set(xlabel="tokens that exit", ylabel="exits that agree with the last layer", xlim=(0, 1))
    axes.set_ylim(1.1, 1 - _TOP)
    names = [*(f"{100 * tick:.4g} %" for tick in _TICKS), f"{100 * _TOP:.4g} % or more"]
    axes.set_yticks([1 - tick for tick in (*_TICKS, _TOP)], names)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    legend_beside(axes)


def _speedups(axes: Axes, report: Report) -> None:
    """Bars from 1.0, which is mode full; those below are slower."""
    from matplotlib.ticker import MaxNLocator

    layers, speeds = zip(*((one.exit_layer, one.speedup) for one in report.exits), strict=True)
    colours = [BLUE if speed >= 1 else ORANGE for speed in speeds]
    bars = axes.bar(layers, [speed - 1 for speed in speeds], bottom=1, color=colours)
    if len(layers) <= _MOST_VALUES:
        axes.bar_label(bars, [f"{speed:.2f}x" for speed in speeds], padding=2, fontsize="small")
    axes.axhline(1, color="black", linewidth=0.9)
    low, high = min(1.0, *speeds), max(1.0, *speeds)
    room = 0.1 * max(high - low, 0.05)
    axes.set(xlim=(0.4, report.layers - 0.4), ylim=(low - room, high + room))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.2f}x")
    axes.set(xlabel="exit layer", ylabel="predicted speed over mode full")
    axes.set_title(f"where {100 * report.options.agreement:.4g} % of the exits agree", fontsize="medium")
