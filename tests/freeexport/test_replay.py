from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import CASES, PROMPTS
from conftest import Bundles

from freeexport.cost_table import CostTable, DeepCost
from freeexport.replay import THRESHOLD, ReplaySession, exit_trace
from runtime.errors import OptionError

LLAMA = next(case for case in CASES if case.name == "llama-tied")


def test_tokens_exit_as_the_trace_says(bundle: Bundles) -> None:
    trace = [True, True, False, True, False, False]
    with ReplaySession(bundle(LLAMA), trace, threads=1, slots=1) as session:
        for _ in range(2):  # each request begins the trace anew
            result = session.generate(
                list(PROMPTS[0]), threshold=THRESHOLD, max_new_tokens=7, mode="free", ignore_eos=True
            )
            assert result.exited == (False, *trace)
            assert dict(result.stats.sync_sizes) == {3: 1, 2: 1, 1: 1}


def test_a_full_stack_forces_a_pass_whatever_the_trace_says(bundle: Bundles) -> None:
    with ReplaySession(bundle(LLAMA, max_pending=3), [True], threads=1, slots=1) as session:
        result = session.generate(list(PROMPTS[0]), threshold=THRESHOLD, max_new_tokens=7, ignore_eos=True)
    assert result.exited == (False, True, True, False, True, True, False)


def test_drawn_exits_are_the_same_each_time_and_as_many_as_asked_for() -> None:
    assert exit_trace("0.8") == exit_trace("0.8")
    assert sum(exit_trace("0.8")) / len(exit_trace("0.8")) == pytest.approx(0.8, abs=0.02)
    assert not any(exit_trace("0"))


def test_recorded_exits_leave_out_the_first_token_of_each_answer(tmp_path: Path) -> None:
    lines = [{"exited": [False, True, False]}, {"error": "too long"}, {"exited": [False, True]}]
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert exit_trace(str(path)) == [True, False, True]


@pytest.mark.parametrize("text", ["[]\n", "not json", '{"exited": 3}', "", '{"exited": [false]}'])
def test_files_without_exits_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(text)
    with pytest.raises(OptionError, match="generate --output"):
        exit_trace(str(path))


@pytest.mark.parametrize("rate", ["1", "-0.1", "nan"])
def test_rates_out_of_range_are_refused(rate: str) -> None:
    with pytest.raises(OptionError, match="no rate of exits"):
        exit_trace(rate)


def test_predicted_speedup_of_replayed_passes() -> None:
    deep = (DeepCost(1, 5, 6, 6), DeepCost(2, 6, 7, 8), DeepCost(4, 8, 9, 12))
    table = CostTable(shallow=2, shallow_without_head=1, deep=deep, overhead=1)
    # Full: 1 + 6 a token, and 1 outside. Eight tokens in passes over 4, 3 (between 2 and 4) and 1 rows.
    assert table.speedup(8, {4: 1, 3: 1, 1: 1}) == pytest.approx(8 / (2 + (9 + 8 + 6) / 8 + 1))
    assert table.speedup(8, {1: 8}) == pytest.approx(8 / 9)
