"""What the tokens of an exit layer would do at every threshold: exit rate against agreement."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Point:
    """One threshold: a token exits above it. `exit_rate` is the share of tokens that exit, `agreement` the share of
    those that the last layer agrees with (1 where none exits)."""

    threshold: float
    exit_rate: float
    agreement: float


NO_EXIT = Point(1.0, 0.0, 1.0)


@dataclass(frozen=True)
class Curve:
    """Points as arrays [P], exit rate ascending; only thresholds that separate two confidences are points."""

    threshold: np.ndarray
    exit_rate: np.ndarray
    agreement: np.ndarray

    @classmethod
    def of(cls, confidence: np.ndarray, agrees: np.ndarray) -> Curve:
        """`confidence` [N] in [0, 1], `agrees` [N] bool, of at least one token."""
        order = np.argsort(-confidence, kind="stable")
        # A confidence of 0 never exits: nothing is above it, down to the threshold 0.
        descending = np.append(confidence[order].astype(np.float64), 0.0)
        cuts = np.flatnonzero(descending[:-1] > descending[1:])
        exits = cuts + 1
        return cls(
            threshold=(descending[cuts] + descending[cuts + 1]) / 2,
            exit_rate=exits / len(confidence),
            agreement=np.cumsum(agrees[order])[cuts] / exits,
        )

    def at_agreement(self, target: float) -> Point:
        """The largest exit rate whose agreement reaches `target`; NO_EXIT where none does."""
        reaching = np.flatnonzero(self.agreement >= target)
        return self._point(int(reaching[-1])) if len(reaching) else NO_EXIT

    def sampled(self, count: int) -> Iterator[Point]:
        """At most `count` points, evenly spaced in exit rate, the last one among them."""
        if len(self.exit_rate) == 0:
            return
        wanted = np.linspace(0, self.exit_rate[-1], count + 1)[1:]
        for index in sorted(set(np.searchsorted(self.exit_rate, wanted).tolist())):
            yield self._point(min(index, len(self.exit_rate) - 1))

    def _point(self, index: int) -> Point:
        return Point(float(self.threshold[index]), float(self.exit_rate[index]), float(self.agreement[index]))
