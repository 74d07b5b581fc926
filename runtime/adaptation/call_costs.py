"""The estimator of what engine calls take on this machine, measured while requests are decoded."""

from __future__ import annotations

import math
from typing import Literal

from runtime.bundle.costs import NEUTRAL, Costs

# "step": a shallow call without its head. "head": one with it, a row for each sequence. "pass": a deep call.
Kind = Literal["step", "head", "pass"]
# Calls that an average goes back, and how far one slow call may stray from it.
RECENT, STRAY = 8, 2.0
# Calls after which a cost that was not among them is forgotten: the machine may have been busy then.
MEMORY = 512


class CallCosts:
    """Seconds of calls by kind and rows, those of all sequences in a call together: an exponential average where they
    were measured, else `base` scaled like the nearest that was. The first call of each kind and size is left out: it
    binds its buffers."""

    def __init__(self, base: Costs = NEUTRAL) -> None:
        self.base = base
        self.forget()

    def forget(self) -> None:
        """Begin anew with the base."""
        self._seen: dict[Kind, dict[int, _Average]] = {"step": {}, "head": {}, "pass": {}}
        self._count = 0

    def observe(self, kind: Kind, rows: int, seconds: float) -> None:
        self._count += 1
        seen = self._seen[kind].get(rows)
        if seen is None:
            self._seen[kind][rows] = _Average()
        else:
            seen.add(seconds, None if seen.known(self._count) else self._scaled(kind, rows), self._count)

    def seconds(self, kind: Kind, rows: int) -> float:
        seen = self._seen[kind].get(rows)
        if seen is not None and seen.known(self._count):
            return seen.seconds
        return self._scaled(kind, rows) or self._base(kind, rows)

    def measured(self, kind: Kind, rows: int) -> bool:
        """Whether the cost of such a call was measured here, and not long ago."""
        seen = self._seen[kind].get(rows)
        return seen is not None and seen.known(self._count)

    def token(self, sequences: int = 1) -> float:
        """A token of mode full, for each of so many sequences."""
        return self.seconds("step", sequences) + self.seconds("pass", sequences)

    def head(self, sequences: int = 1) -> float:
        """The shallow head of one step."""
        return max(0.0, self.seconds("head", sequences) - self.seconds("step", sequences))

    def row(self) -> float:
        """A further row of a deep pass."""
        return self.further_row() * self.seconds("pass", 1)

    def further_row(self) -> float:
        """A further row of a deep pass as a share of the first: between the fewest and the most rows that were
        measured, by the base where these are not far apart."""
        known = {rows: seen.seconds for rows, seen in self._seen["pass"].items() if seen.known(self._count)}
        few, many = min(known, default=1), max(known, default=1)
        if many < 1.5 * few:
            few, many = 1, 8
            base = self.base if len(self.base.deep) > 1 else NEUTRAL
            known = {rows: base.deep_pass(rows) for rows in (few, many)}
        row = max(0.0, known[many] - known[few]) / (many - few)
        first = known[few] - (few - 1) * row
        return min(1.0, row / first) if first > 0 else 1.0

    def _base(self, kind: Kind, rows: int) -> float:
        """Shallow calls grow with their rows as deep ones do."""
        base, deep = self.base, self.base.deep_pass(rows)
        if kind == "pass":
            return deep
        return (base.shallow if kind == "head" else base.shallow_without_head) * deep / base.deep[1]

    def _scaled(self, kind: Kind, rows: int) -> float | None:
        """As the nearest size of its kind was measured, else as any call was; None where nothing was."""
        for kinds in ((kind,), tuple(self._seen)):
            known = [
                (abs(math.log(other / rows)), seen.seconds / self._base(each, other))
                for each in kinds
                for other, seen in self._seen[each].items()
                if seen.known(self._count)
            ]
            if known:
                return self._base(kind, rows) * min(known)[1]
        return None


class _Average:
    """Exponential; `last` counts the calls of all kinds."""

    __slots__ = ("count", "last", "seconds")

    def __init__(self) -> None:
        self.seconds, self.count, self.last = 0.0, 0, 0

    def known(self, now: int) -> bool:
        return self.count > 0 and now - self.last <= MEMORY

    def add(self, seconds: float, expected: float | None, now: int) -> None:
        """`expected`: what it was thought to take, where it was not known."""
        if not self.known(now):
            self.seconds, self.count = expected or seconds, 1 if expected else 0
        if self.count:
            seconds = min(max(seconds, self.seconds / STRAY), self.seconds * STRAY)
        self.count, self.last = min(self.count + 1, RECENT), now
        self.seconds += (seconds - self.seconds) / self.count
