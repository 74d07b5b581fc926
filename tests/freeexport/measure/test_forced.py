from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import BY_NAME, PROMPTS, Bundles
from draft_plans import draft_exits

from freeexport.measure.traces import THRESHOLD, ReplaySession, exit_trace
from runtime import Session
from runtime.errors import OptionError

LLAMA = BY_NAME["llama-tied"]


def test_tokens_exit_as_the_trace_says_and_only_while_it_is_replayed(bundle: Bundles) -> None:
    trace = [True, True, False, True, False, False]
    prompt, options = list(PROMPTS[0]), {"threshold": THRESHOLD, "max_new_tokens": 7, "ignore_eos": True}
    with Session(bundle(LLAMA), threads=1, slots=1) as plain, ReplaySession(bundle(LLAMA), threads=1) as session:
        expected = plain.generate(prompt, **options).confidence
        with session.replaying(trace):
            for _ in range(2):  # each request begins the trace anew
                result = session.generate(prompt, mode="free", **options)
                assert result.exited == (False, *trace)
                assert dict(result.stats.sync_sizes) == {3: 1, 2: 1, 1: 1}
        assert session.generate(prompt, **options).confidence == expected


def test_a_full_stack_forces_a_pass_whatever_the_trace_says(bundle: Bundles) -> None:
    with ReplaySession(bundle(LLAMA, max_pending=3), threads=1) as session, session.replaying([True]):
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


@pytest.mark.parametrize("name", ["llama-tied", "t5-relu-tied"])
@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_drafts_are_right_at_the_rate_asked_for_and_the_tokens_those_of_full(
    name: str, rate: float, bundle: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft_exits(monkeypatch, 2)
    asked = {"max_new_tokens": 40, "ignore_eos": True}
    exits = {**asked, "mode": "lossless", "drafts": "exit"}
    with ReplaySession(bundle(BY_NAME[name]), threads=1) as session:
        full = session.generate(list(PROMPTS[0]), mode="full", **asked)
        with session.drafting(full.token_ids, rate):
            drafted = session.generate(list(PROMPTS[0]), threshold=0.5, **exits)
        undrafted = session.generate(list(PROMPTS[0]), threshold=1.0, **exits)
    assert drafted.token_ids == undrafted.token_ids == full.token_ids
    tried = drafted.stats.exits + drafted.stats.rejected
    assert tried > 20
    assert undrafted.stats.exits + undrafted.stats.rejected == 0
    # A draft behind a wrong one is discarded with it.
    assert drafted.stats.acceptance == pytest.approx({0.0: 0.0, 0.5: 0.35, 1.0: 1.0}[rate], abs=0.2)
