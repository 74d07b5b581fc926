"""How long lossless drafts should be: the length that measured acceptance and costs make fastest, often none.

Of an exit, acceptance is measured by whether it is confident. Of candidates that text or the caller's code provides, by
their source and by how many tokens before them agreed: each further one of a draft has one more before it.

Time lost to drafting is bounded: by a small budget, by a small share of all time, and by what drafts saved before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from runtime.adaptation.call_costs import CallCosts

# The budget, in tokens of mode full: what drafts may lose before they have saved anything, the share of all tokens that
# refills it, and the most that is kept of what they saved, to be lost where they no longer pay.
GRANT, GRANT_SHARE, MOST_SAVED = 0.3, 0.0075, 8.0
# The most that calls of the caller's own code may leave to be made up for, however long one takes.
MOST_DEBT = 1.0
# How far a draft that fails may overdraw the budget; one of a single token may always.
OVERDRAFT = 0.3
# What a further row costs at most, in tokens of mode full, as long as it was not measured.
DEAREST_ROW = 0.5
# Drafts must promise this much over mode full to begin with, and the least of it to go on.
MARGIN, LEAST = 1.01, 1.003
# What running the shallow head while nothing is drafted may cost, as a share of a token, and at most how often it runs.
PROBE_SHARE, PROBE_TOKENS = 0.005, 16
# Rows with the head that are probed one after the other at first, and the most rows between decisions.
FIRST_ROWS, REVIEW_ROWS = 8, 8
# Once costs are known, of so many tokens without a draft one is measured; before so many drafts a token has none.
PLAIN_TOKENS, DRAFTS = 8, 64
# Observations that an average of acceptance goes back.
RECENT = 32
# Candidates are drafted in these numbers: the calls for each are bound once, which takes as long as a token.
COUNTS = (1, 2, 3, 5, 7, 11, 15)
# Beyond so many tokens that agree, further ones say no more.
MOST_AGREES = 8
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
        self._right: dict[tuple[str, int], Average] = others._right if others else {}
        self._plans: dict[tuple[str, int], tuple[int, float]] = {}
        self._candidates_to_review = REVIEW_ROWS
        self._call_seconds: Average = others._call_seconds if others else Average(0.0, 0)
        self._tokens_to_call = 0
        self._among: dict[int, DraftLength] = {}
        self._budget = GRANT
        self._length = self._with_head = self._plain = self._drafts = self._measured = 0
        self._candidate_drafts = 0
        self._speed = 1.0  # with drafts of that length
        self._rows_to_review = 1
        self._tokens_to_probe = 2  # a step without the head comes first, to tell what the head costs

    def among(self, batch_size: int) -> DraftLength:
        """Where calls are shared by as many sequences, in steps of 1, 2, 4, 8: they cost otherwise."""
        if batch_size == 1:
            return self
        size = (batch_size - 1).bit_length()
        if size not in self._among:
            self._among[size] = DraftLength(CallCosts(self._costs.base), self)
        return self._among[size]

    def begin(self) -> None:
        """A request begins: it may not lose what others saved."""
        for pace in (self, *self._among.values()):
            pace._budget = min(pace._budget, GRANT)

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
        if self._plain < PLAIN_TOKENS and self._measured >= FIRST_ROWS and self._length == 0:
            return
        self._measured += 1
        self._costs.observe(0, 1, shallow, deep)
        self._refill(self._plain)
        self._plain = 0

    def observe_costs(
        self, with_head: int, rows: int, shallow: float, deep: float, tokens: int, together: int = 1
    ) -> None:
        """Seconds of `rows` shallow steps, `with_head` of them with the head, the first `together` of them in one call,
        and of the deep pass over them, which made so many `tokens` final. What was saved or lost is what such steps
        usually take."""
        self._with_head += with_head
        if together > 1:
            self._costs.observe_together(with_head, rows, together, shallow, deep)
        else:
            self._costs.observe(with_head, rows, shallow, deep)
        seconds = self._costs.expected(with_head, rows, together)
        if together > 1:
            # What the first call over so many rows takes, to bind it as well, is not yet what is expected.
            seconds = min(shallow + deep, 2 * seconds)
        self._budget = min(MOST_SAVED, self._budget + tokens - seconds / self._costs.full)
        self._refill(tokens)

    def observe_drafts(self, outcomes: Iterable[DraftOutcome]) -> None:
        for outcome in outcomes:
            self.sure.observe(outcome.sure)
            if outcome.sure:
                self.kept.observe(outcome.kept)
            self._rows_to_review -= 1

    def plan_candidates(self, source: str, agrees: int, count: int) -> int:
        """How many of `count` candidates to draft, where so many tokens before them agree; 0 where that would not pay,
        or pay less than a draft of the exit."""
        if self._budget <= 0 or count == 0:
            return 0
        key = source, min(agrees, MOST_AGREES)
        if key not in self._plans:
            self._plans[key] = max(zip(COUNTS, self._candidate_speedups(*key), strict=True), key=lambda one: one[1])
        length, speed = self._plans[key]
        if speed <= max(MARGIN, self._speed):
            return 0
        self._candidate_drafts += 1
        if self._candidate_drafts % DRAFTS == 1:
            return 0
        # Of twice as many rows as were seen so far, not more: what they cost is a guess.
        fits = (n for n in reversed(COUNTS) if n <= min(length, count, 2 * self._costs.most_rows - 1))
        return next((n for n in fits if n == 1 or self._bears(n)), 1)

    def _bears(self, count: int) -> bool:
        """Whether the budget bears that a draft of so many candidates fails."""
        loss = self._costs.expected(0, count + 1, count + 1) / self._costs.full - 1
        if count >= self._costs.most_rows:  # more rows than were seen
            loss = max(loss, count * DEAREST_ROW)
        return loss <= self._budget + OVERDRAFT

    def observe_candidate(self, source: str, agrees: int, right: bool) -> None:
        """Whether a candidate was the next token, drafted or not."""
        self._average(source, agrees).observe(right)
        self._candidates_to_review -= 1
        if self._candidates_to_review <= 0:
            self._candidates_to_review = REVIEW_ROWS
            self._plans.clear()

    def plan_call(self) -> bool:
        """Whether to call the caller's own source, whose calls take time as well."""
        self._tokens_to_call -= 1
        tokens = self._call_seconds.value / self._costs.full
        if self._budget <= 0 or max(self._candidate_speedups("own", 0, tokens)) > MARGIN:
            return self._budget > 0
        return self._tokens_to_call <= 0 and self._budget >= min(tokens, GRANT)

    def observe_call(self, seconds: float) -> None:
        self._call_seconds.observe(seconds)
        tokens = seconds / self._costs.full
        self._tokens_to_call = max(PROBE_TOKENS, int(tokens / PROBE_SHARE))
        self._budget = max(-MOST_DEBT, self._budget - tokens)

    def speedups(self, most: int) -> Iterator[float]:
        """Predicted speed with drafts of up to 0, 1, ... `most` tokens, as multiples of mode full."""
        sure, kept, costs = self.sure.value, self.kept.value, self._costs
        with_head, bare, full = costs.step(True), costs.step(False), costs.full
        tokens, reached, drafted, stopped, both = 1.0, 1.0, 0.0, 0.0, 1.0
        for length in range(most + 1):
            # `reached`: the chance that the draft gets so long; `stopped`: deep passes of drafts that ended before.
            deep = costs.deep_pass(length + 1)
            yield tokens * full / (with_head * drafted + bare * reached + stopped + deep * reached)
            drafted += reached
            stopped += deep * reached * (1 - sure)
            reached *= sure
            both *= sure * kept
            tokens += both

    def _candidate_speedups(self, source: str, agrees: int, before: float = 0.0) -> Iterator[float]:
        """The same with drafts of each of COUNTS candidates, which took `before` tokens' time to have."""
        costs, tokens, reached, drafted = self._costs, 1.0, 1.0, 0
        full = costs.full
        for count in COUNTS:
            for place in range(drafted, count):
                reached *= self._average(source, agrees + place).value
                tokens += reached
            drafted = count
            yield tokens * full / (costs.expected(0, count + 1, count + 1) + before * full)

    def _average(self, source: str, agrees: int) -> Average:
        key = source, min(agrees, MOST_AGREES)
        if key not in self._right:
            # The more tokens agree, the likelier does the next.
            self._right[key] = Average((key[1] + 1) / (key[1] + 3))
        return self._right[key]

    def _review(self, most: int) -> None:
        speed, length = max((speed, length) for length, speed in enumerate(self.speedups(most)))
        self._length = length if speed > (MARGIN if self._length == 0 else LEAST) else 0
        self._speed = speed if self._length else 1.0
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
        self._tokens_to_probe = max(PROBE_TOKENS, int(loss / PROBE_SHARE)) if self._with_head >= FIRST_ROWS else 2
        return (1, False) if kept > further else (0, True)

    def _affordable(self, length: int) -> int:
        """The longest draft up to `length` that the budget bears if nothing of it is kept; one token at least."""
        limit = (self._budget + OVERDRAFT + 1) * self._costs.full
        return next((n for n in range(length, 1, -1) if self._costs.expected(n, n + 1) <= limit), 1)

    def _refill(self, tokens: float) -> None:
        if self._budget < GRANT:
            self._budget = min(GRANT, self._budget + GRANT_SHARE * tokens)


class Average:
    """Moving average of a share or a number; begins as one half, with the weight of two observations."""

    def __init__(self, value: float = 0.5, count: int = 2) -> None:
        self.value, self.count = value, count

    def observe(self, holds: float) -> None:
        self.count += 1
        self.value += (holds - self.value) / min(self.count, RECENT)


class DraftLengths:
    """One for requests that draft alike: at one threshold, sampling or not, from the same sources. What calls cost is
    the same for all."""

    def __init__(self, costs: CallCosts) -> None:
        self.costs = costs
        self._lengths: dict[tuple[float, bool, str], DraftLength] = {}

    def of(self, threshold: float, samples: bool, sources: str = "exit") -> DraftLength:
        key = threshold, samples, sources
        if key not in self._lengths and len(self._lengths) >= MOST_THRESHOLDS:
            self._lengths.pop(next(iter(self._lengths)), None)
        return self._lengths.setdefault(key, DraftLength(self.costs))
