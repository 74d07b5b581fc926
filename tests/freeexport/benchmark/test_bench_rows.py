from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fake_peer
import pytest
from bench_settings import SETTINGS

from freeexport.benchmark.contenders import Run
from freeexport.benchmark.peers.environment import PeerError
from freeexport.benchmark.report import Report, as_dict, table
from freeexport.benchmark.rounds import Measured, measure
from freeexport.benchmark.rows import rows_of
from runtime.errors import FreeExportError

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Fake:
    name: str
    required: bool = False
    missing: bool = False
    precision: str = "fp32"
    threads: int = 1

    def prepare(self) -> tuple[list[str], str, dict[str, Any]]:
        if self.missing:
            raise PeerError("its environment cannot be built")
        program = "import sys, runpy; sys.path.insert(0, sys.argv[1]); runpy.run_path(sys.argv[2], run_name='__main__')"
        return [sys.executable, "-c", program, str(ROOT), fake_peer.__file__], "", {}


def run(tokens: tuple[int, ...] = (1, 2, 3, 4), start: float = 0.5, step: float = 0.1, **given: Any) -> Run:
    times = tuple(start + step * number for number in range(len(tokens)))
    return Run(tokens, times, times[-1], peak_bytes=given.pop("peak_bytes", 1000), **given)


def measured(**rounds: list[list[Run]]) -> Measured:
    return Measured(rounds, {name: {"library": "1.0"} for name in rounds})  # type: ignore[arg-type]


def test_figures_of_a_row() -> None:
    found = measured(one=[[run()], [run(step=0.2)], [run(step=0.3)]])
    (row,) = rows_of([Fake("one")], found, None, True)
    assert row.tokens_per_second == pytest.approx(4 / 1.1)
    assert row.spread == pytest.approx((4 / 0.8 - 4 / 1.4) / (4 / 1.1))
    assert row.decode_per_second == pytest.approx(5)
    assert row.first_token_ms == pytest.approx(500)
    assert row.token_ms == pytest.approx(200)
    assert row.token_ms_95 == pytest.approx(300)
    assert row.ratio == 1
    assert row.agreement is None


def test_ratios_are_to_the_first_that_ran_and_withheld_on_a_busy_machine() -> None:
    found = measured(two=[[run(step=0.5)]], three=[[run()]])
    contenders = [Fake("one"), Fake("two"), Fake("three")]
    assert [row.ratio for row in rows_of(contenders, found, None, True)] == [1, pytest.approx(2.0 / 0.8)]
    assert [row.ratio for row in rows_of(contenders, found, None, False)] == [None, None]


def test_agreement_and_where_it_ends() -> None:
    answers = [(1, 2, 3, 4), (1, 2, 3, 4)]
    found = measured(one=[[run(), run((1, 2, 9, 4))]], two=[[run(), run()]])
    first, second = rows_of([Fake("one"), Fake("two")], found, answers, True)
    assert (first.agreement, first.first_difference) == (7 / 8, 2)
    assert (second.agreement, second.first_difference) == (1, None)


def test_deep_passes_a_token_are_counted() -> None:
    (row,) = rows_of([Fake("one")], measured(one=[[run(sync_sizes={1: 1, 2: 1}, overhead=4e-5)]]), None, True)
    assert row.passes == pytest.approx(2 / 3)
    assert row.overhead_us == pytest.approx(10)


def test_the_table_says_who_could_not_run_and_leaves_out_what_nobody_has() -> None:
    rows = rows_of([Fake("one")], measured(one=[[run()]]), None, True)
    text = table(Report(SETTINGS, rows, {"two": "no wheel for this machine"}, 2e10))
    assert "two: not run: no wheel for this machine" in text
    assert "2 threads read 20.0 GB/s" in text
    assert "roofline" not in text
    assert "busy" not in text
    assert "busy" in table(Report({**SETTINGS, "idle": False}, rows, {}, 2e10))


def test_saved_figures_hold_every_row() -> None:
    rows = rows_of([Fake("one")], measured(one=[[run()]]), None, True)
    saved = as_dict(Report(SETTINGS, rows, {}, 1.0))
    assert saved["rows"][0]["name"] == "one"
    assert saved["rows"][0]["versions"] == {"library": "1.0"}


def test_everyone_runs_in_every_round_and_failures_stop_nobody_else() -> None:
    contenders = [Fake("missing", missing=True), Fake("good")]
    found = measure(contenders, [[5], [6]], 3, 2, settle=0)
    assert found.failed == {"missing": "its environment cannot be built"}
    assert [[run.tokens for run in turn] for turn in found.rounds["good"]] == [[(6, 7, 8), (7, 8, 9)]] * 2
    assert found.versions == {"good": {"fake": "1.0"}}


def test_who_fails_while_decoding_has_no_row() -> None:
    found = measure([Fake("bad")], [[5], [fake_peer.DIES]], 3, 2, settle=0)
    assert "ended with code 3" in found.failed["bad"]
    assert rows_of([Fake("bad")], found, None, True) == []


def test_a_required_contender_that_fails_is_an_error() -> None:
    with pytest.raises(FreeExportError, match=r"^ours: ValueError: cannot read this$"):
        measure([Fake("ours", required=True)], [[fake_peer.FAILS]], 3, 1, settle=0)
