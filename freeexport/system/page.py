"""Tables for the terminal, numbers in readable units, and figures for files."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from freeexport.system.output import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

# Palette of Okabe and Ito, distinguishable by colour-blind readers. Markers and dashes distinguish
# the lines too.
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREEN = "#009E73"
PURPLE = "#CC79A7"
GREY = "#666666"
YELLOW = "#E69F00"


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], header: bool = True
) -> Table:
    """Build a table of text under a title.

    Columns whose name ends in `#` are right-aligned, without the `#`. Columns that are empty in
    every row are left out.
    """
    from rich.table import Table
    from rich.text import Text

    columns, rows = filled(columns, list(rows))
    result = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        box=None,
        show_header=header,
        pad_edge=False,
    )
    for name in columns:
        justify: Literal["left", "right"] = "right" if name.endswith("#") else "left"
        result.add_column(name.rstrip("#"), justify=justify, overflow="fold")
    for row in rows:
        # Text instead of str, so that square brackets are not parsed as markup.
        result.add_row(*(Text(cell) for cell in row))
    return result


def filled(
    columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """Remove the columns that are empty in every row. Without rows all columns are kept."""
    used = [
        number for number in range(len(columns)) if not rows or any(row[number] for row in rows)
    ]
    return [columns[number] for number in used], [[row[number] for number in used] for row in rows]


def pairs(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """Build a table of names and values under a title."""
    return table(title, ("", ""), rows, header=False)


def print_page(tables: Iterable[Table]) -> None:
    """Print tables on stdout, each followed by a blank line. Tables without rows are skipped."""
    from rich.console import Console

    # Without a terminal there is no width to fit, and long paths and hashes stay on one line.
    console = Console(width=None if sys.stdout.isatty() else 160)
    for item in tables:
        if item.row_count:
            console.print(item)
            console.print()


def listed_formats(counts: Mapping[str, int]) -> str:
    """Return numbers of weights by format as text, for example "210 in Q4_1, 1 in Q8_0"."""
    return ", ".join(f"{count} in {name}" for name, count in counts.items())


def human_bytes(count: float) -> str:
    """Format a number of bytes in decimal units with three digits: 999 B, 1.23 kB, 45.6 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"


def new_figure(width: float, height: float) -> Figure:
    """Create a figure of a size in inches, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def legend_beside(axes: Axes) -> None:
    """Draw the legend to the right of the axes, outside the data."""
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0,
        frameon=False,
        fontsize="small",
    )


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure atomically, as SVG if `path` ends in .svg, else as PNG."""
    with replacing(path) as partial:
        figure.savefig(partial, format="svg" if path.suffix == ".svg" else "png", dpi=120)
