"""Length of a draft of the exit, decided token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from runtime.decoding.calls import Prediction
from runtime.decoding.draft_acceptance import Acceptance
from runtime.decoding.draft_rule import RULE


class ExitDraft:
    """Decides token by token how long one draft of the exit becomes.

    Costs are in tokens that would otherwise be generated in that time.

    Args:
        acceptance: Measured acceptance rates.
        threshold: Predictions with this confidence or less are not drafted.
        deep: Returns the cost of a deep pass by its rows.
        step: Cost of a shallow step.
        head: Cost of the head for the next prediction.
        budget: Cost from which the draft does not continue. The first token is always drafted.
    """

    def __init__(
        self,
        acceptance: Acceptance,
        threshold: float,
        deep: Callable[[int], float],
        step: float,
        head: float,
        budget: float = math.inf,
    ) -> None:
        self._acceptance = acceptance
        self._threshold = threshold
        self._deep = deep
        self._step = step
        self._head = head
        self._budget = budget
        self._probability = 1.0  # probability that all drafted tokens are accepted
        self._rows = 0
        self._next_pass = deep(1)  # cost of a deep pass over one more row
        self._add_row()

    def _add_row(self) -> None:
        """Count a row, and compute the cost of the next. Measurements of fewer may be higher."""
        self._rows += 1
        before = self._next_pass
        self._next_pass = self._deep(self._rows + 1)
        self._row = max(0.0, self._next_pass - before)

    def __call__(self, prediction: Prediction) -> bool:
        """Return True if this prediction should be drafted."""
        confidence = prediction.confidence
        if confidence is None or confidence <= self._threshold:
            return False
        probability = self._probability * self._acceptance.of_confidence(confidence).value
        if probability <= self._step + self._row:
            return False
        self._probability = probability
        self._budget -= self._step + self._row + self._head
        self._add_row()
        return True

    def continues(self) -> bool:
        """Return True if one more prediction, of average acceptance, is worth its step and head."""
        if self._rows == 1:
            return True
        cost = self._step + self._row + self._head
        expected = self._probability * self._acceptance.exit.value
        return cost < min(expected, self._budget)

    def extension(self, rates: Iterable[float]) -> int:
        """Return how many candidates of a text with these acceptance rates should be appended."""
        probability = self._probability
        net = 0.0
        best = 0.0
        count = 0
        before = self._deep(self._rows)
        for number, rate in enumerate(rates, 1):
            probability *= rate
            if probability < RULE.hopeless:
                break
            cost = self._deep(self._rows + number)
            net += probability - max(0.0, cost - before)
            before = cost
            if net > best:
                best = net
                count = number
        return count
