"""Costs of engine calls, measured while decoding."""

from __future__ import annotations

import pytest

from runtime.adaptation.call_costs import MEMORY, WINDOW, CallCosts
from runtime.bundle.costs import Costs


def test_one_slow_call_has_no_effect() -> None:
    costs = CallCosts()
    for _ in range(3):
        costs.observe(0, 1, 1.0, 10.0)
    costs.observe(1, 1, 30.0, 10.0)  # the first of its kind
    assert costs.step(True) < 20.0
    for _ in range(2):
        costs.observe(1, 1, 1.5, 10.0)
    costs.observe(0, 1, 50.0, 500.0)
    assert (costs.step(True), costs.step(False), costs.deep_pass(1)) == (pytest.approx(2.0, abs=0.5), 1.0, 10.0)


def test_no_cost_is_ever_nothing() -> None:
    """A step that was measured too long must not make the head look free: that would never be noticed."""
    costs = CallCosts()
    costs.observe(0, 1, 100.0, 10.0)
    for _ in range(WINDOW):
        costs.observe(2, 3, 5.0, 12.0)
        assert costs.step(True) > 0
    for _ in range(WINDOW):
        costs.observe(0, 1, 1.0, 10.0)
        costs.observe(2, 3, 5.0, 12.0)
    assert (costs.step(False), costs.step(True)) == (1.0, pytest.approx(2.0, rel=0.1))


def test_a_cost_not_seen_for_long_is_forgotten() -> None:
    """It may have been measured while others kept the machine busy."""
    costs = CallCosts(Costs(2.0, 1.0, {1: 10.0, 8: 17.0}))
    for _ in range(20):
        costs.observe(0, 1, 1.0, 10.0)
    for _ in range(2):
        costs.observe(4, 4, 5.0, 100.0)
    assert costs.deep_pass(4) == 100.0
    for _ in range(MEMORY + 1):
        costs.observe(0, 1, 1.0, 10.0)
    assert costs.deep_pass(4) == pytest.approx(13.0)
