"""Intervals of shares of tokens. Those of speeds are tested in evaluate/test_scores.py."""

from __future__ import annotations

import numpy as np
import pytest

from freeexport.costs.intervals import share


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    # Brown, Cai and DasGupta's formula (2001), by hand.
    [(30, 229, 0.0934, 0.1809), (0, 100, 0.0, 0.0370), (100, 100, 0.9630, 1.0)],
)
def test_independent_tokens_have_the_wilson_interval(hits: int, count: int, low: float, high: float) -> None:
    found = share([hits], [count])
    assert found is not None
    assert share([0, 0], [0, 0]) is None
    assert (found.value, found.count) == (pytest.approx(hits / count), count)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_correlated_tokens_of_a_sequence_widen_the_interval() -> None:
    clustered, mixed = share([20, 0] * 10, [20] * 20), share([10] * 20, [20] * 20)
    assert clustered is not None
    assert mixed is not None
    assert clustered.value == mixed.value == 0.5
    # Twenty tokens that are all alike are one: twenty sequences, not four hundred tokens.
    assert (clustered.low, clustered.high) == (pytest.approx(0.29, abs=0.01), pytest.approx(0.71, abs=0.01))
    assert (mixed.low, mixed.high) == (pytest.approx(0.451, abs=0.001), pytest.approx(0.549, abs=0.001))


def test_interval_covers_the_truth_at_its_nominal_rate() -> None:
    random = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        sizes = random.integers(5, 40, 60)
        easy = random.beta(6, 4, 60)  # 0.6 on average
        found = share(random.binomial(sizes, easy), sizes)
        assert found is not None
        held += (found.low or 0) <= 0.6 <= (found.high or 0)
    assert 0.92 < held / 400 < 0.98
