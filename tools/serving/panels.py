"""Panels of a Grafana dashboard: what each asks Prometheus, and a picture of what that answered."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import EngFormatter, Formatter, FuncFormatter, MaxNLocator, PercentFormatter
from PIL import Image

from freeexport.system.output_file import replacing
from freeexport.system.plot import BLUE, DPI, GREEN, ORANGE, PURPLE, YELLOW, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Inches of a unit of the grid: 24 of them are the width.
UNIT = 0.38
# As many as a picture of lines needs: a third of the file.
PALETTE = 64
NOTE = "Drawn by tools/serving/dashboard.py from Prometheus's answers to the dashboard's expressions."
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, "#56B4E9")
# How Grafana's units are written; each axis needs a formatter of its own.
FORMATTERS: dict[str, Callable[[], Formatter]] = {
    "percentunit": lambda: PercentFormatter(1.0),
    "s": lambda: EngFormatter(unit="s", sep=" "),
    "reqps": lambda: FuncFormatter(lambda value, place: f"{value:g} req/s"),
    "short": lambda: EngFormatter(sep=""),
    "none": lambda: FuncFormatter(lambda value, place: f"{value:g}"),
}


class DashboardError(Exception):
    """What is wrong with a dashboard or with the answers to it."""


@dataclass(frozen=True)
class Target:
    """An expression as the dashboard has it, with Grafana's variables, and what its series are called."""

    name: str
    expression: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """`place`: x, y, width and height in units of the grid. `unit`: Grafana's name of it."""

    title: str
    place: tuple[int, int, int, int]
    unit: str
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class Series:
    """`times` in seconds since the epoch; values may be NaN."""

    label: str
    times: tuple[float, ...]
    values: tuple[float, ...]


# The series of each panel, by its title.
Answers = Mapping[str, Sequence[Series]]


def read_panels(dashboard: Path) -> list[Panel]:
    """Raises DashboardError for what cannot be drawn."""
    panels = []
    for panel in json.loads(dashboard.read_text(encoding="utf-8"))["panels"]:
        title, grid, unit = panel["title"], panel["gridPos"], panel["fieldConfig"]["defaults"]["unit"]
        if panel["type"] != "timeseries" or unit not in FORMATTERS:
            raise DashboardError(f"panel {title!r} is a {panel['type']} in {unit!r}, which is not drawn here")
        targets = tuple(
            Target(target["refId"], target["expr"], target.get("legendFormat", "")) for target in panel["targets"]
        )
        panels.append(Panel(title, (grid["x"], grid["y"], grid["w"], grid["h"]), unit, targets))
    if len({panel.title for panel in panels}) < len(panels):
        raise DashboardError("two panels have one title; give each its own")
    return panels


def read_variables(dashboard: Path) -> Iterator[tuple[str, str, str]]:
    """Name, metric and label of each variable that lists a label's values."""
    for variable in json.loads(dashboard.read_text(encoding="utf-8"))["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"])
            if found is None:
                raise DashboardError(f"variable {variable['name']} asks {variable['query']!r}: no label_values")
            yield variable["name"], *found.groups()


def with_values(expression: str, values: Mapping[str, str]) -> str:
    """With `values` in place of Grafana's variables. Raises DashboardError for one that has none."""

    def value(found: re.Match[str]) -> str:
        name = found.group(1)
        if name not in values:
            raise DashboardError(f"nothing is known of the variable ${name} in {expression}")
        return values[name]

    return re.sub(r"\$(\w+)", value, expression)


def all_of(values: Sequence[str]) -> str:
    """What Grafana puts in place of a variable of which all values are chosen, in a matcher: `=~`."""
    escaped = [re.sub(r"([\\^$.*+?()\[\]{}|])", r"\\\\\1", value) for value in values]
    return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"


def rate_interval(scrape: float, step: float) -> str:
    """Grafana's $__rate_interval, of seconds."""
    return milliseconds(max(step + scrape, 4 * scrape))


def milliseconds(seconds: float) -> str:
    """A duration as Prometheus reads it: whole numbers alone."""
    return f"{round(1000 * seconds)}ms"


def series_of(target: Target, answer: Mapping[str, Any]) -> list[Series]:
    """Of an answer of /api/v1/query_range. Raises DashboardError for an error, and where there is nothing to draw."""
    if answer.get("status") != "success":
        raise DashboardError(f"{answer.get('errorType', 'error')}: {answer.get('error', answer)}")
    found = []
    for result in answer["data"]["result"]:
        label = re.sub(r"{{\s*(\w+)\s*}}", lambda name, of=result: of["metric"].get(name.group(1), ""), target.legend)
        times, values = zip(*((float(time), float(value)) for time, value in result["values"]), strict=True)
        found.append(Series(label.strip() or str(result["metric"]), times, values))
    if not found:
        raise DashboardError("no series")
    if not any(map(math.isfinite, (value for series in found for value in series.values))):
        raise DashboardError(f"{len(found)} series, but no number in them")
    return found


def draw(panels: Sequence[Panel], answers: Answers, path: Path) -> None:
    """All panels where the dashboard has them, as PNG at `path`."""
    unit = reduce(math.gcd, (size for panel in panels for size in panel.place))
    columns, rows = (max(p.place[i] + p.place[i + 2] for p in panels) // unit for i in (0, 1))
    figure = new_figure(columns * unit * UNIT, rows * unit * UNIT * 0.75)
    grid = figure.add_gridspec(rows, columns)
    every = [series for found in answers.values() for series in found]
    began, end = min(series.times[0] for series in every), max(series.times[-1] for series in every)
    for panel in panels:
        x, y, width, height = (size // unit for size in panel.place)
        axes = figure.add_subplot(grid[y : y + height, x : x + width])
        axes.set_xlim(0, end - began)
        _draw_panel(axes, panel, answers[panel.title], began)
    figure.supxlabel(NOTE, fontsize="x-small", color="#666666")
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    with replacing(path) as partial:
        image.quantize(PALETTE, dither=Image.Dither.NONE).save(partial, format="PNG", optimize=True)


def _draw_panel(axes: Axes, panel: Panel, found: Sequence[Series], began: float) -> None:
    for series, colour in zip(found, COLOURS * len(found), strict=False):
        times = [time - began for time in series.times]
        axes.plot(times, series.values, label=series.label, color=colour, linewidth=1)
    axes.set_title(panel.title, fontsize=8, loc="left", fontweight="bold")
    axes.yaxis.set_major_formatter(FORMATTERS[panel.unit]())
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize="x-small")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda time, place: f"{time // 60:.0f}:{time % 60:02.0f}"))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 1.5, 3, 6, 10]))
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        loc="upper left", bbox_to_anchor=(0, -0.13), borderaxespad=0, fontsize="xx-small", frameon=False, ncols=3
    )
