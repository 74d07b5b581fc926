"""The tables of a calibration, by what they show."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from manifest_case import MANIFEST
from traces import mixed

from freeexport.calibrate.calibrate import explained
from freeexport.calibrate.calibration_page import calibration_tables, promise, tables
from freeexport.calibrate.threshold import Rule, choose
from freeexport.costs.verdict import ExitFacts, _calibrated, verdict
from freeexport.system.page import print_page
from runtime.adaptation.adaptive_threshold import AdaptiveThreshold
from runtime.bundle.beta import Beta, BetaMixture
from runtime.bundle.calibration import CALIBRATION_VERSION, Calibration, TableRow
from runtime.bundle.costs import Costs

COSTS = Costs(shallow=3.0, shallow_without_head=2.0, deep={1: 9.0, 16: 20.0})


TRACES = mixed(100, 30, agree=0.95)
GOOD = explained(choose(TRACES, Rule()), "bundle", MANIFEST, TRACES, COSTS, Rule())


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (Rule("risk", risk=0.4, delta=0.1), "loss of a sequence at most 0.4 on average, with probability 0.9"),
        (Rule(agreement=0.3), "P(agree | confidence) is at least 0.3 from the threshold on"),
    ],
)
def test_page_states_the_guarantee_of_the_rule(rule: Rule, text: str) -> None:
    traces = mixed(20, 10)
    assert text in promise(explained(choose(traces, rule), "bundle", MANIFEST, traces, COSTS, rule).calibration)


def test_terminal_shows_the_data_behind_the_threshold(capsys: pytest.CaptureFixture[str]) -> None:
    print_page(tables(replace(GOOD, notes=("read this",))))
    shown = capsys.readouterr().out
    assert "read this" in shown
    assert "P(agree | confidence) is at least 0.95" in shown
    assert len(re.findall(r"chosen *$", shown, re.MULTILINE)) == 1


UNITS = st.sampled_from([0.0, 5e-324, 1e-9, 0.5, 1 - 2**-53, 1.0])
COUNTS = st.sampled_from([1, 7, 1 << 50])
SHAPES = st.sampled_from([5e-324, 1e-9, 1.0, 1e9])
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
def test_any_valid_calibration_file_can_be_shown(calibration: Calibration) -> None:
    """`inspect` and a session read them from a bundle that somebody else wrote."""
    read = Calibration.from_json(calibration.to_json())
    assert read == calibration
    for one in calibration_tables(read):
        assert one.row_count or not read.table
    assert 0 <= AdaptiveThreshold(MANIFEST, read, 4000).threshold <= 1
    assert str(verdict(_calibrated(ExitFacts("out", 2, 30), MANIFEST, read, read.costs)))
