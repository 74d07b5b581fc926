"""What choices of bundle, threshold and max_pending promise, by traces and costs; and which of them need a look."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from freeexport.traces.simulate import replay
from freeexport.traces.trace import Traces
from runtime.bundle.costs import Costs

THRESHOLDS = (0.999, 0.998, 0.995, 0.99, 0.98, 0.97, 0.95, 0.925, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45,
              0.4, 0.3, 0.2, 0.1, 0.0)  # fmt: skip
PENDING = (2, 4, 8, 16, 32)
# A candidate beside another must be so much slower, or it tells nothing new.
APART = 0.98


@dataclass(frozen=True)
class Point:
    """`bundle`: its number. Of the tokens after the first, `exit_rate` exit, and of all, `agreement` are the deep
    predictions. `predicted`: speed as a multiple of mode full's."""

    bundle: int
    threshold: float
    max_pending: int
    exit_rate: float
    agreement: float
    predicted: float


def grid(bundle: int, traces: Traces, costs: Costs, max_pending: int) -> list[Point]:
    """Every threshold with every `max_pending` up to the bundle's."""
    rows = [size for size in PENDING if size < max_pending] + [max_pending]
    return [_point(bundle, traces, costs, threshold, most) for most in rows for threshold in THRESHOLDS]


def front(points: Sequence[Point]) -> list[Point]:
    """Those faster than mode full for which no other is faster and agrees more often: the fastest first, which agree
    least. Where none disagrees any more, slower ones are safer still, on texts that are not in the traces."""
    best: list[Point] = []
    for point in sorted(points, key=lambda one: (-one.predicted, -one.agreement)):
        if point.predicted > 1 and (not best or point.agreement >= best[-1].agreement):
            best.append(point)
    return best


def first_passing(points: Sequence[Point], passes: Callable[[Point], bool]) -> int | None:
    """By halving, the number of the first of a `front` that passes, as far as those after one that passes do too; None
    where not even the last does."""
    low, high = 0, len(points)
    while low < high:
        middle = (low + high) // 2
        if passes(points[middle]):
            high = middle
        else:
            low = middle + 1
    return low if low < len(points) else None


def apart(points: Sequence[Point], most: int) -> list[Point]:
    """The first, and up to `most` in all, each clearly slower than the one before."""
    chosen: list[Point] = []
    for point in points:
        if len(chosen) < most and (not chosen or point.predicted <= APART * chosen[-1].predicted):
            chosen.append(point)
    return chosen


def _point(bundle: int, traces: Traces, costs: Costs, threshold: float, max_pending: int) -> Point:
    done = replay(traces, threshold, max_pending)
    wrong = (done.exits - done.agreeing) / max(1, done.tokens)
    return Point(bundle, threshold, max_pending, done.exit_rate, 1 - wrong, done.speedup(costs))
