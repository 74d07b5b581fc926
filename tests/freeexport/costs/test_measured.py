from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import BY_NAME, PROMPTS, Bundles

from freeexport.costs.measured import (
    THRESHOLD,
    ReplaySession,
    Sample,
    drawn,
    fit_costs,
    measure_bandwidth,
    measured_costs,
    measured_in_child,
)
from freeexport.system.child import ChildError, run_child
from runtime import Session
from runtime.bundle.costs import Costs, Outside, recordable

LLAMA = BY_NAME["llama-tied"]
TRUE = Costs(
    shallow=2.0,
    shallow_without_head=2.4,  # each follows a pass, and is 0.6 slower for it: the head costs 0.2
    deep={1: 3.0, 2: 3.2, 4: 4.0, 8: 6.0, 16: 11.0},
    outside=Outside(full=0.9, free=0.5, sync=0.8),
)
COLDER, BOOKS = 0.6, 0.2  # seconds of `outside.sync`: in the step after a pass, and outside the engines


def sizes_of(steps: int, exit_rate: float, seed: int) -> Counter[int]:
    """Rows of the passes of a sequence whose tokens exit at random; the last stack is dropped."""
    random, sizes, stacked = np.random.default_rng(seed), Counter[int](), 0
    for _ in range(steps):
        stacked += 1
        if random.random() >= exit_rate or stacked == 16:
            sizes[stacked] += 1
            stacked = 0
    return sizes


def sample(exit_rate: float | None, steps: int, seed: int, noise: float = 0.0) -> Sample:
    """Seconds that a request would take if decoding cost what TRUE says; None is mode full."""
    random = np.random.default_rng(seed + 1000)

    def took(seconds: float) -> float:
        return seconds * (1 + noise * random.standard_normal())

    if exit_rate is None:
        one = {1: took(TRUE.deep[1])}
        return Sample(False, steps, took(steps * 2.4), took(steps * 0.9), {1: steps}, one)
    sizes = sizes_of(steps, exit_rate, seed)
    passes = sizes.total()
    shallow, outside = took(steps * 2.0 + passes * COLDER), took(steps * 0.5 + passes * BOOKS)
    return Sample(True, steps, shallow, outside, sizes, {k: took(TRUE.deep_pass(k)) for k in sizes})


def samples(noise: float = 0.0, steps: int = 40) -> list[Sample]:
    kinds = (None, 0.0, 0.5, 0.8, 0.95)
    return [sample(kind, steps, seed, noise) for seed in range(8) for kind in kinds]


def test_costs_are_recovered_from_whole_requests() -> None:
    found = fit_costs(samples())
    assert (found.shallow, found.shallow_without_head) == pytest.approx((2.0, 2.4))
    assert asdict(found.outside) == pytest.approx({"full": 0.9, "free": 0.5, "sync": 0.8})
    assert found.deep == pytest.approx(TRUE.deep)


@pytest.mark.parametrize("exit_rate", [0.3, 0.7, 0.9])
def test_speedups_at_other_exit_rates_are_predicted_from_noisy_requests(exit_rate: float) -> None:
    done = [sample(exit_rate, 200, seed) for seed in range(50, 60)]
    seconds = sum(one.shallow + one.outside + sum(one.deep[k] * n for k, n in one.sizes.items()) for one in done)
    steps = sum(one.steps for one in done)
    sizes = sum((Counter(one.sizes) for one in done), Counter[int]())
    assert fit_costs(samples(noise=0.1)).speedup_of(sizes, steps) == pytest.approx(
        TRUE.full * steps / seconds, rel=0.05
    )


def test_noise_makes_no_cost_negative_and_no_longer_pass_cheaper() -> None:
    drawn = [sample(kind, 40, seed) for seed in range(3) for kind in (None, 0.5, 0.9)]
    shuffled = [replace(one, shallow=one.shallow / (1 + one.passes), outside=-0.1, deep={k: 1 / k for k in one.deep})
                for one in drawn]  # fmt: skip
    found = fit_costs(shuffled)
    assert min(found.shallow, *asdict(found.outside).values()) >= 0
    seconds = list(found.deep.values())
    assert seconds == sorted(seconds)


def test_costs_are_measured_in_a_child_process_that_reports_failures(
    bundle: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freeexport.costs.measured.run_child", run_child)
    monkeypatch.setattr("freeexport.costs.measured.measured_costs", None)  # this process measures nothing
    costs = measured_in_child(bundle(LLAMA, max_pending=4), threads=1, tokens=2, context=1)
    assert recordable(costs) is costs
    with pytest.raises(ChildError) as failed:
        measured_in_child(tmp_path)
    assert str(failed.value).startswith(f"{tmp_path} is not a bundle: it has no freeexport.json; ")


def test_costs_are_measured_with_a_decoding_session(bundle: Bundles) -> None:
    with ReplaySession(bundle(LLAMA, max_pending=4), threads=1) as session:
        prompts = [np.array([5, 6, 7]), np.array([8])]
        costs = measured_costs(session, prompts, tokens=12, rounds=2, seconds=0.2)
        # Nothing is replayed any more.
        assert session.generate(prompts[0], threshold=1.0, max_new_tokens=4, ignore_eos=True).stats.exits == 0
    assert list(costs.deep) == [1, 2, 4]
    assert costs.full > costs.deep[1] > 0
    assert costs.measured


def test_speedup_at_an_exit_rate_matches_the_expected_passes() -> None:
    """At a rate of exits, of the passes that come of it on average."""
    sizes = sizes_of(200_000, 0.7, seed=3)
    assert TRUE.speedup(0.7, 16) == pytest.approx(TRUE.speedup_of(sizes, 200_000), rel=0.01)
    assert TRUE.speedup(0.0, 1) == TRUE.speedup_of({1: 1}, 1)
    even = TRUE.break_even(16)
    assert even is not None
    assert TRUE.speedup(even, 16) >= 1 > TRUE.speedup(even - 0.001, 16)
    assert replace(TRUE, shallow=9.0).break_even(16) is None


def test_missing_and_implausible_costs_are_not_recorded() -> None:
    assert recordable(TRUE) is TRUE
    for change in ({"measured": False}, {"shallow": 0.0}, {"deep": {2: 1.0}}, {"deep": {1: -1.0}}):
        assert recordable(replace(TRUE, **change)) is None  # type: ignore[arg-type]


def test_measured_bandwidth_is_plausible() -> None:
    assert 1e8 < measure_bandwidth(1, size=1 << 22, passes=1) < 1e13


def test_tokens_exit_as_in_the_trace_only_during_its_replay(bundle: Bundles) -> None:
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


def test_full_stack_forces_a_pass_even_if_all_tokens_exit(bundle: Bundles) -> None:
    with ReplaySession(bundle(LLAMA, max_pending=3), threads=1) as session:
        session.script.trace = [True]
        options: dict[str, Any] = {"mode": "free", "drafts": "exit", "threshold": THRESHOLD}
        result = session.generate(list(PROMPTS[0]), max_new_tokens=7, ignore_eos=True, **options)
    assert result.exited == (False, True, True, False, True, True, False)


def test_drawn_exits_are_reproducible_and_have_the_given_rate() -> None:
    assert drawn(0.8, 0) == drawn(0.8, 0) != drawn(0.8, 1)
    assert sum(drawn(0.8, 0)) / len(drawn(0.8, 0)) == pytest.approx(0.8, abs=0.02)
    assert not any(drawn(0.0, 0))
