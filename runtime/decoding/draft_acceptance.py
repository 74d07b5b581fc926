"""Measurements of drafts over the requests of a session: acceptance rates, and whether exits pay.

Times are in seconds.
"""

from __future__ import annotations

from bisect import bisect
from itertools import pairwise

from runtime.adaptation.call_costs import CallCosts
from runtime.decoding.draft_memory import LEVELS
from runtime.decoding.draft_rule import RULE
from runtime.decoding.draft_sources import Evidence


class Average:
    """Exponential average. Starts at `value`, with the weight of two observations."""

    def __init__(self, value: float = 0.5) -> None:
        self.value = value
        self.count = 2

    def observe(self, value: float) -> None:
        """Add an observation."""
        self.count = min(self.count + 1, RULE.recent)
        self.value += (value - self.value) / self.count


class ExitChoice:
    """Chooses per request whether to draft from an exit that has layers of its own.

    These layers read every row of the request, drafted or not, and text may already draft the
    tokens that are easy to predict. Only whole requests show whether the exit pays.
    """

    def __init__(self) -> None:
        self._requests = 0
        # Totals without and with the exit. Older requests fade.
        self._time = [0.0, 0.0]
        self._tokens = [0.0, 0.0]

    def next(self) -> bool:
        """Return True if the next request may draft from the exit."""
        self._requests += 1
        if self._requests <= RULE.alternating or not all(self._tokens):
            return self._requests % 2 == 1
        pairs = zip(self._time, self._tokens, strict=True)
        without_exit, with_exit = (time / tokens for time, tokens in pairs)
        is_far = max(without_exit, with_exit) > RULE.far * min(without_exit, with_exit)
        tries_slower = self._requests % (RULE.retry_far if is_far else RULE.retry) == 0
        return (with_exit <= without_exit) != tries_slower

    def observe(self, exits: bool, time: float, tokens: int) -> None:
        """Add the time of `tokens`, in units of a deep pass over one row.

        That unit does not depend on the exit.
        """
        weight = max(0.0, 1 - tokens / RULE.choice_tokens)
        self._time[exits] = self._time[exits] * weight + time
        self._tokens[exits] = self._tokens[exits] * weight + tokens


class Acceptance:
    """Acceptance rates of drafted tokens over many requests, and the `choice` of the exit.

    Shared by requests with the same setting. A lost update does no harm.
    """

    def __init__(self) -> None:
        bounds = pairwise((0.0, *RULE.confidence_bins, 1.0))
        self.by_confidence = [Average((low + high) / 2) for low, high in bounds]
        self.exit = Average()
        self.choice = ExitChoice()
        # Averages per deep pass: final tokens and time.
        self.made = Average(1.0)
        self.time = Average(1.0)
        # Averages per draft of the exit. The cost of rows and heads depends on the sequences in a
        # call.
        self.exit_made = Average(2.0)
        self.exit_rows = Average(2.0)
        self.exit_heads = Average(2.0)
        # Averages of the seconds outside the engines: of a token without a draft, and of a step of
        # the exit's drafts.
        self.outside = Average(0.0)
        self.exit_outside = Average(0.0)
        self._by_evidence: dict[Evidence, Average] = {}

    def of_confidence(self, confidence: float) -> Average:
        """Return the acceptance rate of exit predictions with this confidence."""
        return self.by_confidence[bisect(RULE.confidence_bins, confidence)]

    def of_text(self, evidence: Evidence) -> Average:
        """Return the acceptance rate of candidates with this evidence."""
        average = self._by_evidence.get(evidence)
        if average is None:
            source, level = evidence
            if source == "memory":  # the share of occurrences
                prior = (level % LEVELS + 0.5) / LEVELS
            else:  # the more tokens match, the more likely the next one does too
                prior = (level + 1) / (level + 3)
            average = self._by_evidence.setdefault(evidence, Average(prior))
        return average

    def rate(self, evidence: Evidence) -> float:
        """Return the value of `of_text`."""
        return self.of_text(evidence).value

    def observe_pass(self, made: int, time: float) -> None:
        """Add a deep pass, after which `made` tokens became final."""
        self.made.observe(made)
        self.time.observe(time)

    def observe_exit_draft(self, made: int, rows: int, heads: int) -> None:
        """Add a draft of the exit: final tokens, rows, and rows with the head."""
        self.exit_made.observe(made)
        self.exit_rows.observe(rows)
        self.exit_heads.observe(heads)


class LearnedDrafts:
    """Measurements of all lossless requests of a session.

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
        if key not in self._acceptance and len(self._acceptance) >= RULE.most_settings:
            self._acceptance.pop(next(iter(self._acceptance)), None)
        return self._acceptance.setdefault(key, Acceptance())

    def forget(self) -> None:
        """Discard all measurements."""
        self._acceptance.clear()
        self.costs.forget()
        self.costs_without_exit.forget()
