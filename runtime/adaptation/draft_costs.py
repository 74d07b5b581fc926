"""What drafting costs on this machine: seconds of shallow steps and of deep passes, as measured while decoding."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Generic, TypeVar

# Where a bundle records no costs: a deep row beside the first costs this much of it, the head this much of a step,
# rather too much.
ROW_SHARE, HEAD_SHARE = 0.1, 0.5
# The median of so many measurements counts, so that a hiccup of the machine passes for nothing.
WINDOW = 9
# Measurements after which a cost that was not among them is forgotten: the machine may have changed meanwhile.
MEMORY = 512

K = TypeVar("K", str, int)


class DraftCosts:
    """Seconds of a shallow step ("asked": with the head, or "bare") and of deep passes by rows: measured, else scaled
    from those that a manifest has `recorded` (`shallow_ms`, `shallow_without_head_ms`, `deep_{k}_ms`)."""

    def __init__(self, max_pending: int, recorded: Mapping[str, float]) -> None:
        self._given = max_pending, recorded
        bare = recorded.get("shallow_without_head_ms", 1.0)
        asked = recorded.get("shallow_ms", bare / (1 - HEAD_SHARE))
        self._shallow = _Table({"asked": asked, "bare": bare}, {"asked": 0, "bare": 1})
        deep = _deep_passes(max_pending, recorded, bare)
        self._deep = _Table(deep, {rows: rows for rows in deep})

    def anew(self) -> DraftCosts:
        """The same, before anything was measured."""
        return DraftCosts(*self._given)

    def __getitem__(self, what: str | int) -> float:
        return self._deep[what] if isinstance(what, int) else self._shallow[what]

    @property
    def full(self) -> float:
        return self["bare"] + self[1]

    @property
    def head(self) -> float:
        return max(0.0, self["asked"] - self["bare"])

    def observe(self, asked: int, rows: int, shallow: float, deep: float) -> None:
        """`rows` shallow steps took so long, `asked` of them with the head, and the deep pass over them."""
        self._deep.observe(rows, deep)
        if asked:
            # A step with the head takes as long as one without, at least.
            rest = shallow - (rows - asked) * self["bare"]
            self._shallow.observe("asked", max(rest / asked, shallow / rows))
        else:
            self._shallow.observe("bare", shallow / rows)

    def expected(self, asked: int, rows: int) -> float:
        """Seconds of what `observe` is told of."""
        return asked * self["asked"] + (rows - asked) * self["bare"] + self[rows]


class _Table(Generic[K]):
    """Costs by key. What was not measured lately is `recorded`, scaled as the nearest that was, by `place`."""

    def __init__(self, recorded: Mapping[K, float], place: Mapping[K, int]) -> None:
        self._recorded: Mapping[K, float] = recorded
        self._place: Mapping[K, int] = place
        self._measured: dict[K, _Cost] = {}
        self._samples = 0

    def __getitem__(self, key: K) -> float:
        measured = self._measured.get(key)
        return self._scaled(key) if measured is None or self._stale(measured) else measured.seconds

    def observe(self, key: K, seconds: float) -> None:
        cost = self._measured.get(key)
        if cost is None or self._stale(cost):
            # The first of its kind binds its call, and finds its weights on no page: it must not count alone.
            cost = _Cost(self._scaled(key) if self._samples else seconds)
            self._measured[key] = cost
        self._samples += 1
        cost.add(seconds, self._samples)

    def _stale(self, cost: _Cost) -> bool:
        return self._samples - cost.last > MEMORY

    def _scaled(self, key: K) -> float:
        known = [other for other, cost in self._measured.items() if other != key and not self._stale(cost)]
        if not known:
            return self._recorded[key]
        nearest = min(known, key=lambda other: abs(self._place[other] - self._place[key]))
        return self._recorded[key] * self._measured[nearest].seconds / self._recorded[nearest]


class _Cost:
    """The median of what was measured last; `last` counts measurements of the table."""

    __slots__ = ("_window", "last", "seconds")

    def __init__(self, expected: float) -> None:
        self._window = deque([expected], WINDOW)
        self.seconds, self.last = expected, 0

    def add(self, seconds: float, number: int) -> None:
        self._window.append(seconds)
        self.seconds, self.last = median(self._window), number


def _deep_passes(max_pending: int, recorded: Mapping[str, float], bare: float) -> dict[int, float]:
    """Cost of 1 to `max_pending` rows, between the recorded sizes by interpolation."""
    sizes = [size for size in range(1, max_pending + 1) if f"deep_{size}_ms" in recorded]
    if not sizes:
        return {rows: bare * (1 + ROW_SHARE * (rows - 1)) for rows in range(1, max_pending + 1)}
    table: dict[int, float] = {}
    for rows in range(1, max_pending + 1):
        below = max((size for size in sizes if size <= rows), default=sizes[0])
        above = min((size for size in sizes if size >= rows), default=sizes[-1])
        low, high = recorded[f"deep_{below}_ms"], recorded[f"deep_{above}_ms"]
        table[rows] = low + (high - low) * (rows - below) / max(1, above - below)
    return table
