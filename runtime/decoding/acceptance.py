"""Acceptance rates of drafts, measured over the requests of a session."""

from __future__ import annotations

from bisect import bisect
from itertools import pairwise

from runtime.adaptation.call_costs import CallCosts
from runtime.decoding.text_index import LEVELS

# Number of observations over which rates are averaged.
RECENT = 64
# Maximum number of settings (threshold and sampling) whose acceptance a session remembers.
MAX_SETTINGS = 64
# Boundaries of the bins of estimated probabilities. They are denser near 1, because most
# predictions of an exit are there, and acceptance matters most for long drafts.
BINS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
_MIDDLES = [(low + high) / 2 for low, high in pairwise((0.0, *BINS, 1.0))]
# Number of agreeing tokens up to which acceptance rates are kept separately.
MAX_AGREEMENT = 8
# Acceptance rate of a token relative to the share of its occurrences, by the order of its n-gram.
# Assumed until it was measured. Measured on chat prompts: other texts follow a short phrase.
_OF_SHARE = (0.5, 0.6, 0.85)

# Weight of other requests in a Trust: of their acceptance rates, in expected tokens, and of what
# their drafts of the exit gained, in drafts.
TRUST_WEIGHT = 8.0
TRUST_WEIGHT_OF_EXIT = 16.0
# Final tokens assumed of a draft from an exit that was never tried.
FIRST_EXIT_DRAFT = 2.0

# First requests of a setting, which alternate between drafting with and without such an exit, and
# one request in this many that makes the choice that was slower, as it may be faster now.
ALTERNATING = 6
RETRY = 16
# Tokens after which the speed of a choice has faded. An average needs many requests, because their
# speeds differ.
CHOICE_TOKENS = 4096

# Source of a token, and a level on which its acceptance depends.
Evidence = tuple[str, int]


class Average:
    """Exponential average. Starts at `value`, with the weight of two observations."""

    __slots__ = ("count", "value")

    def __init__(self, value: float = 0.5) -> None:
        self.value = value
        self.count = 2

    def observe(self, value: float) -> None:
        """Add an observation."""
        if self.count < RECENT:
            self.count += 1
        self.value += (value - self.value) / self.count


class Speed:
    """Tokens per unit of time: the average number of tokens divided by the average time."""

    def __init__(self) -> None:
        self._made = Average(1.0)
        self._time = Average(1.0)

    @property
    def value(self) -> float:
        return self._made.value / self._time.value

    def observe(self, made: float, time: float) -> None:
        """Add a pass."""
        self._made.observe(made)
        self._time.observe(time)


class Trust:
    """Factor on what is expected of a source in one request, at most 1.

    It falls if fewer drafts are accepted in this request than in others, so that a request in which
    a source fails soon stops using it. Older observations fade.

    Args:
        weight: Weight of other requests.
    """

    __slots__ = ("_accepted", "_expected", "_weight")

    def __init__(self, weight: float = TRUST_WEIGHT) -> None:
        self._weight = weight
        self._expected = self._accepted = weight

    @property
    def value(self) -> float:
        return min(1.0, self._accepted / self._expected)

    def observe(self, expected: float, accepted: float) -> None:
        """Add what was expected of a draft, and how much of that was accepted."""
        self._expected += expected - (self._expected - self._weight) / RECENT
        self._accepted += accepted - (self._accepted - self._weight) / RECENT


class ExitChoice:
    """Decides which requests draft from an exit with layers of its own in the shallow engine.

    These layers read every row of a request, drafted or not. The speeds of requests with and
    without them are averaged over tokens.
    """

    def __init__(self) -> None:
        self._requests = 0
        # By whether the request drafts from the exit. Older tokens fade.
        self._tokens = {True: 0.0, False: 0.0}
        self._time = {True: 0.0, False: 0.0}

    def next(self) -> bool:
        """Return True if the next request may draft from the exit."""
        self._requests += 1
        if self._requests <= ALTERNATING or not all(self._time.values()):
            return self._requests % 2 == 1
        faster = self._speed(True) > self._speed(False)
        return faster != (self._requests % RETRY == 0)

    def observe(self, exits: bool, tokens: int, time: float) -> None:
        """Add a pass: its final tokens, and its time in any unit that both kinds share."""
        fade = max(0.0, 1 - tokens / CHOICE_TOKENS)
        self._tokens[exits] = self._tokens[exits] * fade + tokens
        self._time[exits] = self._time[exits] * fade + time

    def _speed(self, exits: bool) -> float:
        return self._tokens[exits] / self._time[exits]


class ExitOutcomes:
    """Average outcome of drafts of the exit: final tokens, rows of the pass, and heads."""

    def __init__(self, made: float) -> None:
        self.made = Average(made)
        self.rows = Average(made)
        self.heads = Average(made)

    def observe(self, made: int, rows: int, heads: int) -> None:
        """Add a draft."""
        self.made.observe(made)
        self.rows.observe(rows)
        self.heads.observe(heads)


class Acceptance:
    """How often drafted tokens were accepted, by the evidence for them.

    Shared by requests with the same setting. A lost update does no harm.

    Args:
        exit_draft: Final tokens assumed of a draft of the exit until they were measured.

    Attributes:
        exit: Acceptance rate of the exit's predictions, whatever their confidence.
        exit_choice: Which requests draft from an exit with layers of its own.
        pace: Tokens generated in the time of one in mode full.
        outside: Seconds of a token outside the engines.
        search_gain: Tokens gained by a search for a draft from text.
    """

    def __init__(self, exit_draft: float = FIRST_EXIT_DRAFT) -> None:
        self._exit_draft = exit_draft
        self._rates: dict[Evidence, Average] = {}
        self._exit_outcomes: dict[int, ExitOutcomes] = {}
        self._exit_due = 0
        self.exit = Average()
        self.exit_choice = ExitChoice()
        self.pace = Speed()
        self.outside = Average(0.0)
        self.search_gain = Average(0.1)

    def exit_outcomes(self, sequences: int) -> ExitOutcomes:
        """Return the outcomes of the exit's drafts in calls that `sequences` sequences share."""
        found = self._exit_outcomes.get(sequences)
        if found is None:
            found = self._exit_outcomes[sequences] = ExitOutcomes(self._exit_draft)
        return found

    def exit_is_due(self, pause: int) -> bool:
        """Return True if an exit that does not seem to pay should be tried.

        It is tried twice in a row, because only the second draft is timed.
        """
        self._exit_due += 1
        if self._exit_due > pause:
            self._exit_due = 0
        return self._exit_due >= pause - 1

    def of_estimate(self, source: str, probability: float) -> Evidence:
        """Return the evidence of an estimated probability, such as the exit's confidence."""
        return source, -1 - bisect(BINS, probability)

    def of(self, evidence: Evidence) -> Average:
        """Return the acceptance rate of tokens with this evidence."""
        average = self._rates.get(evidence)
        if average is None:
            average = self._rates.setdefault(evidence, Average(_prior(evidence)))
        return average

    def rate(self, evidence: Evidence) -> float:
        """Return the value of `of`."""
        return self.of(evidence).value


def _prior(evidence: Evidence) -> float:
    source, level = evidence
    if level < 0:
        return _MIDDLES[-1 - level]
    if source in ("own", "predicted"):
        # The more tokens match, the more likely the next one does too.
        return (level + 1) / (level + 3)
    share = (level % LEVELS + 0.5) / LEVELS
    order = level // LEVELS
    return share * _OF_SHARE[order] if order < len(_OF_SHARE) else share**0.5


class LearnedDrafts:
    """Measurements of all requests of a session that draft.

    Attributes:
        costs: Costs of engine calls.
        costs_without_exit: The same for requests that skip the exit's own layers.
    """

    def __init__(self, costs: CallCosts) -> None:
        self.costs = costs
        self.costs_without_exit = CallCosts(costs.base)
        self._acceptance: dict[tuple[float, bool], Acceptance] = {}

    def acceptance(self, threshold: float, samples: bool) -> Acceptance:
        """Return the acceptance for a threshold and for sampled or greedy requests."""
        key = threshold, samples
        if key not in self._acceptance and len(self._acceptance) >= MAX_SETTINGS:
            self._acceptance.pop(next(iter(self._acceptance)), None)
        return self._acceptance.setdefault(key, Acceptance())

    def forget(self) -> None:
        """Discard all measurements."""
        self._acceptance.clear()
        self.costs.forget()
        self.costs_without_exit.forget()
