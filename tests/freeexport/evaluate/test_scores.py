"""Rows, intervals, curves and verdicts of an evaluation, from records that were made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade_bundle import write_bundle

from freeexport.costs.bytes import Calls
from freeexport.costs.intervals import speed_interval
from freeexport.costs.verdict import MIN_LINES, setting_verdicts
from freeexport.evaluate.records import Record
from freeexport.evaluate.scores import curves_of, rows_of, score
from freeexport.evaluate.settings import Entry, Setting
from freeexport.task_metrics import Reference, metric_of
from runtime.bundle.bundle import Bundle

FULL, FREE, STATIC = Setting("full"), Setting("free", 0.5), Setting("static")


def record(setting: Setting, line: int, seconds: float, text: str, exits: int, **changes: Any) -> Record:
    """Ten tokens, of which the prompt takes 0.1 seconds."""
    flags = (False, *(number < exits for number in range(9)))
    ids = tuple(map(ord, f"{text:10}"))
    made = Record("one", setting.name, line, 0, seconds, seconds - 0.1, 10, 0.0, text, ids, flags, "eos")
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


def test_first_token_of_an_encoder_decoder_counts_like_any_other(tmp_path: Path) -> None:
    """Ten tokens, of which seven exit, the first among them; and ten of which three do, without the first."""
    path = write_bundle(tmp_path / "one", layers=30, exit_layer=10, encoder_capacity=64, decoder_start_token_id=0)
    entry = Entry("one", Bundle.open(path), (FULL, FREE))
    flags = [(True,) * 7 + (False,) * 3, (False,) * 7 + (True,) * 3]
    lines = {
        line: [record(FREE, line, 0.6, "right", 0, exited=exited, first_seconds=0.05)]
        for line, exited in enumerate(flags, start=1)
    }
    full = {
        line: [replace(turn, first_seconds=0.1) for turn in turns] for line, turns in records()["one", "full"].items()
    }
    found = {("one", "full"): full, ("one", FREE.name): lines}
    whole, row = rows_of([entry], found, REFERENCES, [metric_of("exact")])
    assert (whole["exit_rate"], whole["first_speed"]) == (0, 1)
    assert (row["exit_rate"], row["layers"]) == (0.5, 20)
    assert row["first_speed"] == pytest.approx(2)


def test_rows_match_hand_computed_values(entry: Entry) -> None:
    full, static, free = rows_of([entry], records(), REFERENCES, [metric_of("exact")])
    assert [full[name] for name in ("request_speed", "token_speed", "same", "exit_rate", "layers")] == [1, 1, 1, 0, 30]
    assert free["request_speed"] == pytest.approx(1.1 / 0.6)
    assert free["token_speed"] == pytest.approx(2)
    assert free["tokens_per_second"] == pytest.approx(18)
    assert free["exit_rate"] == 0.5
    assert free["layers"] == 20
    assert (static["exit_rate"], static["layers"], static["same"]) == (1, 10, 0.5)
    assert static["scores"]["exact"]["value"] == static["scores"]["exact"]["relative"] == 0.5
    assert full["scores"]["exact"]["low"] is None


def test_acceptance_by_position_is_summed_over_lines(entry: Entry) -> None:
    found = records()
    for line, drafts in ((1, {"exit": [(3, 4), (0, 3)], "lookup": [(1, 1)]}), (2, {"exit": [(1, 4)]})):
        calls = Calls(5, 9, 9, 9, True, 0, {4: 2}, drafts)
        found["one", FREE.name][line] = [record(FREE, line, 0.6, "right", 0, calls=calls)]
    full, _, free = rows_of([entry], found, REFERENCES, [metric_of("exact")])
    assert free["drafts"] == {"exit": [(0.5, 8), (0, 3)], "lookup": [(1, 1)]}
    assert full["drafts"] == {}


def test_exit_layers_count_wherever_they_run(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "one", layers=30, exit_layer=10, exit_layers=2, packed=True)
    entry = Entry("one", Bundle.open(bundle), (FULL, STATIC, FREE))
    rows = rows_of([entry], records(), REFERENCES, [metric_of("exact")])
    assert [row["layers"] for row in rows] == [30, 12, 22]


def test_the_median_round_of_each_line_counts(entry: Entry) -> None:
    found = records()
    for line, slow in ((1, 9.0), (2, 1.1)):
        one = found["one", "full"][line][0]
        found["one", "full"][line] += [replace(one, round=1, seconds=slow), replace(one, round=2, decode_seconds=0.5)]
    full, static, _ = rows_of([entry], found, REFERENCES, [metric_of("exact")])
    assert full["seconds_per_request"] == pytest.approx(1.1)
    assert full["spread"] == pytest.approx(1)  # 2, 2 and 1 seconds
    assert static["spread"] is None


def test_scores_are_relative_to_the_first_full_model_if_there_is_one(entry: Entry) -> None:
    other = replace(entry, name="two", settings=(STATIC,))
    found = {**records(), ("two", "static"): records()["one", "static"]}
    row = rows_of([entry, other], found, REFERENCES, [metric_of("exact")])[-1]
    assert (row["bundle"], row["against"], row["scores"]["exact"]["relative"]) == ("two", "one", 0.5)
    assert row["request_speed"] == pytest.approx(1.1 / 0.3)
    rows = rows_of([entry], records(), dict.fromkeys((1, 2), Reference(("other",))), [metric_of("exact")])
    assert [row["scores"]["exact"]["relative"] for row in rows] == [None] * 3
    assert all(curve["fastest"] is None for curve in curves_of(rows, metric_of("exact"), 0.99))


def test_share_of_an_error_rate_is_computed_from_accuracy() -> None:
    """Two wrong lines of ten, and three: an eighth less of what is right, in tables and in verdicts."""
    whole, worse = (np.stack([np.arange(10) >= wrong, np.ones(10)], axis=1).astype(float) for wrong in (2, 3))
    found = score(metric_of("exact-error"), worse, whole)
    assert (found["value"], found["relative"]) == (0.7, pytest.approx(7 / 8))
    assert found["error"] == pytest.approx(0.3)
    assert found == score(metric_of("exact"), worse, whole) | {"error": found["error"]}


def test_bundles_are_also_compared_with_the_full_model_of_the_first(entry: Entry) -> None:
    other = replace(entry, name="two", settings=(FULL, STATIC))
    found = {**records(), ("two", "static"): records()["one", "static"]}
    found["two", "full"] = {
        line: [replace(turn, seconds=2.2, decode_seconds=2.0, text="wrong") for turn in turns]
        for line, turns in records()["one", "full"].items()
    }
    rows = rows_of([entry, other], found, REFERENCES, [metric_of("exact")])
    assert all(row["first_bundle"] is None for row in rows[:3])
    full, static = rows[3:]
    assert (full["against"], full["request_speed"], full["request_low"]) == ("two", 1, None)
    assert full["first_bundle"]["request_speed"] == full["first_bundle"]["request_high"] == 0.5
    assert full["first_bundle"]["token_speed"] == 0.5
    assert full["first_bundle"]["scores"]["exact"]["relative"] == 0
    assert static["request_speed"] == pytest.approx(2 * static["first_bundle"]["request_speed"])


def many(wrong: int, lines: int = 200) -> dict[tuple[str, str], dict[int, list[Record]]]:
    """Free is twice as fast as full and wrong in some lines; static is four times as fast, and wrong in half."""

    def made(setting: Setting, seconds: float, wrong: int) -> dict[int, list[Record]]:
        return {
            line: [record(setting, line, seconds + line % 7 / 100, "wrong" if line < wrong else "right", 5)]
            for line in range(lines)
        }

    each = {"full": made(FULL, 1.0, 0), FREE.name: made(FREE, 0.5, wrong), "static": made(STATIC, 0.25, lines // 2)}
    return {("one", name): found for name, found in each.items()}


@pytest.mark.parametrize(
    ("wrong", "lines", "fastest", "said"),
    [
        # 0.5 % wrong: the point is above 99 %, and so is the lower bound of 5,000 lines, but not of 200.
        (25, 5000, FREE.name, "free 0.5 is the fastest that keeps 99 % of full's exact: 1.9"),
        (1, 200, None, "no setting keeps 99 % of full's exact by the lower bound of its interval"),
        (0, 200, FREE.name, "free 0.5 is the fastest"),
        (0, MIN_LINES - 1, None, "no winner: 99 lines are too few"),
    ],
)
def test_winner_keeps_the_quality_by_the_lower_bound_of_its_interval(
    entry: Entry, wrong: int, lines: int, fastest: str | None, said: str
) -> None:
    metric = metric_of("exact")
    references = {line: Reference(("right",)) for line in range(lines)}
    rows = rows_of([entry], many(wrong, lines), references, [metric])
    curves = {curve["method"]: curve for curve in curves_of(rows, metric_of("exact"), 0.99)}
    assert curves["free"]["fastest"] == fastest
    assert curves["static"]["fastest"] is None
    assert curves["static"]["area"] is None  # a point is no curve
    (verdict,) = setting_verdicts(rows, metric, 0.99)
    assert said in verdict


def test_setting_that_may_be_slower_than_full_does_not_win(entry: Entry) -> None:
    """Faster by a little on average, on half of the lines only."""
    found = many(0)
    found["one", FREE.name] = {
        line: [replace(one, seconds=one.seconds * (2.9 if line % 2 else 1.0))]
        for line, (one,) in found["one", FREE.name].items()
    }
    references = {line: Reference(("right",)) for line in range(200)}
    rows = rows_of([entry], found, references, [metric_of("exact")])
    (verdict,) = setting_verdicts(rows, metric_of("exact"), 0.99)
    assert "no setting that keeps 99 % of full's exact is surely faster than full: free 0.5 has 1.0" in verdict


def test_no_quality_verdict_if_one_line_outweighs_the_margin(entry: Entry) -> None:
    """Full and free are right in the same line of 200: the paired interval is 100 % to 100 %, and tells nothing."""
    found = many(0)
    references = {line: Reference(("right" if line == 7 else "other",)) for line in range(200)}
    metric = metric_of("exact")
    rows = rows_of([entry], found, references, [metric])
    free = rows[-1]["scores"]["exact"]
    assert (free["relative"], free["low"], free["high"], free["support"]) == (1, 1, 1, 1)
    assert setting_verdicts(rows, metric, 0.99) == [
        "no verdict: exact of the full model rests on 1 of 200 lines, too few to see a loss of 1 %; "
        "give more lines, or another metric"
    ]
    assert all(curve["fastest"] is None for curve in curves_of(rows, metric, 0.99))
    # The tokens of lossless are those of full, so that only its speed is in question.
    drafting = Setting("lossless")
    found["one", "lossless"] = {
        line: [replace(one, setting="lossless")] for line, (one,) in found["one", FREE.name].items()
    }
    rows = rows_of([replace(entry, settings=(FULL, STATIC, FREE, drafting))], found, references, [metric])
    (verdict,) = setting_verdicts(rows, metric, 0.99)
    assert verdict.startswith("lossless is the fastest with full's tokens: 1.9")
    assert "no verdict on the others: exact of the full model rests on 1 of 200 lines" in verdict


def test_support_counts_the_lines_behind_a_score() -> None:
    """A score that all lines share rests on all of them, and one with unequal lines on fewer."""
    for right in ([0.5] * 8, [1.0] * 3 + [0.0] * 5, [1.0, 0.5, 0.5] + [0.0] * 5):
        table = np.stack([right, np.ones(8)], axis=1)
        expected = sum(right) ** 2 / sum(one * one for one in right)
        assert score(metric_of("rouge-l"), table, table)["support"] == pytest.approx(expected)
    assert score(metric_of("exact"), table, 0 * table + [0, 1])["support"] == 0


def test_speed_interval_is_paired_over_lines() -> None:
    full = np.random.default_rng(1).uniform(1, 3, 300)
    assert speed_interval(full / 2, full) == (pytest.approx(2), pytest.approx(2))
    low, high = speed_interval(full / np.random.default_rng(2).uniform(1.5, 2.5, 300), full)
    assert low is not None
    assert high is not None
    assert 1.8 < low < 1.95 < high < 2.05
    assert speed_interval(full[:1], full[:1]) == (None, None)
    # Half the seconds for half the tokens is no faster a token.
    tokens = np.stack([full, 10 * full], axis=1)
    assert speed_interval(tokens / 2, tokens) == (pytest.approx(1), pytest.approx(1))


def test_quality_interval_is_paired() -> None:
    random = np.random.default_rng(1)
    whole = np.stack([random.integers(0, 2, 400), np.ones(400)], axis=1).astype(float)
    metric = metric_of("exact")
    same = score(metric, whole.copy(), whole)
    assert (same["low"], same["high"]) == (1, 1)
    worse = whole.copy()
    worse[np.flatnonzero(whole[:, 0])[:20], 0] = 0
    low, high = (score(metric, worse, whole)[name] for name in ("low", "high"))
    assert low is not None
    assert high is not None
    assert low < 1 - 20 / whole[:, 0].sum() < high < 1
    # As wide as 20 of about 200 lines make it, not as two independent samples would be.
    assert high - low < 0.12
