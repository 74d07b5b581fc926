"""The picture of a benchmark, by what it shows."""

from __future__ import annotations

import pytest
from bench_settings import SETTINGS

from freeexport.benchmark import plot as bench_plot
from freeexport.benchmark.report import Report as Benchmark
from freeexport.benchmark.rows import Row

pytest.importorskip("matplotlib")


def test_a_benchmarks_bars_carry_values_and_its_title_names_the_machine() -> None:
    rows = [
        Row("full", "fp32", 45.9, 0.05, 1.0, 50.0, 10.0, 20.0, 25.0, 1000, roofline=0.8),
        Row("hf", "fp32", 13.5, 0.05, 0.3, 14.0, 10.0, 60.0, 65.0, 1000),
    ]
    figure = bench_plot.draw(Benchmark(SETTINGS, rows, {}, 1e9))
    figure.canvas.draw()
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["13.5", "45.9"]
    assert SETTINGS["cpu"] in axes.get_title()
    assert axes.get_xlim()[0] == 0
    assert axes.get_legend().get_window_extent().x0 > axes.get_window_extent().x1
    marks = [line for line in axes.lines if line.get_marker() == "D"]
    assert [list(line.get_xdata()) for line in marks] == [[62.5]]
