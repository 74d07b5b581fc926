"""How long lossless drafts should be: the length that measured acceptance and costs make fastest, often none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from runtime.draft_costs import DraftCosts

# A draft must promise this much over mode full, so that an error of the estimates does not cost speed.
MARGIN = 1.03
# What asking the shallow head while nothing is drafted may cost, as a share of a token in mode full.
PROBE_SHARE = 0.005
# And no more often than this: it costs time outside the engines, too.
PROBE_TOKENS = 16
# What drafts may lose, as a share of the time that mode full takes; and how many of its tokens gains put by.
LOSS_SHARE, PUT_BY = 0.0075, 8.0
# Rows asked before the first decision, and between decisions.
FIRST_ROWS, REVIEW_ROWS = 8, 8
# Once costs are known, of so many tokens without a draft one is measured.
PLAIN_TOKENS = 8


class Verdict(NamedTuple):
    """A row that the shallow head was asked at: `sure`, above the threshold; `kept`, the deep decoder chose the same.
    `kept` counts only where sure."""

    sure: bool
    kept: bool


class Pace:
    """Shared by requests that draft alike; nothing it says changes a token, so a lost update does no harm.

    `recorded` are a manifest's costs (DraftCosts): they give the shape until this machine has shown its own. `others`:
    a pace whose shares of sure rows and kept drafts are this one's, too.
    """

    def __init__(self, max_pending: int, recorded: Mapping[str, float], others: Pace | None = None) -> None:
        self._max_pending, self._recorded = max_pending, recorded
        self._costs = DraftCosts(max_pending, recorded)
        self._sure: _Share = _Share() if others is None else others._sure
        self._kept: _Share = _Share() if others is None else others._kept
        self._among: dict[int, Pace] = {}
        self._length, self._rows_to_review, self._tokens_to_probe = 0, FIRST_ROWS, 0
        self._asked = self._plain = 0
        self._balance = PUT_BY

    def among(self, company: int) -> Pace:
        """The pace where calls are shared by as many sequences, in steps of 1, 2, 4, 8: they cost otherwise."""
        if company == 1:
            return self
        size = (company - 1).bit_length()
        if size not in self._among:
            self._among[size] = Pace(self._max_pending, self._recorded, self)
        return self._among[size]

    @property
    def acceptance(self) -> float:
        """The chance that a draft is kept where those before it were, by what was seen lately."""
        return self._kept.value

    def plan(self, most: int) -> tuple[int, bool]:
        """The length of the next draft, up to `most`, and whether to ask the shallow head at the row after it too."""
        if self._rows_to_review <= 0:
            self._length = self._best_length(most)
            self._rows_to_review = REVIEW_ROWS
        if most == 0:
            return 0, False
        if self._length > 0 and self._balance > 0:
            return min(self._length, most), False
        self._tokens_to_probe -= 1
        if self._tokens_to_probe > 0:
            return 0, False
        # Before the first decision every second row is asked, to see both costs; later so few that it does not show.
        learned = self._asked >= FIRST_ROWS
        rarely = int(self._costs.head / (PROBE_SHARE * self._costs.full))
        self._tokens_to_probe = max(PROBE_TOKENS, rarely) if learned else 2
        return 0, True

    def observe_plain(self, shallow: float, deep: float) -> None:
        """A token without a draft, the head not asked: seconds of its step and of its deep pass."""
        self._plain += 1
        if self._plain < PLAIN_TOKENS and self._asked >= FIRST_ROWS:
            return
        self._costs.observe(0, 1, shallow, deep)
        self._balance = min(PUT_BY, self._balance + LOSS_SHARE * self._plain)
        self._plain = 0

    def observe_costs(self, asked: int, rows: int, shallow: float, deep: float, tokens: int) -> None:
        """Seconds of `rows` shallow steps, `asked` of them with the head, and of the deep pass over them, which made so
        many `tokens` final. What drafts gain or lose is kept account of, in tokens of mode full."""
        self._costs.observe(asked, rows, shallow, deep)
        self._asked += asked
        seconds = min(shallow + deep, 2 * self._costs.expected(asked, rows))
        self._balance = min(PUT_BY, self._balance + tokens - seconds / self._costs.full)

    def observe_drafts(self, verdicts: Iterable[Verdict]) -> None:
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

    def _best_length(self, most: int) -> int:
        speed, length = max((speed, length) for length, speed in enumerate(self.speedups(most)))
        return length if speed > MARGIN else 0


class _Share:
    """A share of late: what lies 32 observations back counts a third. It begins as one half, twice seen."""

    def __init__(self) -> None:
        self.value, self.count = 0.5, 0

    def observe(self, holds: bool) -> None:
        self.count += 1
        self.value += (holds - self.value) / min(self.count + 2, 32)
