"""Estimates the costs of engine calls on this machine, measured while requests are decoded."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Literal, NamedTuple

from runtime.bundle.costs import NEUTRAL, Costs

# "step": a shallow call without its head. "head": one with the head, with one row per sequence.
# "pass": a deep call.
Kind = Literal["step", "head", "pass"]
RECENT = 8  # calls in a median
SPARSELY = 4  # then only one call in four is measured, because measuring takes time in Python
REFRESH = 8  # measurements between updates of the estimates of other sizes
PRIOR = 2  # calls that an estimate before the first one counts as
# Calls after which an old measurement is dropped: of one row, and of more rows. The machine may
# have been busy then, and drafts of a size that seemed expensive are not made again.
MEMORY = 512
MEMORY_OF_ROWS = 64


class Prices(NamedTuple):
    """Estimated seconds of one sequence's share of calls with one row per sequence.

    Attributes:
        token: A token in mode full.
        step: A shallow step without the head.
        head: The head in that step.
        deep: A deep pass.
    """

    token: float
    step: float
    head: float
    deep: float


class CallCosts:
    """Seconds per call, by kind and number of rows (of all sequences in the call).

    Measured costs are medians of recent calls. Others are `base` costs, scaled like the nearest
    measured ones. The first call of each kind and size is ignored, because it binds its buffers.
    """

    def __init__(self, base: Costs = NEUTRAL) -> None:
        self.base = base
        self._based: dict[tuple[Kind, int], float] = {}  # costs by `base`, so far
        self.forget()

    def forget(self) -> None:
        """Drop all measurements."""
        self._seen: dict[Kind, dict[int, _Recent]] = {"step": {}, "head": {}, "pass": {}}
        self._count = 0
        self._measured = 0
        # Estimates so far: the rule of drafts reads them before every token.
        self._prices: dict[int, Prices] = {}  # by sequences
        self._seconds: dict[tuple[Kind, int], float] = {}

    def observe(self, kind: Kind, rows: int, seconds: float) -> None:
        """Add a measurement, or one in SPARSELY if there are RECENT of this size."""
        self._count += 1
        seen = self._seen[kind].get(rows)
        if seen is not None and seen.passes_over(self._count):
            return
        self._measured += 1
        if seen is None:
            self._seen[kind][rows] = _Recent(MEMORY if rows == 1 else MEMORY_OF_ROWS)
            return
        settled = seen.settled(self._count)
        # Other kinds say little about this one: an exit's layers may be few or many.
        expected = None if seen.known(self._count) else self._scaled(kind, rows, (kind,))
        seen.add(seconds, expected, self._count)
        if settled and self._measured % REFRESH:
            self._seconds[kind, rows] = seen.seconds
            self._prices.pop(rows, None)
        else:
            self._seconds.clear()
            self._prices.clear()

    def seconds(self, kind: Kind, rows: int) -> float:
        """Return the cost of a call, in seconds."""
        found = self._seconds.get((kind, rows))
        if found is None:
            found = self._seconds[kind, rows] = self._estimate(kind, rows)
        return found

    def _estimate(self, kind: Kind, rows: int) -> float:
        seen = self._seen[kind].get(rows)
        if seen is not None and seen.known(self._count):
            return seen.seconds
        kinds = tuple(self._seen)
        return (
            self._scaled(kind, rows, (kind,))
            or self._scaled(kind, rows, kinds)
            or self._base(kind, rows)
        )

    def measured(self, kind: Kind, rows: int) -> bool:
        """Return True if the cost of such a call was measured recently."""
        seen = self._seen[kind].get(rows)
        return seen is not None and seen.known(self._count)

    def prices(self, sequences: int = 1) -> Prices:
        """Return the costs of calls that `sequences` sequences share."""
        prices = self._prices.get(sequences)
        if prices is None:
            step = self.seconds("step", sequences)
            deep = self.seconds("pass", sequences)
            prices = self._prices[sequences] = Prices(
                token=step + deep,
                step=step,
                head=max(0.0, self.seconds("head", sequences) - step),
                deep=deep,
            )
        return prices

    def further_row(self) -> float:
        """Return the cost of a further row of a deep pass, relative to the first.

        Computed from the fewest and the most rows measured, or from `base` if these are close.
        """
        known = {
            rows: seen.seconds
            for rows, seen in self._seen["pass"].items()
            if seen.known(self._count)
        }
        few = min(known, default=1)
        many = max(known, default=1)
        if many < 1.5 * few:
            few = 1
            many = 8
            base = self.base if len(self.base.deep) > 1 else NEUTRAL
            known = {rows: base.deep_pass(rows) for rows in (few, many)}
        row = max(0.0, known[many] - known[few]) / (many - few)
        first = known[few] - (few - 1) * row
        return min(1.0, row / first) if first > 0 else 1.0

    def _base(self, kind: Kind, rows: int) -> float:
        """Return the cost by `base`. Shallow calls are assumed to grow with their rows like deep
        ones.
        """
        found = self._based.get((kind, rows))
        if found is None:
            base = self.base
            found = base.deep_pass(rows)
            if kind != "pass":
                shallow = base.shallow if kind == "head" else base.shallow_without_head
                found = shallow * found / base.deep[1]
            self._based[kind, rows] = found
        return found

    def _scaled(self, kind: Kind, rows: int, kinds: Sequence[Kind]) -> float | None:
        """Return the cost by `base`, scaled like the nearest measured size of `kinds`.

        None without measurements.
        """
        known = [
            (abs(math.log(other / rows)), seen.seconds / self._base(each, other))
            for each in kinds
            for other, seen in self._seen[each].items()
            if seen.known(self._count)
        ]
        return self._base(kind, rows) * min(known)[1] if known else None


class _Recent:
    """Median of recent measurements. A mean would follow a single slow call.

    Args:
        memory: Number of calls after which the last measurement is dropped.

    Attributes:
        seconds: The median.
        last: Number of calls of all kinds at the last measurement.
    """

    __slots__ = ("_memory", "_passed_over", "_values", "last", "seconds")

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._passed_over = 0
        self.seconds = 0.0
        self.last = 0
        self._values: deque[float] = deque(maxlen=RECENT)

    def known(self, now: int) -> bool:
        return bool(self._values) and now - self.last <= self._memory

    def settled(self, now: int) -> bool:
        """Return True if there are RECENT measurements."""
        return len(self._values) == RECENT and self.known(now)

    def passes_over(self, now: int) -> bool:
        """Return True if a call need not be measured, because RECENT ones were."""
        if not self.settled(now):
            return False
        self._passed_over = (self._passed_over + 1) % SPARSELY
        if self._passed_over:
            self.last = now
        return self._passed_over > 0

    def add(self, seconds: float, expected: float | None, now: int) -> None:
        """Add a measurement. `expected` is the estimate before, if there was no recent one."""
        if not self.known(now):
            self._values.clear()
            if expected is not None:
                self._values.extend([expected] * PRIOR)
        self._values.append(seconds)
        self.last = now
        ordered = sorted(self._values)
        middle = len(ordered) // 2
        self.seconds = (ordered[middle] + ordered[~middle]) / 2  # the median
