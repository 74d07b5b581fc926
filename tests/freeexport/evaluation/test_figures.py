"""Figures of an evaluation, from records that were made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade_bundle import write_bundle

from freeexport.evaluation.figures import area, curves_of, interval, rows_of
from freeexport.evaluation.measure import Entry
from freeexport.evaluation.options import Setting
from freeexport.evaluation.records import Record
from freeexport.metrics import Reference, metric_of
from runtime.bundle.bundle import Bundle

FULL, FREE, STATIC = Setting("full"), Setting("free", 0.5), Setting("static")


def record(setting: Setting, line: int, seconds: float, text: str, exits: int, **changes: Any) -> Record:
    """Ten tokens, of which the prompt takes 0.1 seconds."""
    flags = (False, *(number < exits for number in range(9)))
    ids = tuple(map(ord, f"{text:10}"))
    made = Record("one", setting.name, line, 0, seconds, seconds - 0.1, 10, 0.0, None, text, ids, flags, "eos")
    return replace(made, **changes)


@pytest.fixture
def entry(tmp_path: Path) -> Entry:
    bundle = write_bundle(tmp_path / "one", layers=30, exit_layer=10)
    return Entry("one", Bundle.open(bundle), (FULL, STATIC, FREE))


def records() -> dict[tuple[str, str], dict[int, list[Record]]]:
    full = {1: [record(FULL, 1, 1.1, "right", 0)], 2: [record(FULL, 2, 1.1, "right", 0)]}
    free = {1: [record(FREE, 1, 0.6, "right", 6)], 2: [record(FREE, 2, 0.6, "right", 3)]}
    static = {1: [record(STATIC, 1, 0.3, "right", 9)], 2: [record(STATIC, 2, 0.3, "wrong", 9)]}
    return {("one", one[1][0].setting): one for one in (full, free, static)}  # type: ignore[misc]


REFERENCES = {1: Reference(("right",)), 2: Reference(("right",))}


def test_first_tokens_of_an_encoder_decoder_count(entry: Entry) -> None:
    """Ten tokens, of which seven exit, the first among them; and ten of which three do, without the first."""
    setting = Setting("free", 0.5)
    flags = [(True,) * 7 + (False,) * 3, (False,) * 7 + (True,) * 3]
    lines = {
        line: [record(setting, line, 0.6, "right", 0, exited=exited, first_seconds=0.05)]
        for line, exited in enumerate(flags, start=1)
    }
    full = {
        line: [replace(turn, first_seconds=0.1) for turn in turns] for line, turns in records()["one", "full"].items()
    }
    found = {("one", "full"): full, ("one", setting.name): lines}
    manifest = replace(entry.bundle.manifest, encoder_capacity=64)
    entry = replace(entry, bundle=replace(entry.bundle, manifest=manifest), settings=(FULL, setting))
    whole, row = rows_of([entry], found, REFERENCES, [metric_of("exact")])
    assert (whole.first_exits, whole.exit_rate, whole.first_speed) == (0, 0, 1)
    assert (row.first_exits, row.exit_rate, row.layers) == (0.5, 0.5, 20)
    assert row.first_speed == pytest.approx(2)


def test_rows_are_those_worked_out_by_hand(entry: Entry) -> None:
    full, static, free = rows_of([entry], records(), REFERENCES, [metric_of("exact")])
    assert (full.request_speed, full.token_speed, full.same, full.exit_rate, full.layers) == (1, 1, 1, 0, 30)
    assert free.request_speed == pytest.approx(1.1 / 0.6)
    assert free.token_speed == pytest.approx(2)
    assert free.tokens_per_second == pytest.approx(18)
    assert free.exit_rate == 0.5
    assert free.layers == 20
    assert (static.exit_rate, static.layers, static.same) == (1, 10, 0.5)
    assert (static.scores["exact"].value, static.scores["exact"].relative) == (0.5, 0.5)
    assert full.scores["exact"].low is None
    assert full.joules_per_token is None


def test_layers_of_the_exits_own_count_wherever_they_run(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "one", layers=30, exit_layer=10, exit_layers=2, packed=True)
    entry = Entry("one", Bundle.open(bundle), (FULL, STATIC, FREE))
    full, static, free = rows_of([entry], records(), REFERENCES, [metric_of("exact")])
    assert (full.layers, static.layers, free.layers) == (30, 12, 22)


def test_the_median_round_of_each_line_counts(entry: Entry) -> None:
    found = records()
    slow = [replace(found["one", "full"][1][0], round=turn, seconds=seconds) for turn, seconds in ((1, 9.0), (2, 1.1))]
    found["one", "full"][1] += slow
    full = rows_of([entry], found, REFERENCES, [metric_of("exact")])[0]
    assert full.seconds_per_request == pytest.approx(1.1)


def test_energy_is_that_of_all_rounds_where_all_are_known(entry: Entry) -> None:
    found = records()
    for line in (1, 2):
        found["one", "full"][line] = [replace(found["one", "full"][line][0], joules=2.0)]
    found["one", "static"][1] = [replace(found["one", "static"][1][0], joules=2.0)]
    full, static, _ = rows_of([entry], found, REFERENCES, [metric_of("exact")])
    assert (full.joules_per_token, static.joules_per_token) == (0.2, None)


def test_what_the_full_model_scores_0_in_is_relative_to_nothing(entry: Entry) -> None:
    wrong = {line: Reference(("other",)) for line in (1, 2)}
    rows = rows_of([entry], records(), wrong, [metric_of("exact")])
    assert [row.scores["exact"].relative for row in rows] == [None] * 3
    assert all(curve.fastest is None for curve in curves_of(rows, "exact", 0.99))


def test_a_bundle_without_full_is_compared_with_the_first_one(entry: Entry) -> None:
    other = replace(entry, name="two", settings=(STATIC,))
    found = {**records(), ("two", "static"): records()["one", "static"]}
    row = rows_of([entry, other], found, REFERENCES, [metric_of("exact")])[-1]
    assert (row.bundle, row.against, row.scores["exact"].relative) == ("two", "one", 0.5)
    assert row.request_speed == pytest.approx(1.1 / 0.3)


def test_the_fastest_setting_that_keeps_the_quality_is_found(entry: Entry) -> None:
    rows = rows_of([entry], records(), REFERENCES, [metric_of("exact")])
    curves = {curve.method: curve for curve in curves_of(rows, "exact", 0.99)}
    assert curves["free"].fastest == FREE
    assert curves["free"].speed == pytest.approx(1.1 / 0.6)
    assert curves["static"].fastest is None
    assert curves["static"].area is None  # a point is no curve


def test_the_area_is_the_mean_of_the_best_quality_at_each_speed() -> None:
    assert area([(1, 1)], 2) == 0
    assert area([(1, 1), (2, 1)], 2) == 1
    assert area([(1, 1), (1.5, 0.8), (2, 0.5)], 2) == pytest.approx(0.65)
    assert area([(1, 1), (1.5, 0.8), (1.2, 0.1), (0.9, 2)], 2) == pytest.approx(
        0.4
    )  # what is slower and worse: nothing
    assert area([(1, 1)], 1) == 0


def test_the_interval_is_paired() -> None:
    random = np.random.default_rng(1)
    whole = np.stack([random.integers(0, 2, 400), np.ones(400)], axis=1).astype(float)
    metric = metric_of("exact")
    assert interval(metric, whole, whole) == (1, 1)
    worse = whole.copy()
    worse[np.flatnonzero(whole[:, 0])[:20], 0] = 0
    low, high = interval(metric, worse, whole)
    assert low is not None
    assert high is not None
    assert low < 1 - 20 / whole[:, 0].sum() < high < 1
    # As wide as 20 of about 200 lines make it, not as two independent samples would be.
    assert high - low < 0.12
