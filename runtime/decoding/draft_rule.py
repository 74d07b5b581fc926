"""Chooses what a lossless request drafts next, and how many tokens: of the candidates that its sources find
(runtime/decoding/draft_sources.py), or of the exit.

- A lookup whose newest three tokens stood before is tried, and so are `predicted_output` and `draft_source`; a lookup
  of two, or of three where the exit pays, where it promises more by what its tokens were worth in earlier requests.
- A draft of a text has up to 3 tokens at first; after one that was accepted whole twice as many and one more, after
  another as many as were accepted of it, at least 1. Of those lengths the measured costs decide for the one that
  promises most.
- A draft of the exit goes on as long as its next token is worth what it costs: the chance that it and all before it are
  right, as tokens of such confidence were before, against the time of its step and of its row in the deep pass. Where
  it stops, what stood behind the same tokens before is read with it, as long as that is worth its rows. The exit is
  drafted where its drafts have saved more than that time is worth elsewhere.
- Where the exit has layers of its own, they read every row of a request that may draft from it, drafted or not. So
  requests take turns at first, with the exit and without; then the faster way is taken, the other tried now and then.
- A request that drafts have cost more than GRANT tokens and SHARE of its time tries only what LONG tokens agree with,
  until it has made up for that. The next request begins without that debt.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence
from itertools import pairwise
from time import perf_counter
from typing import NamedTuple

from runtime.adaptation.call_costs import CallCosts
from runtime.decoding.calls import Prediction
from runtime.decoding.draft_sources import Candidates, DraftSources
from runtime.decoding.response import Response

# Lengths of drafts of candidates: the calls for each number of rows are bound once, which takes as long as a token.
LENGTHS = (1, 3, 7, 15)
FIRST = 3  # tokens of a request's first draft
# Tokens of a lookup that is always tried, and tokens that agree with a text that is tried whatever was lost.
TRIED, LONG = 3, 8
# In tokens of mode full: what drafts may lose in a request, the share of its tokens that adds to it, and the most that
# they may lose again of what they have saved.
GRANT, SHARE, SAVED = 0.5, 0.015, 8.0
# Speed over mode full that a draft must promise where it is not always tried.
MARGIN = 1.01
# Acceptance of a token where the draft before was accepted whole, at least.
CONFIRMED = 0.9
# Confidences that are told apart, and what is thought of the first.
STEPS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
# While the exit is not drafted, it is tried so rarely that its head costs this share of the time, and at most at every
# PROBE_TOKENS-th token.
PROBE_SHARE, PROBE_TOKENS = 0.005, 16
# One of so many tokens without a draft is timed.
TIMED = 8
# So many requests of a setting draft from the exit and do not by turns; then the slower way is tried by one in TRY, or
# one in SELDOM where a token cost FAR times as much. Costs are of the last tokens, about as many.
TURNS, TRY, SELDOM, FAR, LAST = 6, 16, 64, 1.2, 2048
# Observations that an average of acceptance goes back, and tokens of agreement beyond which more say no more.
RECENT, MOST_AGREES = 64, 8
# Settings of requests for which a session remembers acceptance.
MOST_SETTINGS = 64


class Average:
    """Exponential average; begins as `value`, with the weight of two observations."""

    def __init__(self, value: float = 0.5) -> None:
        self.value, self.count = value, 2

    def observe(self, holds: float) -> None:
        self.count = min(self.count + 1, RECENT)
        self.value += (holds - self.value) / self.count


class ExitChoice:
    """Whether a request may draft from an exit with layers of its own: what it then pays for every row, and that the
    text may have had the drafts that are easy, only whole requests show."""

    def __init__(self) -> None:
        self._requests = 0
        self._spent, self._tokens = [0.0, 0.0], [0.0, 0.0]  # without and with the exit, faded

    def next(self) -> bool:
        """Choose for the next request."""
        self._requests += 1
        if self._requests <= TURNS or not all(self._tokens):
            return self._requests % 2 == 1
        without, exits = (spent / tokens for spent, tokens in zip(self._spent, self._tokens, strict=True))
        far = max(without, exits) > FAR * min(without, exits)
        return (exits <= without) != (self._requests % (SELDOM if far else TRY) == 0)

    def observe(self, exits: bool, spent: float, tokens: int) -> None:
        """Learn that `tokens` took as long as so many deep passes over a row, which do not depend on the exit."""
        faded = max(0.0, 1 - tokens / LAST)
        self._spent[exits] = self._spent[exits] * faded + spent
        self._tokens[exits] = self._tokens[exits] * faded + tokens


class Acceptance:
    """How often drafted tokens are right, over many requests, those of the exit by their `confidence`; and the `choice`
    of the exit. Shared by requests that draft alike; a lost update does no harm."""

    def __init__(self) -> None:
        self.confidence = [Average((one + two) / 2) for one, two in pairwise((0.0, *STEPS, 1.0))]
        self.exit, self.choice = Average(), ExitChoice()
        # The mean deep pass: the tokens that it made, and its time and its steps', in tokens of mode full.
        self.made, self.spent = Average(1.0), Average(1.0)
        # The mean draft of the exit. What its rows and heads cost depends on the sequences that share the calls.
        self.exit_made, self.exit_rows, self.exit_heads = Average(2.0), Average(2.0), Average(2.0)
        self._right: dict[tuple[str, int], Average] = {}

    def sure(self, confidence: float) -> Average:
        """The average of the exit's tokens of such confidence."""
        return self.confidence[bisect(STEPS, confidence)]

    def passed(self, made: int, spent: float) -> None:
        self.made.observe(made)
        self.spent.observe(spent)

    def drafted(self, made: int, rows: int, heads: int) -> None:
        self.exit_made.observe(made)
        self.exit_rows.observe(rows)
        self.exit_heads.observe(heads)

    def right(self, source: str, agrees: int) -> Average:
        """The average of a source's candidates behind so many tokens that agree with it."""
        key = source, min(agrees, MOST_AGREES)
        if key not in self._right:
            # The more tokens agree, the likelier does the next.
            self._right[key] = Average((key[1] + 1) / (key[1] + 3))
        return self._right[key]


class LearnedDrafts:
    """Lessons of a session's lossless requests: `costs` of calls, those `without` an exit's own layers apart, and
    acceptance by threshold and by whether tokens are sampled."""

    def __init__(self, costs: CallCosts) -> None:
        self.costs, self.without = costs, CallCosts(costs.base)
        self._acceptance: dict[tuple[float, bool], Acceptance] = {}

    def acceptance(self, threshold: float, samples: bool) -> Acceptance:
        key = threshold, samples
        if key not in self._acceptance and len(self._acceptance) >= MOST_SETTINGS:
            self._acceptance.pop(next(iter(self._acceptance)), None)
        return self._acceptance.setdefault(key, Acceptance())

    def forget(self) -> None:
        """Begin anew."""
        self._acceptance.clear()
        self.costs.forget()
        self.without.forget()


class Plan(NamedTuple):
    """The next draft: `tokens` of a `source`, or up to `exits` tokens that the exit predicts."""

    source: str = "exit"
    tokens: tuple[int, ...] = ()
    exits: int = 0


PLAIN = Plan()
NO_CANDIDATES = Candidates("lookup", 0, [])


class Outcome(NamedTuple):
    """The outcome of a draft: `kept` of `proposed` tokens, and of those of a text behind them, were accepted and `made`
    tokens final, after `rows` shallow steps. `confidences` of the rows, None without the head; `agreed`: the exit's
    prediction at the row behind what it proposed was the deep decoder's."""

    rows: int
    proposed: int
    kept: int
    made: int
    confidences: tuple[float | None, ...] = ()
    agreed: bool = False


class Chain:
    """Tells, token by token of one draft of the exit, what is worth its costs in tokens: of the `row` that a token has
    in the deep pass, of that and the `step` that reads it, and of the `head` for the next. Nothing is drafted whose
    confidence is not above `threshold`."""

    def __init__(self, acceptance: Acceptance, threshold: float, row: float, step: float, head: float) -> None:
        self._acceptance, self._threshold = acceptance, threshold
        self._row, self._step, self._head, self._reached = row, step, head, 1.0

    def __call__(self, guess: Prediction) -> bool:
        """Whether to draft this prediction, which is right with all before it as often as such were."""
        if guess.confidence is None or guess.confidence <= self._threshold:
            return False
        reached = self._reached * self._acceptance.sure(guess.confidence).value
        if reached > self._step:
            self._reached = reached
        return reached > self._step

    def goes_on(self) -> bool:
        """Whether to predict one more, which is as likely right as most are."""
        return self._reached == 1.0 or self._reached * self._acceptance.exit.value > self._step + self._head

    def reads(self, right: float) -> bool:
        """Whether to read a token of a text behind these, which is right so often."""
        self._reached *= right
        return self._reached > self._row


class Drafts:
    """The drafts of one request, from `sources` and where it `exits` from the shallow decoder's predictions."""

    clock = staticmethod(perf_counter)

    def __init__(
        self, costs: CallCosts, acceptance: Acceptance, sources: DraftSources | None = None, exits: bool = True
    ) -> None:
        self._costs, self._acceptance = costs, acceptance
        self._sources, self._exits = sources, exits
        self._open: list[Candidates] = []  # for the tokens that come next
        self._looked = False  # whether the sources have read all final tokens
        self._behind: Candidates | None = None  # read behind a draft of the exit
        # By source: the most tokens of the next draft, and whether the last was accepted whole.
        self._next: dict[str, tuple[int, bool]] = {}
        self._sequences, self._tokens = 1, 0
        self._lost = 0.0  # by drafts, in tokens of mode full
        self._call_seconds = 0.0  # of the caller's source, when it was last called
        self._to_probe, self._to_time = 1, 2
        self._after_exit = False  # whether the exit was drafted before, so that it has no other rows to catch up with
        self._since, self._told = self.clock(), 0  # when the choice of the exit was told of so many tokens

    def plan(self, response: Response, most: int, sequences: int = 1) -> Plan:
        """Choose the next draft, of at most `most` tokens, in calls that so many sequences share."""
        self._tokens, self._sequences, self._looked, self._behind = len(response.tokens), sequences, False, None
        # Without a token of mode full to compare with, a draft that loses would pass for one that pays.
        if most == 0 or (sequences == 1 and not self._costs.measured("pass", 1)):
            return PLAIN
        if self._sources is not None and self._sources.due():
            self._judge(self._sources, response)
            self._looked = True
            for found in self._candidates(self._sources, most):
                self._open.append(found)
                tokens = response.within(found.tokens)
                count = self._length(found.source, found.agrees, len(tokens))
                if count:
                    self._sources.tokens_to_look = 0
                    return Plan(found.source, tuple(tokens[:count]))
        return self._plan_exit(most) if self._exits else PLAIN

    def observe_plain(self, shallow: float, deep: float, shared: bool) -> None:
        """Learn from a token without a draft: seconds of its step and pass, in calls of its own unless `shared`."""
        self._acceptance.passed(1, 1.0)
        self._after_exit = False
        self._to_time -= 1
        if not shared and (self._to_time <= 0 or not self._costs.measured("pass", 1)):
            self._to_time = TIMED
            self._costs.observe("step", 1, shallow)
            self._costs.observe("pass", 1, deep)
            self._tell_choice(self._tokens + 1, shared)

    def observe(self, plan: Plan, outcome: Outcome, shallow: float, deep: float, shared: bool) -> None:
        """Learn from a draft, and the seconds of its shallow calls and of its deep pass."""
        costs, among, rows, acceptance = self._costs, self._sequences, outcome.rows, self._acceptance
        heads = sum(confidence is not None for confidence in outcome.confidences)
        self._tell_choice(self._tokens + outcome.made, shared)
        if not shared:
            costs.observe("pass", rows, deep)
            if plan.tokens:
                costs.observe("step", rows, shallow)
            elif heads and self._after_exit:
                # A step with the head takes as long as one without, at least.
                rest = shallow - (costs.seconds("step", rows - heads) if rows > heads else 0.0)
                costs.observe("head", 1, max(rest / heads, shallow / rows))
        spent = costs.seconds("pass", among + rows - 1)
        if plan.tokens:
            spent += costs.seconds("step", among + rows - 1)
            whole = outcome.kept == outcome.proposed
            self._next[plan.source] = (2 * outcome.proposed + 1 if whole else max(1, outcome.kept)), whole
        else:
            spent += self._steps_of_exit(rows, heads)
            acceptance.drafted(outcome.made, rows, heads)
        self._after_exit = not plan.tokens
        self._lost = max(-SAVED, self._lost + spent / costs.token(among) - outcome.made)
        acceptance.passed(outcome.made, spent / costs.token(among))
        # Rows with the head, up to the first that was rejected.
        for row, confidence in enumerate(outcome.confidences[: outcome.kept + 1]):
            if confidence is not None:
                right = outcome.agreed if row == outcome.proposed else row < outcome.kept
                acceptance.sure(confidence).observe(right)
                acceptance.exit.observe(right)
        if self._behind is not None and outcome.kept >= outcome.proposed:
            source, agrees, tokens = self._behind
            read = outcome.kept - outcome.proposed
            for place in range(min(read + 1, len(tokens))):
                acceptance.right(source, agrees + place).observe(place < read)

    def chain(self, threshold: float) -> Chain:
        """Begin a draft of the exit, of tokens whose confidence is above `threshold`."""
        costs, among = self._costs, self._sequences
        tokens = self._gain / costs.token(among)  # that are made in a second
        row, step, head = tokens * costs.row(), tokens * costs.seconds("step", among), tokens * costs.head(among)
        return Chain(self._acceptance, threshold, row, row + step, head)

    def behind(self, response: Response, drafted: Sequence[int], most: int, chain: Chain) -> Candidates:
        """Tokens of a text, at most `most`, to be read behind those that the exit has `drafted` by a `chain`."""
        if self._sources is None or not self._looked or most <= 0:
            return NO_CANDIDATES
        found = self._sources.after(drafted, most)
        tokens = response.within([*drafted, *found.tokens])[len(drafted) :]
        count = 0
        while count < len(tokens) and chain.reads(self._acceptance.right(found.source, found.agrees + count).value):
            count += 1
        self._behind = found._replace(tokens=tokens[:count])
        return self._behind

    def _tell_choice(self, tokens: int, shared: bool) -> None:
        """`tokens` are final. All time counts: drafts of the exit take more calls, and Python between them."""
        now, costs = self.clock(), self._costs
        if not shared and costs.measured("pass", 1):
            spent = (now - self._since) / costs.seconds("pass", 1)
            self._acceptance.choice.observe(self._exits, spent, tokens - self._told)
        self._since, self._told = now, tokens

    @property
    def _budget(self) -> float:
        """Tokens of mode full that drafts may still lose."""
        return GRANT + SHARE * self._tokens - self._lost

    def _candidates(self, sources: DraftSources, most: int) -> Iterator[Candidates]:
        full = self._costs.token(self._sequences)
        if sources.own is not None and self._call_seconds / full <= self._budget:
            began = perf_counter()
            tokens = sources.own.candidates(sources.context, most)
            self._call_seconds = perf_counter() - began
            self._lost += self._call_seconds / full
            yield Candidates(sources.own.name, 0, tokens)
        yield from sources.found(most)

    def _judge(self, sources: DraftSources, response: Response) -> None:
        """Learn from tokens that became final which candidates were right, drafted or not."""
        final = sources.follow(response.tokens)
        for source, agrees, tokens in self._open:
            for place, (candidate, token) in enumerate(zip(tokens, final, strict=False)):
                self._acceptance.right(source, agrees + place).observe(candidate == token)
                if candidate != token:
                    break
                sources.unexpected = 0
        self._open = []

    def _length(self, source: str, agrees: int, count: int) -> int:
        """Choose how many of `count` candidates to draft, where so many tokens before them agree."""
        if not count or (self._budget < 0 and agrees < LONG):
            return 0
        most, whole = self._next.get(source, (FIRST, False))
        costs, among, tokens, reached, drafted = self._costs, self._sequences, 1.0, 1.0, 0
        full, best, promise = costs.token(among), 0, 0.0
        for length in LENGTHS:
            if length > min(most, count):
                break
            while drafted < length:
                right = self._acceptance.right(source, agrees + drafted).value
                reached *= max(right, CONFIRMED) if whole else right
                tokens += reached
                drafted += 1
            spent = costs.seconds("step", among + length) + costs.seconds("pass", among + length)
            if tokens * full / spent > promise:
                best, promise = length, tokens * full / spent
        if source != "lookup":
            return best
        exits = self._exit_gain
        return best if promise > (exits or MARGIN) or (agrees >= TRIED and not exits) else 0

    def _plan_exit(self, most: int) -> Plan:
        if self._budget < 0:
            return PLAIN
        draft = Plan(exits=min(LENGTHS[-1], most))
        if self._exit_gain:
            return draft
        self._to_probe -= 1
        if self._to_probe > 0:
            return PLAIN
        if self._to_probe < 0:  # the second of two probes, which is timed
            share = self._costs.head(self._sequences) / self._costs.token(self._sequences)
            self._to_probe = max(PROBE_TOKENS, int(share / PROBE_SHARE))
        return draft

    def _steps_of_exit(self, rows: float, heads: float) -> float:
        """Seconds of shallow steps, one after the other, and of the head at some of them. All rows without it but one
        are read together with others."""
        calls = min(rows, heads + 1)
        return calls * self._costs.seconds("step", self._sequences) + heads * self._costs.head(self._sequences)

    @property
    def _gain(self) -> float:
        """Tokens that are made in the time of one of mode full."""
        return max(1.0, self._acceptance.made.value / self._acceptance.spent.value)

    @property
    def _exit_gain(self) -> float:
        """Tokens that the exit's drafts make in that time, 0 where they do not pay."""
        if not self._exits:
            return 0.0
        costs, among, learned = self._costs, self._sequences, self._acceptance
        rows, heads = learned.exit_rows.value, learned.exit_heads.value
        deep = costs.seconds("pass", among) + (rows - 1) * costs.row()
        gain = learned.exit_made.value * costs.token(among) / (deep + self._steps_of_exit(rows, heads))
        return gain if gain > MARGIN else 0.0
