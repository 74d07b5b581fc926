"""A benchmark's speeds as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from freeexport.system.plot import BLUE, ORANGE, legend_beside, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from freeexport.benchmark.report import Report


def write(report: Report, path: Path) -> None:
    """The picture as PNG. Replaces `path`, whole or not at all."""
    save_figure(draw(report), path)


def draw(report: Report) -> Figure:
    """Tokens a second, a bar a contender with the range of its rounds, and where the memory's bandwidth would allow
    more, how much."""
    rows = report.rows[::-1]
    figure = new_figure(10, 1.4 + 0.4 * len(rows))
    axes = figure.subplots()
    places = range(len(rows))
    speeds = [row.tokens_per_second for row in rows]
    errors = [row.spread * row.tokens_per_second / 2 for row in rows]
    bars = axes.barh(places, speeds, xerr=errors, color=BLUE, ecolor="black", capsize=3, label="tokens a second")
    axes.bar_label(bars, [f"{speed:.1f}" for speed in speeds], padding=4, fontsize="small")
    limits = [(place, row.decode_per_second / row.roofline) for place, row in enumerate(rows) if row.roofline]
    if limits:
        marked, ends = zip(*limits, strict=True)
        axes.plot(ends, marked, "D", color=ORANGE, markersize=6, label="as fast as the memory can be read")
    axes.margins(x=0.08)
    axes.set_xlim(left=0)
    axes.set_yticks(places, [f"{row.name} ({row.precision})" for row in rows])
    axes.set_xlabel("tokens per second (black: the range of the rounds)")
    used = report.settings
    axes.set_title(
        f"{used['model']}, {used['threads']} threads, batch {used['batch']}, {used['cpu']}", fontsize="medium"
    )
    legend_beside(axes)
    return figure
