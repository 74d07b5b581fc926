from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from traces import mixed, trace

from freeexport.traces.simulate import replay
from freeexport.traces.trace import Traces
from runtime.bundle.costs import Costs, Outside

COSTS = Costs(shallow=2.0, shallow_without_head=1.5, deep={1: 3.0, 2: 3.2, 4: 4.0, 8: 6.0})


def test_runs_of_exits_end_in_passes_and_the_last_stack_is_dropped() -> None:
    one = trace([0.9, 0.9, 0.2, 0.1, 0.9, 0.9], [True, False, True, False, True, True])
    done = replay(Traces.of([one]), 0.5, max_pending=8)
    assert (done.tokens, done.exits, done.agreeing) == (6, 4, 3)
    assert done.sync_sizes == Counter({3: 1, 1: 1})


def test_a_full_stack_forces_a_pass() -> None:
    done = replay(Traces.of([trace([0.9] * 7, [True] * 7)]), 0.5, max_pending=3)
    assert done.sync_sizes == Counter({3: 2})
    assert done.exits == 5
    assert replay(Traces.of([trace([0.9] * 4, [True] * 4)]), 0.5, max_pending=1).exits == 0


def test_a_token_exits_above_the_threshold_and_not_at_it() -> None:
    confidence = float(np.float32(0.3))
    traces = Traces.of([trace([confidence], [True])])
    assert replay(traces, confidence, 4).exits == 0
    assert replay(traces, float(np.nextafter(confidence, 0)), 4).exits == 1


def test_the_speedup_is_that_of_the_calls_written_out() -> None:
    one = trace([0.9, 0.9, 0.2, 0.1, 0.9, 0.9], [True] * 6)
    done = replay(Traces.of([one]), 0.5, max_pending=8)
    full = 6 * (1.5 + 3.0)
    free = 6 * 2.0 + (3.2 + 4.0) / 2 + 3.0
    assert done.speedup(COSTS) == pytest.approx(full / free)
    costs = replace(COSTS, outside=Outside(full=0.5, free=0.7, sync=0.2))
    assert done.speedup(costs) == pytest.approx((full + 6 * 0.5) / (free + 6 * 0.7 + 2 * 0.2))


def test_independent_exits_cost_what_the_model_of_the_method_says() -> None:
    traces = mixed(400, 100, seed=4)
    done = replay(traces, 0.8, max_pending=8)
    sure = float(np.mean(traces.confidence > 0.8))
    for costs in (COSTS, replace(COSTS, outside=Outside(0.5, 0.7, 0.2))):
        assert done.speedup(costs) == pytest.approx(costs.speedup(sure, 8), rel=0.02)


def test_nothing_exits_at_1_and_no_agreement_is_claimed() -> None:
    done = replay(mixed(5, 20), 1.0, 8)
    assert (done.exits, done.agreement) == (0, None)
    assert done.sync_sizes == Counter({1: 100})


@given(
    st.lists(st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), max_size=30), max_size=5),
    st.floats(0, 1),
    st.integers(1, 6),
)
def test_every_token_exits_or_ends_a_pass(
    sequences: list[list[tuple[float, bool]]], threshold: float, max_pending: int
) -> None:
    traces = Traces.of([trace([c for c, _ in one], [a for _, a in one]) for one in sequences])
    done = replay(traces, threshold, max_pending)
    assert done.exits + done.sync_sizes.total() == done.tokens == traces.tokens
    assert all(1 <= rows <= max_pending for rows in done.sync_sizes)
    assert sum(rows * count for rows, count in done.sync_sizes.items()) <= done.tokens
    assert done.agreeing <= done.exits
