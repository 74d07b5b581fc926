"""Costs of engine calls, measured while decoding."""

from __future__ import annotations

import pytest

from runtime.adaptation.call_costs import (
    MEMORY,
    MEMORY_OF_ROWS,
    RECENT,
    REFRESH,
    SPARSELY,
    CallCosts,
    Kind,
)
from runtime.bundle.costs import Costs

BASE = Costs(2.0, 1.0, {1: 10.0, 8: 17.0})


def seen(costs: CallCosts, kind: Kind, rows: int, seconds: float, times: int = 5) -> None:
    for _ in range(times):
        costs.observe(kind, rows, seconds)


def test_unmeasured_costs_are_those_of_the_bundle() -> None:
    costs = CallCosts(BASE)
    assert [costs.seconds(kind, 1) for kind in ("step", "head", "pass")] == [1.0, 2.0, 10.0]  # type: ignore[arg-type]
    assert (costs.seconds("pass", 8), costs.seconds("step", 8)) == (17.0, 1.7)
    assert costs.prices() == pytest.approx((11.0, 1.0, 1.0, 10.0))
    assert costs.further_row() == pytest.approx(0.1)


def test_unmeasured_size_is_scaled_like_the_nearest_measured_size() -> None:
    costs = CallCosts(BASE)
    seen(costs, "pass", 1, 30.0)
    assert costs.seconds("pass", 8) == pytest.approx(51.0)
    assert costs.seconds("step", 1) == pytest.approx(3.0)
    seen(costs, "pass", 4, 26.0, 30)  # nearer to 8: twice the base
    assert costs.seconds("pass", 8) == pytest.approx(34.0, rel=0.02)


def test_other_sizes_follow_a_settled_cost_after_a_few_measurements() -> None:
    costs = CallCosts(BASE)
    seen(costs, "pass", 1, 10.0, 40)
    assert costs.seconds("pass", 8) == pytest.approx(17.0)
    seen(costs, "pass", 1, 20.0, SPARSELY * (RECENT + REFRESH))
    assert costs.seconds("pass", 1) == costs.prices().deep == pytest.approx(20.0)
    assert costs.seconds("pass", 8) == pytest.approx(34.0)


def test_first_call_of_a_size_is_not_counted() -> None:
    costs = CallCosts(BASE)
    costs.observe("pass", 1, 500.0)
    assert costs.seconds("pass", 1) == 10.0
    seen(costs, "pass", 1, 10.0)
    assert costs.seconds("pass", 1) == pytest.approx(10.0)


def test_outlier_has_little_effect_and_a_lasting_change_is_followed() -> None:
    costs = CallCosts(BASE)
    seen(costs, "pass", 1, 10.0, 20)
    costs.observe("pass", 1, 5000.0)
    assert costs.seconds("pass", 1) == pytest.approx(10.0)
    seen(costs, "pass", 1, 30.0, 40)
    assert costs.seconds("pass", 1) == pytest.approx(30.0, rel=0.05)
    # So do the first calls of another size.
    costs.observe("pass", 4, 39.0)
    costs.observe("pass", 4, 4000.0)
    assert costs.seconds("pass", 4) < 60.0


def test_old_measurement_of_a_size_is_forgotten() -> None:
    """It may have been measured while others kept the machine busy."""
    costs = CallCosts(BASE)
    seen(costs, "pass", 1, 10.0)
    seen(costs, "pass", 4, 26.0, 20)
    assert costs.seconds("pass", 4) == pytest.approx(26.0, rel=0.05)
    seen(costs, "pass", 1, 10.0, MEMORY + 1)
    assert costs.seconds("pass", 4) == pytest.approx(13.0)


def test_first_cost_of_a_kind_is_not_limited_by_an_estimate_of_another_kind() -> None:
    """An exit after layer 1 of 30 makes a step cheap and a pass expensive, whatever a bundle records."""
    costs = CallCosts(Costs(1.0, 0.5, {1: 1.0}))
    for _ in range(2):
        costs.observe("step", 1, 0.3)
        costs.observe("pass", 1, 7.0)
    assert costs.prices().token == pytest.approx(7.3)


def test_expensive_measurement_of_an_avoided_size_is_forgotten() -> None:
    """A rule that avoids it would never measure it again."""
    costs = CallCosts(BASE)
    seen(costs, "pass", 1, 10.0)
    seen(costs, "pass", 2, 40.0, 8)
    assert costs.seconds("pass", 2) == pytest.approx(40.0)
    seen(costs, "pass", 1, 10.0, MEMORY_OF_ROWS + 1)
    assert costs.seconds("pass", 2) == pytest.approx(11.0)


def test_slow_first_measurement_of_a_size_is_not_its_cost() -> None:
    costs = CallCosts(BASE)
    seen(costs, "pass", 1, 10.0)
    seen(costs, "pass", 2, 11.0, 1)  # binds
    costs.observe("pass", 2, 50.0)
    assert costs.seconds("pass", 2) == pytest.approx(11.0)
