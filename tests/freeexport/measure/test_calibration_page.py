"""The page of a calibration, its tables and pictures, by what they show."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from manifest_case import MANIFEST
from traces import mixed, trace

from freeexport.conversion.bundle_verdict import _calibrated
from freeexport.measure.calibrate import Calibrated, Comparison, explained
from freeexport.measure.calibration_page import (
    calibration_tables,
    check,
    comparison_tables,
    page,
    promise,
    tables,
    write,
)
from freeexport.measure.exit_verdict import ExitFacts, verdict
from freeexport.measure.plot import mixture_figure, trade_figure
from freeexport.measure.sources import Facts
from freeexport.measure.threshold import Rule, choose
from freeexport.measure.traces import Traces
from freeexport.system.machine import Machine
from freeexport.system.page import print_page
from runtime.adaptation.adaptive_threshold import AdaptiveThreshold
from runtime.bundle.beta import Beta, BetaMixture
from runtime.bundle.calibration import CALIBRATION_VERSION, Calibration, TableRow
from runtime.bundle.costs import Costs

pytest.importorskip("matplotlib")

FACTS = Facts("out/my <bundle>", "0" * 64, "1" * 64, 40, 8, 2, "softmax", 16, (1,), trained=True)
COSTS = Costs(shallow=3.0, shallow_without_head=2.0, deep={1: 9.0, 16: 20.0})
SLOW = Costs(shallow=9.0, shallow_without_head=1.0, deep={1: 5.0, 16: 80.0})
MACHINE = Machine("AMD EPYC 9", (), 4, 8, None, None, 4, 1, 1, None)
MADE = datetime(2026, 11, 26, tzinfo=UTC)


def calibrated(agree: float = 0.95, costs: Costs = COSTS, traces: Traces | None = None) -> Calibrated:
    traces = traces or mixed(100, 30, agree=agree)
    return explained(choose(traces, Rule()), FACTS, traces, costs, Rule())


def indifferent() -> Traces:
    """An exit that hardly agrees, and is no more confident where it does."""
    random = np.random.default_rng(1)
    return Traces.joined(
        trace(random.beta(1, 3, 30).tolist(), (random.random(30) < 0.1).tolist(), line) for line in range(80)
    )


GOOD, LITTLE = calibrated(), calibrated(traces=indifferent())
PAIRS = {row.threshold: row for row in GOOD.calibration.table}


def measured(result: Calibrated, speedups: dict[float, float]) -> Calibrated:
    rows = [replace(row, measured_speedup=speedups.get(row.threshold)) for row in result.calibration.table]
    return replace(result, calibration=replace(result.calibration, table=tuple(rows)))


def html(result: Calibrated) -> str:
    return page(result, MACHINE, MADE)


def labels(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_the_first_picture_shows_what_is_kept_against_speed() -> None:
    result = measured(GOOD, {0.5: 1.3, 0.9: 1.1})
    table = tuple(replace(row, quality=0.98) if row.threshold == 0.5 else row for row in result.calibration.table)
    (axes,) = trade_figure(replace(result, calibration=replace(result.calibration, table=table))).axes
    chosen = f"chosen: {GOOD.calibration.threshold:.4g}"
    kinds = ["tokens kept, speed predicted", "tokens kept, speed measured", "quality kept"]
    assert labels(axes) == [*kinds, chosen, "1.0x: mode full"]
    speeds, kept = axes.lines[0].get_data()
    assert list(speeds) == [row.predicted_speedup for row in GOOD.calibration.table]
    half = PAIRS[0.5]
    place = [row.threshold for row in GOOD.calibration.table].index(0.5)
    assert kept[place] == pytest.approx(1 - half.exit_rate * (1 - (half.agreement or 0)))
    assert list(axes.lines[2].get_data()) == [[1.3], [0.98]]
    low, high = axes.get_xlim()
    assert low < 1 < high


def test_agreeing_and_disagreeing_tokens_differ_by_more_than_colour() -> None:
    tokens, chance = mixture_figure(GOOD).axes
    agree, disagree = [patch for patch in tokens.patches if patch.get_label().startswith("tokens that")]
    assert (agree.get_hatch() or "", disagree.get_hatch()) == ("", "////")
    assert [line.get_linestyle() for line in tokens.lines[:2]] == ["-", "--"]
    assert tokens.get_yscale() == "log"
    assert "P(agree | confidence)" in labels(chance)
    assert "threshold" not in labels(mixture_figure(LITTLE).axes[0])
    for agrees in (0.0, 1.0):  # tokens of one kind alone
        mixture_figure(calibrated(agrees)).canvas.draw()


def test_a_page_names_model_date_and_machine_and_what_was_chosen() -> None:
    text = html(GOOD)
    about = "exit after layer 2 of 8, 2026-11-26, AMD EPYC 9, 4 cores, 8 threads"
    assert f"<title>Calibration of out/my &lt;bundle&gt;: {about}</title>" in text
    assert "AMD EPYC 9, 8 threads<" in page(GOOD, replace(MACHINE, cores=None), MADE)
    table = text.split('<table class="numbers">')[1].split("</table>")[0]
    lines = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in table.split("</tr>")[:-1]]
    assert lines[0] == ["threshold", "exits", "agree", "predicted", ""]
    assert [line[-1] for line in lines[1:]].count("chosen") == 1
    assert '<tr class="chosen"><td class="number">never</td>' in html(LITTLE)


@pytest.mark.parametrize(
    ("result", "level", "text"),
    [
        (GOOD, "good", "Pays"),
        (calibrated(costs=SLOW), "bad", "Does not pay"),
        (calibrated(costs=replace(COSTS, busy=3.0)), "neutral", "on a busy machine"),
        (LITTLE, "bad", "never exits"),
    ],
)
def test_the_verdict_stands_above_the_pictures_coloured_and_in_words(result: Calibrated, level: str, text: str) -> None:
    found = html(result)
    box = re.search(r'<div class="verdict (\w+)">(.*?)</div>', found, re.DOTALL)
    assert box is not None
    assert box[1] == level
    assert text in box[2]
    assert "Next: " in box[2]
    assert box.start() < found.index("<img")


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (Rule("risk", risk=0.4, delta=0.1), "loss of a sequence at most 0.4 on average, with probability 0.9"),
        (Rule("paper"), "the likelihood ratio of agreeing tokens is above 0.4"),
        (Rule(agreement=0.3), "P(agree | confidence) is at least 0.3 from the threshold on"),
    ],
)
def test_a_rule_says_what_it_promises(rule: Rule, text: str) -> None:
    traces = mixed(20, 10)
    assert text in promise(explained(choose(traces, rule), FACTS, traces, COSTS, rule).calibration)


def test_a_terminal_shows_what_the_threshold_rests_on(capsys: pytest.CaptureFixture[str]) -> None:
    result = replace(GOOD, notes=("read this",), speeds=(50.0, 80.0))
    print_page([*tables(result), *comparison_tables(Comparison((result, result), 0, 50.0))])
    shown = capsys.readouterr().out
    assert "read this" in shown
    assert "P(agree | confidence) is at least 0.95" in shown
    assert re.search(r"out/my <bundle> +2 .* 50 +80 +fastest", shown)


def test_a_report_is_a_page_with_pictures_and_replaces_one_at_once(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "index.html").write_text("old")
    check(tmp_path / "report")
    assert (tmp_path / "report" / "index.html").read_text() == "old"
    write(LITTLE, tmp_path / "report")
    text = (tmp_path / "report" / "index.html").read_text()
    pictures = re.findall(r'<img src="([^"]+)" alt="[^"]+">', text)
    assert pictures == ["speed.png", "mixture.png"]
    assert all((tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


UNITS = st.sampled_from([0.0, 5e-324, 1e-9, 0.5, 1 - 2**-53, 1.0])
COUNTS = st.sampled_from([1, 7, 1 << 50])
SHAPES = st.sampled_from([5e-324, 1e-9, 1.0, 1e9])
BETAS = st.builds(Beta, SHAPES, SHAPES)
SECONDS = st.sampled_from([5e-324, 1e-3, 1e15])


@given(
    calibration=st.builds(
        Calibration,
        schema_version=st.just(CALIBRATION_VERSION),
        source_sha256=st.just("ab" * 32),
        vocab_size=COUNTS,
        exit_layer=st.just(2),
        confidence=st.just("softmax"),
        method=st.sampled_from(["bmm", "paper"]),
        threshold=UNITS,
        sequences=COUNTS,
        positions=COUNTS,
        agreement=UNITS,
        target=UNITS,
        mixture=st.builds(
            BetaMixture,
            st.builds(Beta, SHAPES, SHAPES),
            st.builds(Beta, SHAPES, SHAPES),
            st.sampled_from([1e-300, 0.5]),
        ),
        table=st.lists(st.builds(TableRow, UNITS, UNITS, UNITS, UNITS, st.just(1e6)), max_size=3).map(tuple),
        costs=st.builds(Costs, SECONDS, SECONDS, st.fixed_dictionaries({1: SECONDS, 999_999_999: SECONDS})),
    )
)
def test_whatever_figures_a_calibration_file_may_hold_can_be_shown(calibration: Calibration) -> None:
    """`inspect` and a session read them from a bundle that somebody else wrote."""
    read = Calibration.from_json(calibration.to_json())
    assert read == calibration
    for one in calibration_tables(read):
        assert one.row_count or not read.table
    assert 0 <= AdaptiveThreshold(MANIFEST, read, 4000).threshold <= 1
    assert str(verdict(_calibrated(ExitFacts("out", 2, 30), MANIFEST, read)))
