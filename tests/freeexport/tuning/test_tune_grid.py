from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from traces import mixed, trace

from freeexport.traces.trace import Traces
from freeexport.tuning.grid import THRESHOLDS, Point, apart, first_passing, front, grid
from runtime.bundle.costs import Costs

COSTS = Costs(shallow=2.0, shallow_without_head=1.5, deep={1: 3.0, 2: 3.2, 4: 4.0, 8: 6.0, 16: 9.0})
POINT = Point(0, 0.5, 8, exit_rate=0.5, agreement=0.9, predicted=1.5)


def test_the_grid_holds_every_threshold_with_every_length_of_passes() -> None:
    points = grid(3, mixed(20, 30), COSTS, max_pending=12)
    assert {point.max_pending for point in points} == {2, 4, 8, 12}
    assert {point.threshold for point in points} == set(THRESHOLDS)
    assert {point.bundle for point in points} == {3}


def test_agreement_is_of_all_tokens_whether_they_exit_or_not() -> None:
    one = trace([0.9, 0.9, 0.2, 0.1], [True, False, False, True])
    (point,) = (p for p in grid(0, Traces.of([one]), COSTS, 2) if p.threshold == 0.5)
    # The second token finds the stack full: the deep decoder answers.
    assert (point.exit_rate, point.agreement) == (0.25, 1.0)
    (point,) = (p for p in grid(0, Traces.of([one]), COSTS, 4) if (p.threshold, p.max_pending) == (0.5, 4))
    assert (point.exit_rate, point.agreement) == (0.5, 0.75)


def test_a_front_holds_what_nothing_beats_and_nothing_slower_than_the_full_model() -> None:
    points = [
        replace(POINT, predicted=2.0, agreement=0.8),
        replace(POINT, predicted=1.9, agreement=0.7),  # slower and worse than the first
        replace(POINT, predicted=1.5, agreement=0.95),
        replace(POINT, predicted=0.9, agreement=1.0),
    ]
    assert front(points[::-1]) == [points[0], points[2]]
    assert front([points[3]]) == []


@given(st.lists(st.tuples(st.floats(0.5, 3), st.floats(0, 1)), max_size=40))
def test_along_a_front_what_is_slower_agrees_no_less(values: list[tuple[float, float]]) -> None:
    points = [replace(POINT, predicted=speed, agreement=agreement) for speed, agreement in values]
    found = front(points)
    assert all(one.predicted >= two.predicted for one, two in pairwise(found))
    assert all(one.agreement <= two.agreement for one, two in pairwise(found))
    fast = [point for point in points if point.predicted > 1]
    for point in fast:
        assert any(one.predicted >= point.predicted and one.agreement >= point.agreement for one in found)


@given(st.integers(0, 60), st.integers(0, 60))
def test_the_first_that_passes_is_found_in_few_looks(count: int, place: int) -> None:
    points = [replace(POINT, threshold=number / 100) for number in range(count)]
    looks: list[Point] = []

    def passes(point: Point) -> bool:
        looks.append(point)
        return points.index(point) >= place

    assert first_passing(points, passes) == (place if place < count else None)
    assert len(looks) <= 6


def test_candidates_are_clearly_apart() -> None:
    points = [replace(POINT, predicted=speed) for speed in (2.0, 1.99, 1.9, 1.89, 1.8, 1.5)]
    assert [point.predicted for point in apart(points, 3)] == [2.0, 1.9, 1.8]
    assert apart([], 3) == []


@pytest.mark.parametrize("heavy", [5.0])
def test_where_a_shallow_step_costs_too_much_nothing_is_on_the_front(heavy: float) -> None:
    assert front(grid(0, mixed(20, 30), replace(COSTS, shallow=heavy), 8)) == []
