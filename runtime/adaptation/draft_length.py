"""How long lossless drafts should be: the length that measured acceptance and costs make fastest, often none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from runtime.adaptation.draft_costs import DraftCosts

# In tokens of mode full: what drafts may lose before they have won anything, and the share of all tokens that makes
# up for it afterwards.
GRANT, GRANT_SHARE = 0.3, 0.0075
# The most that is put by: what may be lost again where drafts no longer pay.
MOST = 8.0


class DraftBudget:
    """`balance` in tokens of mode full."""

    def __init__(self) -> None:
        self.balance = GRANT

    def bears(self, loss: float) -> bool:
        """Whether so many tokens may be lost. As much as is granted always may, before or after."""
        return self.balance >= min(loss, GRANT)

    def book(self, tokens: float, cost: float) -> None:
        """`tokens` were made for what as many as `cost` take in mode full."""
        self.balance = min(MOST, self.balance + tokens - cost)
        self.grant(tokens)

    def grant(self, tokens: float) -> None:
        """`tokens` were made, as mode full makes them."""
        if self.balance < GRANT:
            self.balance = min(GRANT, self.balance + GRANT_SHARE * tokens)


# Drafts must promise this much over mode full to begin with, so that an error of the estimates does not cost speed, and
# the least of it to go on: asking costs time outside the engines, too.
MARGIN, LEAST = 1.01, 1.003
# What asking the shallow head while nothing is drafted may cost, as a share of a token in mode full.
PROBE_SHARE = 0.005
# And no more often than this: it costs time outside the engines, too.
PROBE_TOKENS = 16
# Rows that are asked one after the other at first, and the most between decisions.
FIRST_ROWS, REVIEW_ROWS = 8, 8
# How far a draft that fails may overdraw the account; one of a single token may always.
OVERDRAFT = 0.3
# Once costs are known, of so many tokens without a draft one is measured; and of so many drafts one token is made
# without, as what drafts gain is counted in such tokens.
PLAIN_TOKENS, DRAFTS = 8, 64


class DraftOutcome(NamedTuple):
    """A row that the shallow head was asked at: `sure`, above the threshold; `kept`, the deep decoder chose the same.
    `kept` counts only where sure."""

    sure: bool
    kept: bool


class Expected(NamedTuple):
    """What a calibration says: the share of rows that are sure, and of those that are kept."""

    sure: float
    kept: float


class DraftLength:
    """Shared by requests that draft alike; nothing it says changes a token, so a lost update does no harm.

    `costs`: of drafts of up to `max_pending` - 1 tokens. `expected` counts as much as a few rows that were seen.
    `others`: a pace whose shares of sure rows and kept drafts are this one's, too.
    """

    def __init__(self, costs: DraftCosts, expected: Expected | None = None, others: DraftLength | None = None) -> None:
        self._costs, self._account = costs, DraftBudget()
        self._sure: _Share = others._sure if others else _Share(expected and expected.sure)
        self._kept: _Share = others._kept if others else _Share(expected and expected.kept)
        self._among: dict[int, DraftLength] = {}
        self._length = self._asked = self._plain = self._drafts = 0
        self._rows_to_review = 0 if expected else 1
        # A step without the head comes first, to tell what the head costs.
        self._tokens_to_probe = 2

    def among(self, company: int) -> DraftLength:
        """The pace where calls are shared by as many sequences, in steps of 1, 2, 4, 8: they cost otherwise."""
        if company == 1:
            return self
        size = (company - 1).bit_length()
        if size not in self._among:
            self._among[size] = DraftLength(self._costs.anew(), others=self)
        return self._among[size]

    def plan(self, most: int) -> tuple[int, bool]:
        """The length of the next draft, up to `most`, and whether to ask the shallow head at the row after it too."""
        if self._rows_to_review <= 0:
            self._review(most)
        if most == 0 or self._account.balance <= 0:
            return 0, False
        if self._length > 0:
            self._drafts += 1
            if self._drafts % DRAFTS == 0:
                return 0, False
            return self._affordable(min(self._length, most)), False
        self._tokens_to_probe -= 1
        return (0, False) if self._tokens_to_probe > 0 else self._ask()

    def _ask(self) -> tuple[int, bool]:
        """Ask the shallow head, if the account bears it. Once it was asked, a draft of one token costs no more than its
        further row, and often pays by itself."""
        costs = self._costs
        full, kept = costs.full, self._kept.value
        # More than nothing must speak for it: a session begins with a half.
        further = max(0.5, (costs["bare"] + costs[2] - costs[1]) / full)
        loss = max(0.0, costs.head / full + self._sure.value * min(0.0, further - kept))
        if not self._account.bears(loss):
            return 0, False
        # At first every second row is asked, to see both costs; later so few that it does not show.
        self._tokens_to_probe = max(PROBE_TOKENS, int(loss / PROBE_SHARE)) if self._asked >= FIRST_ROWS else 2
        return (1, False) if kept > further else (0, True)

    def observe_plain(self, shallow: float, deep: float) -> None:
        """A token without a draft, the head not asked: seconds of its step and of its deep pass."""
        self._plain += 1
        if self._plain < PLAIN_TOKENS and self._asked >= FIRST_ROWS and self._length == 0:
            return
        self._costs.observe(0, 1, shallow, deep)
        self._account.grant(self._plain)
        self._plain = 0

    def observe_costs(self, asked: int, rows: int, shallow: float, deep: float, tokens: int) -> None:
        """Seconds of `rows` shallow steps, `asked` of them with the head, and of the deep pass over them, which made so
        many `tokens` final. What drafts gain or lose is kept account of, by what such steps take as a rule."""
        self._costs.observe(asked, rows, shallow, deep)
        self._asked += asked
        self._account.book(tokens, self._costs.expected(asked, rows) / self._costs.full)

    def observe_drafts(self, verdicts: Iterable[DraftOutcome]) -> None:
        for verdict in verdicts:
            self._sure.observe(verdict.sure)
            if verdict.sure:
                self._kept.observe(verdict.kept)
            self._rows_to_review -= 1

    def speedups(self, most: int) -> Iterator[float]:
        """Predicted speed with drafts of up to 0, 1, ... `most` tokens, as multiples of mode full."""
        sure, kept, costs = self._sure.value, self._kept.value, self._costs
        asked, bare, full = costs["asked"], costs["bare"], costs.full
        tokens, reached, drafted, stopped, both = 1.0, 1.0, 0.0, 0.0, 1.0
        for length in range(most + 1):
            # `reached`: the chance that the draft gets so long; `stopped`: deep passes of drafts that ended before.
            deep = costs[length + 1]
            yield tokens * full / (asked * drafted + bare * reached + stopped + deep * reached)
            drafted += reached
            stopped += deep * reached * (1 - sure)
            reached *= sure
            both *= sure * kept
            tokens += both

    def _review(self, most: int) -> None:
        speed, length = max((speed, length) for length, speed in enumerate(self.speedups(most)))
        self._length = length if speed > (MARGIN if self._length == 0 else LEAST) else 0
        self._rows_to_review = max(1, min(REVIEW_ROWS, self._sure.count // 4))

    def _affordable(self, length: int) -> int:
        """The longest draft up to `length` that the account bears if nothing of it is kept; one token at least."""
        costs, limit = self._costs, self._account.balance + OVERDRAFT + 1
        full = costs.full
        while length > 1 and costs.expected(length, length + 1) > limit * full:
            length -= 1
        return length


class _Share:
    """A share of late: what lies 32 observations back counts a third. It begins as one half, twice seen, or as
    `expected`, four times."""

    def __init__(self, expected: float | None = None) -> None:
        self.value, self.count = (0.5, 2) if expected is None else (expected, 4)

    def observe(self, holds: bool) -> None:
        self.count += 1
        self.value += (holds - self.value) / min(self.count, 32)
