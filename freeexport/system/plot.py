"""Shared by every picture: colours that colour-blind people can tell, a legend beside the data, the file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from freeexport.system.output_file import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of the palette of Okabe and Ito; marks, hatches and dashes say the same without colour.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
YELLOW = "#E69F00"
DPI = 120


def new_figure(width: float, height: float) -> Figure:
    """Inches; drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def legend_beside(axes: Axes) -> None:
    """To the right of the axes, where no data are."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, frameon=False, fontsize="small")


def save_figure(figure: Figure, path: Path) -> None:
    """As SVG where `path` ends so, else as PNG. Replaces `path`, whole or not at all."""
    with replacing(path) as partial:
        figure.savefig(partial, format="svg" if path.suffix == ".svg" else "png", dpi=DPI)
