"""A benchmark's speeds as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from freeexport.exit_plot import check as check
from freeexport.exit_plot import save_figure

if TYPE_CHECKING:
    from freeexport.bench_report import Report


def write(report: Report, path: Path) -> None:
    """Tokens a second, a bar a contender with the range of its rounds, and where the memory's bandwidth would allow
    more, how much. Replaces `path`, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = report.rows[::-1]
    figure = Figure(figsize=(9, 1.2 + 0.4 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = range(len(rows))
    speeds = [row.tokens_per_second for row in rows]
    errors = [row.spread * row.tokens_per_second / 2 for row in rows]
    axes.barh(places, speeds, xerr=errors, color="tab:blue")
    for place, row in enumerate(rows):
        if row.roofline:
            limit = row.decode_per_second / row.roofline
            axes.plot([limit, limit], [place - 0.4, place + 0.4], color="tab:red")
    axes.set_yticks(places, [f"{row.name} ({row.precision})" for row in rows])
    axes.set_xlabel("tokens per second; red: as fast as the memory can be read")
    axes.set_title(f"{report.settings['model']}, {report.settings['threads']} threads")
    save_figure(figure, path)
