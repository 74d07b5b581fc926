"""What engine calls take on this machine: seconds of shallow calls and deep passes, measured while decoding."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import cache
from statistics import median

from runtime.bundle.costs import NEUTRAL, Costs

# The median of so many calls counts, so that one slow call has no effect.
WINDOW = 9
# Calls after which a cost that was not among them is forgotten: the machine may have changed meanwhile.
MEMORY = 512
WITH_HEAD = 0


class CallCosts:
    """Seconds of a shallow step with the head, of shallow calls without it and of deep passes by rows: measured, else
    `base`, scaled as the nearest that was measured. `base` has shallow calls over several rows grow as deep ones do."""

    def __init__(self, base: Costs = NEUTRAL) -> None:
        self.base = base
        # By rows; WITH_HEAD is a step of one row with the head.
        self._steps = _Kinds(lambda rows: base.shallow if rows == WITH_HEAD else _shallow_rows(base, rows))
        self._passes = _Kinds(base.deep_pass)
        self.most_rows = 1  # of shallow calls that were measured

    def step(self, head: bool) -> float:
        return self._steps[WITH_HEAD if head else 1]

    def shallow_rows(self, rows: int) -> float:
        """A shallow call without the head."""
        return self._steps[rows]

    def deep_pass(self, rows: int) -> float:
        return self._passes[rows]

    @property
    def full(self) -> float:
        """A token of mode full."""
        return self.step(False) + self.deep_pass(1)

    @property
    def head(self) -> float:
        return max(0.0, self.step(True) - self.step(False))

    def observe(self, with_head: int, rows: int, shallow: float, deep: float) -> None:
        """`rows` shallow steps took so long, `with_head` of them with the head, and the deep pass over them."""
        self._passes.observe(rows, deep)
        if with_head:
            # A step with the head takes as long as one without, at least.
            rest = shallow - (rows - with_head) * self.step(False)
            self._steps.observe(WITH_HEAD, max(rest / with_head, shallow / rows))
        else:
            self._steps.observe(1, shallow / rows)

    def observe_together(self, with_head: int, rows: int, together: int, shallow: float, deep: float) -> None:
        """The same where the first `together` rows were one shallow call."""
        self._passes.observe(rows, deep)
        if not with_head and rows == together:
            self._steps.observe(together, shallow)
            self.most_rows = max(self.most_rows, together)

    def expected(self, with_head: int, rows: int, together: int = 1) -> float:
        """Seconds of what `observe` and `observe_together` are told of."""
        single = rows - together
        return self.shallow_rows(together) + single * self.step(False) + with_head * self.head + self.deep_pass(rows)


def _shallow_rows(base: Costs, rows: int) -> float:
    return base.shallow_without_head * base.deep_pass(rows) / base.deep_pass(1)


class _Kinds:
    """Costs of calls by kind, a number: near ones cost alike. `base` is what they cost elsewhere."""

    def __init__(self, base: Callable[[int], float]) -> None:
        self._base = cache(base)
        self._seen: dict[int, _Calls] = {}
        self._count = 0

    def __getitem__(self, kind: int) -> float:
        calls = self._seen.get(kind)
        return self._scaled(kind) if calls is None or self._stale(calls) else calls.seconds

    def observe(self, kind: int, seconds: float) -> None:
        calls = self._seen.get(kind)
        if calls is None or self._stale(calls):
            # The first of its kind binds its call, and finds its weights on no page: it must not count alone.
            calls = self._seen[kind] = _Calls(self._scaled(kind) if self._count else seconds)
        self._count += 1
        calls.add(seconds, self._count)

    def _stale(self, calls: _Calls) -> bool:
        return self._count - calls.last > MEMORY

    def _scaled(self, kind: int) -> float:
        known = [other for other, calls in self._seen.items() if other != kind and not self._stale(calls)]
        if not known:
            return self._base(kind)
        nearest = min(known, key=lambda other: abs(other - kind))
        return self._base(kind) * self._seen[nearest].seconds / self._base(nearest)


class _Calls:
    """The median of the last calls of a kind; `last` counts calls of all kinds."""

    __slots__ = ("_window", "last", "seconds")

    def __init__(self, expected: float) -> None:
        self._window = deque([expected], WINDOW)
        self.seconds, self.last = expected, 0

    def add(self, seconds: float, number: int) -> None:
        self._window.append(seconds)
        self.seconds, self.last = median(self._window), number
