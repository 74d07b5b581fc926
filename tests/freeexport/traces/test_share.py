from __future__ import annotations

import numpy as np
import pytest

from freeexport.traces.share import share


def test_independent_tokens_have_wilsons_interval() -> None:
    found = share([30], [229])
    assert found is not None
    assert (found.value, found.count) == (pytest.approx(30 / 229), 229)
    # Brown, Cai and DasGupta's formula (2001), by hand.
    assert (found.low, found.high) == (pytest.approx(0.0934, abs=1e-4), pytest.approx(0.1809, abs=1e-4))
    assert str(found) == "13.1% (95% interval 9.3% to 18.1%)"


@pytest.mark.parametrize(("hits", "low", "high"), [(0, 0.0, 0.0370), (100, 0.9630, 1.0)])
def test_a_share_of_nothing_or_all_still_says_how_little_is_known(hits: int, low: float, high: float) -> None:
    found = share([hits], [100])
    assert found is not None
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_sequences_that_are_easy_or_hard_as_a_whole_are_worth_fewer_tokens() -> None:
    clustered, mixed = share([20, 0] * 10, [20] * 20), share([10] * 20, [20] * 20)
    assert clustered is not None
    assert mixed is not None
    assert clustered.value == mixed.value == 0.5
    # Twenty tokens that are all alike are one: twenty sequences, not four hundred tokens.
    assert (clustered.low, clustered.high) == (pytest.approx(0.29, abs=0.01), pytest.approx(0.71, abs=0.01))
    assert (mixed.low, mixed.high) == (pytest.approx(0.451, abs=0.001), pytest.approx(0.549, abs=0.001))


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        sizes = random.integers(5, 40, 60)
        easy = random.beta(6, 4, 60)  # 0.6 on average
        found = share(random.binomial(sizes, easy), sizes)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0.6 <= found.high
    assert 0.92 < held / 400 < 0.98


def test_no_tokens_have_no_share() -> None:
    assert share([], []) is None
    assert share([0, 0], [0, 0]) is None
