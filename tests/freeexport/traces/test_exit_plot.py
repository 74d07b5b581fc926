"""The picture of an exit evaluation, and that of a benchmark, by what they show."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from bench_settings import SETTINGS

from freeexport.benchmark import plot as bench_plot
from freeexport.benchmark.report import Report as Benchmark
from freeexport.benchmark.rows import Row
from freeexport.costs.per_layer import StepCosts
from freeexport.traces import layers_plot as exit_plot
from freeexport.traces.compare_layers import Exit, Options, Report
from freeexport.traces.curve import Curve

pytest.importorskip("matplotlib")


def report(*speeds: float) -> Report:
    """Exits whose curves rise with depth, with these speeds."""
    random = np.random.default_rng(0)
    exits = []
    for layer, speed in enumerate(speeds, start=1):
        confidence = random.random(400)
        curve = Curve.of(confidence, random.random(400) < 0.2 + 0.8 * layer / len(speeds) * confidence)
        point = curve.at_agreement(0.99)
        exits.append(Exit(layer, 0.5, 0.5, {}, point, speed, 0.3, curve))
    costs = StepCosts(layer=1, head=0, growth={1: 1, 16: 1}, measured=False)
    return Report("g2p", len(speeds) + 1, 400, 20, Options(), 1.0, costs, tuple(exits))


def drawn(one: Report) -> tuple[Any, Any]:
    figure = exit_plot.draw(one)
    figure.canvas.draw()
    curves, speeds = figure.axes
    return curves, speeds


@pytest.mark.parametrize("layers", [1, 2, 7, 29])
def test_layers_are_counted_in_whole_numbers(layers: int) -> None:
    _, speeds = drawn(report(*np.linspace(0.9, 1.6, layers).tolist()))
    low, high = speeds.get_xlim()
    ticks = [tick for tick in speeds.get_xticks() if low <= tick <= high]
    assert ticks
    assert all(tick == int(tick) and 1 <= tick <= layers for tick in ticks)


def test_bars_start_at_the_speed_of_mode_full_and_carry_their_values() -> None:
    _, speeds = drawn(report(0.8, 1.0, 1.55))
    assert [bar.get_y() for bar in speeds.patches] == [1, 1, 1]
    assert [bar.get_y() + bar.get_height() for bar in speeds.patches] == pytest.approx([0.8, 1.0, 1.55])
    assert [text.get_text() for text in speeds.texts] == ["0.80x", "1.00x", "1.55x"]
    low, high = speeds.get_ylim()
    assert low < 0.8
    assert high > 1.55


def test_layers_that_gain_nothing_leave_room_for_the_line_of_mode_full() -> None:
    _, speeds = drawn(report(0.9, 0.95))
    assert speeds.get_ylim()[1] > 1


def test_many_layers_have_no_values_over_each_other_and_few_curves() -> None:
    curves, speeds = drawn(report(*[1.1] * 29))
    assert len(speeds.patches) == 29
    assert not speeds.texts
    assert len(curves.lines) <= 13


def test_curves_differ_by_dashes_too_and_their_legend_is_beside_them() -> None:
    curves, _ = drawn(report(1.1, 1.2, 1.3))
    lines = curves.lines[:3]
    assert len({line.get_linestyle() for line in lines}) == 3
    assert curves.get_legend().get_window_extent().x0 > curves.get_window_extent().x1
    names = [text.get_text() for text in curves.get_legend().get_texts()]
    assert names == ["layer 1", "layer 2", "layer 3", "99 % agree"]


def test_every_curve_is_inside_the_panel() -> None:
    curves, _ = drawn(report(1.1, 1.2, 1.3))
    bottom, top = curves.get_ylim()
    for line in curves.lines:
        values = np.asarray(line.get_ydata(), float)
        assert bottom >= values.max()
        assert values.min() >= top > 0


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
