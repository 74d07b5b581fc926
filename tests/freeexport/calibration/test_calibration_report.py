"""The page of a calibration and its pictures, by what they show: panels, marks, words."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from traces import mixed, trace

from freeexport.calibration.calibrate import Calibrated, explained, with_measured
from freeexport.calibration.choose import choose
from freeexport.calibration.options import CalibrateOptions
from freeexport.calibration.plots import (
    mixture_figure,
    reliability_figure,
    thresholds_figure,
    unreliable,
    write_plots,
)
from freeexport.calibration.report import page, write
from freeexport.calibration.source import Facts
from freeexport.system.machine import Machine
from freeexport.traces.trace import Traces
from runtime.bundle.costs import Costs

pytest.importorskip("matplotlib")

FACTS = Facts("g2p", "0" * 64, "1" * 64, 40, 8, 2, "softmax", 16, (1,), path="out/my <bundle>", trained=True)
COSTS = Costs(shallow=3.0, shallow_without_head=2.0, deep={1: 9.0, 16: 20.0})
SLOW = Costs(shallow=9.0, shallow_without_head=1.0, deep={1: 5.0, 16: 80.0})
MACHINE = Machine("AMD EPYC 9", (), 4, 8, None, None, 4, 1, 1, None)
MADE = datetime(2026, 11, 26, tzinfo=UTC)


def calibrated(agree: float = 0.95, costs: Costs = COSTS, traces: Traces | None = None) -> Calibrated:
    traces, given = traces or mixed(100, 30, agree=agree), CalibrateOptions()
    return explained(choose(traces, given, None), FACTS, traces, costs, given)


def indifferent() -> Traces:
    """An exit that hardly agrees, and is no surer where it does."""
    random = np.random.default_rng(1)
    return Traces.of([trace(random.beta(1, 3, 30).tolist(), (random.random(30) < 0.1).tolist(), n) for n in range(80)])


GOOD, LITTLE = calibrated(), calibrated(traces=indifferent())
WITHOUT_MIXTURE = replace(GOOD, calibration=replace(GOOD.calibration, mixture=None))


def html(result: Calibrated) -> str:
    return page(result, ["mixture.png"], MACHINE, MADE)


def labels(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def overlaps(figure: Any) -> bool:
    """Whether a legend covers a part of any panel."""
    figure.canvas.draw()
    panels = [axes.get_window_extent() for axes in figure.axes]
    boxes = [axes.get_legend().get_window_extent() for axes in figure.axes]
    return any(box.x0 < panel.x1 and box.y0 < panel.y1 and box.y1 > panel.y0 for box in boxes for panel in panels)


def colours(axes: Any) -> list[str]:
    from matplotlib.colors import to_hex

    return [to_hex(line.get_color()) for line in axes.lines]


@pytest.mark.parametrize("draw", [mixture_figure, thresholds_figure, reliability_figure])
@pytest.mark.parametrize("result", [GOOD, LITTLE], ids=["good", "little"])
def test_legends_stand_beside_the_data_and_no_panel_has_a_second_axis(draw: Any, result: Calibrated) -> None:
    figure = draw(result)
    assert not overlaps(figure)
    positions = [axes.get_position().bounds for axes in figure.axes]
    assert len({tuple(np.round(position, 3)) for position in positions}) == len(positions)


def test_thresholds_have_a_panel_of_shares_and_one_of_speeds_with_mode_full_marked() -> None:
    figure = thresholds_figure(with_measured(GOOD, {0.5: 1.3, 0.9: 1.1}))
    shares, speeds = figure.axes
    assert labels(shares)[:2] == ["tokens that exit", "exits that agree"]
    assert labels(speeds) == ["predicted", "measured", "1.0x: mode full", f"chosen: {GOOD.calibration.threshold:.4g}"]
    assert any(set(line.get_ydata()) == {1} for line in speeds.lines)
    low, high = speeds.get_ylim()
    assert low < 1 < high
    names = [text.get_text() for text in speeds.get_xticklabels()]
    assert names == [f"{row.threshold:.4g}" for row in GOOD.calibration.table]


def test_speeds_below_mode_full_are_shown_with_the_line_they_miss() -> None:
    result = calibrated(costs=SLOW)
    assert max(row.predicted_speedup or 0 for row in result.calibration.table) < 1
    low, high = thresholds_figure(result).axes[1].get_ylim()
    assert low < min(row.predicted_speedup or 1 for row in result.calibration.table)
    assert high > 1


def test_without_known_speeds_there_is_no_panel_for_them() -> None:
    busy = calibrated(costs=replace(COSTS, busy=3.0))
    (shares,) = thresholds_figure(busy).axes
    assert not any("pay" in label for label in labels(shares))


def test_quality_above_the_full_models_is_inside_the_panel() -> None:
    table = tuple(replace(row, quality=1.2) if row.threshold == 0.5 else row for row in GOOD.calibration.table)
    result = replace(GOOD, calibration=replace(GOOD.calibration, table=table))
    assert thresholds_figure(result).axes[0].get_ylim()[1] > 1.2


def test_a_threshold_that_never_exits_is_called_never() -> None:
    figure = thresholds_figure(LITTLE)
    assert figure.axes[1].get_xticklabels()[-1].get_text() == "never"
    assert "chosen: never" in labels(figure.axes[0])
    assert "threshold" not in labels(mixture_figure(LITTLE).axes[0])
    assert re.search(r"<tr class=chosen><td>never</td>", html(LITTLE))


def test_agreeing_and_disagreeing_tokens_differ_by_more_than_colour() -> None:
    tokens, chance = mixture_figure(GOOD).axes
    agree, disagree = [patch for patch in tokens.patches if patch.get_label().startswith("tokens that")]
    assert (agree.get_hatch() or "", disagree.get_hatch()) == ("", "////")
    assert [line.get_linestyle() for line in tokens.lines[:2]] == ["-", "--"]
    assert colours(tokens)[:2] == ["#0072b2", "#d55e00"]
    assert tokens.get_yscale() == "log"
    assert "P(agree | confidence)" in labels(chance)


@pytest.mark.parametrize("agree", [0.0, 1.0])
def test_tokens_of_one_kind_alone_can_be_drawn(agree: float) -> None:
    result = calibrated(agree)
    for draw in (mixture_figure, thresholds_figure):
        draw(result).canvas.draw()


def test_the_reliability_diagram_is_as_near_as_its_points() -> None:
    (axes,) = reliability_figure(GOOD).axes
    low, high = axes.get_xlim()
    assert (low, high) == axes.get_ylim()
    points = np.array(axes.containers[0].lines[0].get_xydata())
    assert low < points.min()
    assert points.max() < high
    assert high - low < 1.5 * (points.max() - points.min())


def test_where_little_agrees_a_sentence_stands_for_the_reliability_diagram(tmp_path: Any) -> None:
    assert unreliable(GOOD) is None
    assert "reliability.png" in write_plots(GOOD, tmp_path)
    for result, reason in ((LITTLE, "little agrees"), (WITHOUT_MIXTURE, "fits no chance")):
        said = unreliable(result)
        assert said is not None
        assert reason in said
        assert write_plots(result, tmp_path) == ["mixture.png", "thresholds.png"]
        assert said in html(result)


def test_the_title_names_model_date_and_machine() -> None:
    text = html(GOOD)
    about = "exit after layer 2 of 8, 2026-11-26, AMD EPYC 9, 4 cores, 8 threads"
    assert f"<title>Calibration of out/my &lt;bundle&gt;: {about}</title>" in text
    assert "<h1>Calibration of out/my &lt;bundle&gt;</h1>" in text
    unknown = page(GOOD, [], replace(MACHINE, cores=None), MADE)
    assert "AMD EPYC 9, 8 threads<" in unknown


@pytest.mark.parametrize(
    ("result", "level", "said"),
    [
        (GOOD, "good", "Pays"),
        (calibrated(costs=SLOW), "bad", "Does not pay"),
        (calibrated(costs=replace(COSTS, busy=3.0)), "neutral", "not measured"),
        (LITTLE, "bad", "never exits"),
    ],
)
def test_the_verdict_stands_above_the_pictures_coloured_and_in_words(result: Calibrated, level: str, said: str) -> None:
    text = html(result)
    box = re.search(r'<div class="verdict (\w+)">(.*?)</div>', text)
    assert box is not None
    assert box[1] == level
    assert said in box[2]
    assert "Next: " in box[2]
    assert text.index("verdict good" if level == "good" else f"verdict {level}") < text.index("<img")


def test_the_table_has_no_empty_column_and_names_what_was_chosen() -> None:
    table = html(GOOD).split('<table class="numbers">')[1].split("</table>")[0]
    lines = [re.findall(r"<t[hd]>(.*?)</t[hd]>", line) for line in table.split("</tr>")[:-1]]
    assert lines[0] == ["threshold", "exits", "agree", "predicted", ""]
    assert all(any(column) for column in zip(*lines[1:], strict=True))
    assert [line[-1] for line in lines[1:]].count("chosen") == 1


def test_notes_stand_under_the_verdict() -> None:
    assert "<p>Note: a &lt; b.</p>" in html(replace(GOOD, notes=("a < b",)))


def test_a_report_is_a_page_with_pictures_that_exist(tmp_path: Any) -> None:
    write(LITTLE, tmp_path / "report")
    text = (tmp_path / "report" / "index.html").read_text()
    pictures = re.findall(r'<img src="([^"]+)" alt="[^"]+">', text)
    assert pictures == ["mixture.png", "thresholds.png"]
    assert all((tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
