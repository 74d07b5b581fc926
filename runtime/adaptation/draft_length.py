"""How long lossless drafts should be: the length that measured acceptance and costs make fastest, often none.

Time lost to drafting is bounded: by a small budget, by a small share of all time, and by what drafts saved before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from runtime.adaptation.call_costs import CallCosts

# The budget, in tokens of mode full: what drafts may lose before they have saved anything, the share of all tokens that
# refills it, and the most that is kept of what they saved, to be lost where they no longer pay.
GRANT, GRANT_SHARE, MOST_SAVED = 0.3, 0.0075, 8.0
# How far a draft that fails may overdraw the budget; one of a single token may always.
OVERDRAFT = 0.3
# Drafts must promise this much over mode full to begin with, and the least of it to go on.
MARGIN, LEAST = 1.01, 1.003
# What running the shallow head while nothing is drafted may cost, as a share of a token, and at most how often it runs.
PROBE_SHARE, PROBE_TOKENS = 0.005, 16
# Rows with the head that are probed one after the other at first, and the most rows between decisions.
FIRST_ROWS, REVIEW_ROWS = 8, 8
# Once costs are known, of so many tokens without a draft one is measured; after so many drafts a token has none.
PLAIN_TOKENS, DRAFTS = 8, 64
# Observations that an average of acceptance goes back.
RECENT = 32
# Thresholds for which a session remembers how long drafts should be.
MOST_THRESHOLDS = 64


class DraftOutcome(NamedTuple):
    """A row with the shallow head: `sure`, above the threshold; `kept`, the deep decoder chose the same. `kept` counts
    only where sure."""

    sure: bool
    kept: bool


class DraftLength:
    """Shared by requests that draft alike; nothing it says changes a token, so a lost update does no harm. `others` has
    the same acceptance, and other costs."""

    def __init__(self, costs: CallCosts, others: DraftLength | None = None) -> None:
        self._costs = costs
        self.sure: Average = others.sure if others else Average()
        self.kept: Average = others.kept if others else Average()
        self._among: dict[int, DraftLength] = {}
        self._budget = GRANT
        self._length = self._asked = self._plain = self._drafts = 0
        self._rows_to_review = 1
        self._tokens_to_probe = 2  # a step without the head comes first, to tell what the head costs

    def among(self, company: int) -> DraftLength:
        """Where calls are shared by as many sequences, in steps of 1, 2, 4, 8: they cost otherwise."""
        if company == 1:
            return self
        size = (company - 1).bit_length()
        if size not in self._among:
            self._among[size] = DraftLength(CallCosts(self._costs.base), self)
        return self._among[size]

    def plan(self, most: int) -> tuple[int, bool]:
        """The length of the next draft, up to `most`, and whether to run the shallow head at the row after it too."""
        if self._rows_to_review <= 0:
            self._review(most)
        if most == 0 or self._budget <= 0:
            return 0, False
        if self._length > 0:
            self._drafts += 1
            return (0, False) if self._drafts % DRAFTS == 0 else (self._affordable(min(self._length, most)), False)
        self._tokens_to_probe -= 1
        return (0, False) if self._tokens_to_probe > 0 else self._probe()

    def observe_plain(self, shallow: float, deep: float) -> None:
        """A token without a draft or the head: seconds of its step and of its deep pass."""
        self._plain += 1
        if self._plain < PLAIN_TOKENS and self._asked >= FIRST_ROWS and self._length == 0:
            return
        self._costs.observe(0, 1, shallow, deep)
        self._refill(self._plain)
        self._plain = 0

    def observe_costs(self, asked: int, rows: int, shallow: float, deep: float, tokens: int) -> None:
        """Seconds of `rows` shallow steps, `asked` of them with the head, and of the deep pass over them, which made so
        many `tokens` final. What was saved or lost is what such steps usually take."""
        self._costs.observe(asked, rows, shallow, deep)
        self._asked += asked
        saved = tokens - self._costs.expected(asked, rows) / self._costs.full
        self._budget = min(MOST_SAVED, self._budget + saved)
        self._refill(tokens)

    def observe_drafts(self, outcomes: Iterable[DraftOutcome]) -> None:
        for outcome in outcomes:
            self.sure.observe(outcome.sure)
            if outcome.sure:
                self.kept.observe(outcome.kept)
            self._rows_to_review -= 1

    def speedups(self, most: int) -> Iterator[float]:
        """Predicted speed with drafts of up to 0, 1, ... `most` tokens, as multiples of mode full."""
        sure, kept, costs = self.sure.value, self.kept.value, self._costs
        asked, bare, full = costs.step(True), costs.step(False), costs.full
        tokens, reached, drafted, stopped, both = 1.0, 1.0, 0.0, 0.0, 1.0
        for length in range(most + 1):
            # `reached`: the chance that the draft gets so long; `stopped`: deep passes of drafts that ended before.
            deep = costs.deep_pass(length + 1)
            yield tokens * full / (asked * drafted + bare * reached + stopped + deep * reached)
            drafted += reached
            stopped += deep * reached * (1 - sure)
            reached *= sure
            both *= sure * kept
            tokens += both

    def _review(self, most: int) -> None:
        speed, length = max((speed, length) for length, speed in enumerate(self.speedups(most)))
        self._length = length if speed > (MARGIN if self._length == 0 else LEAST) else 0
        self._rows_to_review = max(1, min(REVIEW_ROWS, self.sure.count // 4))

    def _probe(self) -> tuple[int, bool]:
        """Run the shallow head, if the budget bears it. Once it ran, a draft of one token costs no more than its
        further row, and often pays by itself."""
        costs, kept = self._costs, self.kept.value
        full = costs.full
        # More than nothing must speak for it: a session begins with a half.
        further = max(0.5, (costs.step(False) + costs.deep_pass(2) - costs.deep_pass(1)) / full)
        loss = max(0.0, costs.head / full + self.sure.value * min(0.0, further - kept))
        if self._budget < min(loss, GRANT):
            return 0, False
        # At first every second row is probed, to see both costs; later so few that it does not show.
        self._tokens_to_probe = max(PROBE_TOKENS, int(loss / PROBE_SHARE)) if self._asked >= FIRST_ROWS else 2
        return (1, False) if kept > further else (0, True)

    def _affordable(self, length: int) -> int:
        """The longest draft up to `length` that the budget bears if nothing of it is kept; one token at least."""
        limit = (self._budget + OVERDRAFT + 1) * self._costs.full
        return next((n for n in range(length, 1, -1) if self._costs.expected(n, n + 1) <= limit), 1)

    def _refill(self, tokens: float) -> None:
        if self._budget < GRANT:
            self._budget = min(GRANT, self._budget + GRANT_SHARE * tokens)


class Average:
    """Moving average of a share; begins as one half, with the weight of two observations."""

    def __init__(self) -> None:
        self.value, self.count = 0.5, 2

    def observe(self, holds: bool) -> None:
        self.count += 1
        self.value += (holds - self.value) / min(self.count, RECENT)


class DraftLengths:
    """One for requests that draft at one threshold, sampling or not; what calls cost is the same for all."""

    def __init__(self, costs: CallCosts) -> None:
        self.costs = costs
        self._lengths: dict[tuple[float, bool], DraftLength] = {}

    def of(self, threshold: float, samples: bool) -> DraftLength:
        key = threshold, samples
        if key not in self._lengths and len(self._lengths) >= MOST_THRESHOLDS:
            self._lengths.pop(next(iter(self._lengths)), None)
        return self._lengths.setdefault(key, DraftLength(self.costs))
