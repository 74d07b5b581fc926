from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from freeexport.traces.curve import NO_EXIT, Curve

TOKENS = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]), st.booleans()), min_size=1, max_size=12)


def arrays(tokens: list[tuple[float, bool]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([one for one, _ in tokens], np.float32), np.array([agrees for _, agrees in tokens])


@given(TOKENS)
def test_points_are_what_their_threshold_does(tokens: list[tuple[float, bool]]) -> None:
    confidence, agrees = arrays(tokens)
    curve = Curve.of(confidence, agrees)
    assert (np.diff(curve.exit_rate) > 0).all()
    for threshold, rate, agreement in zip(curve.threshold, curve.exit_rate, curve.agreement, strict=True):
        exits = confidence > threshold
        assert exits.mean() == pytest.approx(rate)
        assert agrees[exits].mean() == pytest.approx(agreement)


@given(TOKENS, st.sampled_from([0.5, 0.75, 1.0]))
def test_no_threshold_lets_more_tokens_exit_at_the_agreement(tokens: list[tuple[float, bool]], target: float) -> None:
    confidence, agrees = arrays(tokens)
    rates = [0.0]
    for threshold in (0.0, 0.05, 0.2, 0.4, 0.7, 0.95, 1.0):
        exits = confidence > threshold
        if exits.any() and agrees[exits].mean() >= target:
            rates.append(float(exits.mean()))
    assert Curve.of(confidence, agrees).at_agreement(target).exit_rate == pytest.approx(max(rates))


def test_nothing_exits_where_the_agreement_is_not_reached() -> None:
    assert Curve.of(np.array([0.9, 0.1]), np.array([False, True])).at_agreement(0.9) == NO_EXIT


def test_a_confidence_of_zero_never_exits() -> None:
    assert Curve.of(np.zeros(3), np.ones(3, bool)).at_agreement(0.9) == NO_EXIT
    assert list(Curve.of(np.zeros(3), np.ones(3, bool)).sampled(10)) == []


def test_sampling_keeps_the_last_point() -> None:
    curve = Curve.of(np.linspace(0.1, 0.9, 50), np.ones(50, bool))
    points = list(curve.sampled(7))
    assert len(points) == 7
    assert points[-1].exit_rate == 1
    assert len(list(curve.sampled(1000))) == 50
