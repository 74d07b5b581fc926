"""Ranks and losses of exit vocabularies on made traces, against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from traces import trace

from freeexport.traces.simulate import replay
from freeexport.traces.trace import Traces
from freeexport.tuning.vocabulary_gains import exit_gains
from runtime.bundle.costs import Costs
from runtime.errors import CalibrationError

COSTS = Costs(shallow=3.0, shallow_without_head=1.0, deep={1: 2.0, 16: 2.0})
VOCABULARY = 512


def traces(*sequences: list[tuple[int, float]]) -> Traces:
    """Sequences of tokens and confidences, all of which agree."""
    return Traces.of(
        [
            trace([sure for _, sure in one], [True] * len(one), line, [token for token, _ in one])
            for line, one in enumerate(sequences, start=1)
        ]
    )


def test_ends_come_first_then_exits_then_predictions_then_text_then_low_ids() -> None:
    said = traces([(9, 0.9), (9, 0.9), (7, 0.1), (7, 0.1), (7, 0.1)], [(5, 0.9), (8, 0.1), (9, 0.9)])
    found = exit_gains(said, 0.5, COSTS, 16, VOCABULARY, [2, 3], [[300, 300, 11], [11, 300]])
    assert found.ranked[:9].tolist() == [2, 3, 9, 5, 7, 8, 300, 11, 0]
    assert sorted(found.ranked.tolist()) == list(range(VOCABULARY))


def test_losses_are_those_of_sequences_that_were_not_ranked() -> None:
    # Of the first sequence the second knows token 400 only, and the other way round.
    said = traces([(400, 0.9), (401, 0.9), (402, 0.9), (403, 0.1)], [(400, 0.9)] * 3 + [(410, 0.9)])
    gain = exit_gains(said, 0.5, COSTS, 16, VOCABULARY, [2]).at(64)
    assert gain.lost == pytest.approx(3 / 7)
    assert gain.covers == pytest.approx(4 / 8)
    # What is known runs on: 1 exit, then a pass over 2 rows ends the first run, and so on.
    assert gain.replayed.exits == 4
    assert gain.replayed.tokens == 8


def test_a_head_costs_in_proportion_to_its_tokens() -> None:
    said = traces(*[[(token, 0.9) for token in range(10)]] * 4)
    found = exit_gains(said, 0.5, COSTS, 16, VOCABULARY, [2])
    assert [gain.size for gain in found.gains] == [64, 128, 256, 512]
    assert [gain.costs.shallow for gain in found.gains] == [1.25, 1.5, 2.0, 3.0]
    assert found.best.size == 64
    assert found.best.lost == 0
    assert found.best.speedup > found.whole.speedup


def test_the_whole_vocabulary_is_best_where_rare_tokens_exit() -> None:
    said = traces(*[[(100 * line + token, 0.9) for token in range(20)] for line in range(1, 5)])
    little = Costs(shallow=1.1, shallow_without_head=1.0, deep=COSTS.deep)
    found = exit_gains(said, 0.5, little, 16, VOCABULARY, [2])
    assert found.best is found.whole
    assert found.whole.lost == 0
    assert found.at(64).lost == 1


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 63), st.floats(0, 1, width=32)), min_size=1, max_size=12),
        min_size=2,
        max_size=6,
    ),
    st.integers(2, 64),
)
def test_a_larger_vocabulary_loses_no_more_and_all_of_it_nothing(
    sequences: list[list[tuple[int, float]]], size: int
) -> None:
    said = traces(*sequences)
    if not replay(said, 0.5, 4).exits:
        return
    found = exit_gains(said, 0.5, COSTS, 4, 64, [2], sizes=[size])
    lost = [gain.lost for gain in found.gains]
    assert lost == sorted(lost, reverse=True)
    assert found.whole.lost == 0
    whole = replay(said, 0.5, 4)
    assert found.whole.replayed == whole
    assert all(np.isfinite(gain.speedup) for gain in found.gains)


def test_a_threshold_that_nothing_passes_and_a_single_sequence_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"nothing exits at threshold 0.95"):
        exit_gains(traces([(1, 0.9)], [(1, 0.9)]), 0.95, COSTS, 16, VOCABULARY, [2])
    with pytest.raises(CalibrationError, match="1 sequence cannot be both"):
        exit_gains(traces([(1, 0.9)]), 0.5, COSTS, 16, VOCABULARY, [2])
