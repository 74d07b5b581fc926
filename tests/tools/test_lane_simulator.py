from __future__ import annotations

import time
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from runtime import decode
from runtime.continuation import Continuation
from runtime.decoder import Decoder
from runtime.kv_cache import KVCache
from runtime.lane import Lane
from runtime.work import alone
from tools.lane_simulator import Costs, Setting, TokenTrace, main, milliseconds, random_trace, simulate, timeline

COSTS = Costs(2.0, {1: 10.0, 4: 13.0})
E, R, W = TokenTrace(True, True), TokenTrace(False, True), TokenTrace(False, False)


def spans(jobs: Any) -> list[tuple[str, int, float, float]]:
    return [(job.lane, job.rows, job.began, job.ended) for job in jobs]


def test_without_overlap_calls_follow_each_other() -> None:
    assert spans(simulate([[R, E, W]], COSTS, Setting(overlap=False))) == [
        ("shallow", 1, 0, 2),
        ("deep", 1, 2, 12),
        ("shallow", 1, 12, 14),
        ("shallow", 1, 14, 16),
        ("deep", 2, 16, 27),
    ]


def test_a_right_guess_saves_the_steps_run_ahead_and_a_wrong_one_does_not() -> None:
    right = simulate([[R, E, W]], COSTS, Setting(sync_every=0))
    assert spans(right) == [
        ("shallow", 1, 0, 2),
        ("shallow", 1, 2, 4),
        ("shallow", 1, 4, 6),
        ("deep", 1, 2, 12),
        ("deep", 2, 12, 23),
    ]
    assert milliseconds(simulate([[W, E, W]], COSTS, Setting(sync_every=0))) == 27


def test_a_pass_in_the_background_takes_rows_from_the_pass_that_answers() -> None:
    jobs = simulate([[E, E, E, W]], COSTS, Setting(sync_every=2))
    assert spans(jobs) == [
        ("shallow", 1, 0, 2),
        ("shallow", 1, 2, 4),
        ("shallow", 1, 4, 6),
        ("shallow", 1, 6, 8),
        ("deep", 2, 4, 15),
        ("deep", 2, 15, 26),
    ]


def test_a_sequence_that_waits_lets_another_step() -> None:
    alone = milliseconds(simulate([[W] * 10], COSTS, Setting()))
    # Passes are what the lane is busy with: a second sequence doubles them, its steps hide behind the first's passes.
    assert milliseconds(simulate([[W] * 10] * 2, COSTS, Setting())) == pytest.approx(2 + 20 * 10, abs=3)
    assert milliseconds(simulate([[W] * 10] * 2, COSTS, Setting(overlap=False))) == 2 * alone == 240


def test_calls_at_the_same_time_are_slowed_down() -> None:
    setting = Setting(sync_every=0, slowdown={"shallow": 2.0, "deep": 1.5})
    jobs = simulate([[R, W]], COSTS, setting)
    # The step takes twice as long beside the pass, whose first 4 ms are worth 4 / 1.5.
    assert spans(jobs)[1] == ("shallow", 1, 2, 6)
    assert jobs[2].ended == pytest.approx(6 + 10 - 4 / 1.5)


traces = st.lists(st.sampled_from([E, R, W]), min_size=1, max_size=40)


@given(traces=st.lists(traces, min_size=1, max_size=3), max_pending=st.integers(1, 8), sync_every=st.integers(0, 5))
def test_every_row_is_passed_once_and_lanes_run_one_call_at_a_time(
    traces: list[list[TokenTrace]], max_pending: int, sync_every: int
) -> None:
    for overlap in (False, True):
        jobs = simulate(traces, COSTS, Setting(overlap, max_pending, sync_every))
        for number, trace in enumerate(traces):
            mine = [job for job in jobs if job.sequence == number]
            left = 0
            for token in trace:
                left = 0 if not token.exits or left == max_pending - 1 else left + 1
            passed = sum(job.rows for job in mine if job.lane == "deep")
            assert len(trace) - left <= passed <= len(trace)
            assert sum(job.lane == "shallow" for job in mine) >= len(trace)
        for lane in ("shallow", "deep") if overlap else (None,):
            order = sorted((job.began, job.ended) for job in jobs if lane in (None, job.lane))
            assert all(before[1] <= after[0] + 1e-6 for before, after in pairwise(order))


def test_the_predicted_gain_is_printed_with_a_timeline() -> None:
    result = CliRunner().invoke(main, ["--shallow", "2", "--deep", "1=10,4=13", "--tokens", "200", "--timeline"])
    assert result.exit_code == 0
    assert "overlap gains 1." in result.output
    assert CliRunner().invoke(main, ["--shallow", "2", "--deep", "1:10"]).exit_code == 2
    assert timeline(simulate([[R, W]], COSTS, Setting()), 12).splitlines()[0].startswith("shallow aa")


SLOWER = 5  # what a sleep takes too long is then little


class Sleeping:
    """An engine whose calls take the given time and answer from a trace."""

    def __init__(self, shallow: bool, trace: list[TokenTrace]) -> None:
        self.shallow, self.trace = shallow, trace

    def bind(self, inputs: Any, outputs: Any) -> Any:
        engine = self

        class Sleep:
            def run(self) -> None:
                rows = int(inputs["query_lengths"][0])
                time.sleep(SLOWER * 1e-3 * (COSTS.shallow if engine.shallow else COSTS.deep_pass(rows)))
                position = int(inputs["past_lengths"][0]) + rows - 1
                token = engine.trace[min(position - 1, len(engine.trace) - 1)]
                outputs["token"][:] = position * 2 + (not engine.shallow and not token.right)
                if "confidence" in outputs:
                    outputs["confidence"][:] = float(token.exits)

        return Sleep()


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [False, True])
def test_lanes_of_known_cost_take_what_the_simulation_says(overlap: bool) -> None:
    """Within 10 %, on a machine with a core to spare."""
    trace = random_trace(60, exits=0.7, right=0.6)
    lanes = []
    for shallow in (True, False):
        cache = KVCache(range(1), 1, 1, 400, 1, np.float32)
        lanes.append(Lane(Sleeping(shallow, trace), cache, beside=overlap and not shallow))  # type: ignore[arg-type]
    decoder, prompt = Decoder(lanes[0], lanes[1], 0, 4, 1, 16), np.array([1])
    loop = alone(decode.free(decoder, decoder.prefill(prompt, True), Continuation(prompt, 300), 0.5, 16, 4))
    next(loop)
    began = time.perf_counter()
    list(islice(loop, len(trace)))
    taken = 1e3 / SLOWER * (time.perf_counter() - began)
    assert taken == pytest.approx(milliseconds(simulate([trace], COSTS, Setting(overlap))), rel=0.1)
