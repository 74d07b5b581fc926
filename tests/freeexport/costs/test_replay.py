from __future__ import annotations

from typing import Any

import pytest
from checkpoints import BY_NAME, PROMPTS, Bundles

from freeexport.costs.replay import THRESHOLD, ReplaySession, drawn
from runtime import Session

LLAMA = BY_NAME["llama-tied"]


def test_tokens_exit_as_the_trace_says_and_only_while_it_is_replayed(bundle: Bundles) -> None:
    trace = [True, True, False, True, False, False]
    prompt = list(PROMPTS[0])
    options: dict[str, Any] = {"threshold": THRESHOLD, "drafts": "exit", "max_new_tokens": 7, "ignore_eos": True}
    with Session(bundle(LLAMA), threads=1, slots=1) as plain, ReplaySession(bundle(LLAMA), threads=1) as session:
        expected = plain.generate(prompt, mode="free", **options).confidence
        session.script.trace = trace
        for _ in range(2):  # each request begins the trace anew
            result = session.generate(prompt, mode="free", **options)
            assert result.exited == (False, *trace)
            assert dict(result.stats.sync_sizes) == {3: 1, 2: 1, 1: 1}
        session.script.trace = None
        assert session.generate(prompt, mode="free", **options).confidence == expected


def test_a_full_stack_forces_a_pass_even_if_all_tokens_exit(bundle: Bundles) -> None:
    with ReplaySession(bundle(LLAMA, max_pending=3), threads=1) as session:
        session.script.trace = [True]
        options: dict[str, Any] = {"mode": "free", "drafts": "exit", "threshold": THRESHOLD}
        result = session.generate(list(PROMPTS[0]), max_new_tokens=7, ignore_eos=True, **options)
    assert result.exited == (False, True, True, False, True, True, False)


def test_drawn_exits_are_the_same_each_time_and_have_the_given_rate() -> None:
    assert drawn(0.8, 0) == drawn(0.8, 0) != drawn(0.8, 1)
    assert sum(drawn(0.8, 0)) / len(drawn(0.8, 0)) == pytest.approx(0.8, abs=0.02)
    assert not any(drawn(0.0, 0))
