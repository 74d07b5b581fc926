"""Measurements of drafts over the requests of a session: acceptance rates, and what exits save.

Times are in seconds.
"""

from __future__ import annotations

from bisect import bisect
from itertools import pairwise

from runtime.adaptation.call_costs import CallCosts
from runtime.decoding.draft_memory import LEVELS
from runtime.decoding.draft_rule import RULE
from runtime.decoding.draft_sources import AGREED, COUNTED, Evidence


class Average:
    """Exponential average. Starts at `value`, with the weight of two observations."""

    def __init__(self, value: float = 0.5) -> None:
        self.value = value
        self.count = 2

    def observe(self, value: float) -> None:
        """Add an observation."""
        if self.count < RULE.recent:
            self.count += 1
        self.value += (value - self.value) / self.count


class Speed:
    """Speed of passes: average number of final tokens divided by average time.

    Args:
        made: Number of tokens that become final per pass, before any observation.
        time: Time of a pass, before any observation. Its unit is that of the observations.
    """

    def __init__(self, made: float = 1.0, time: float = 1.0) -> None:
        self.made = Average(made)
        self.time = Average(time)

    @property
    def value(self) -> float:
        return self.made.value / self.time.value

    def observe(self, made: int, time: float) -> None:
        """Add a pass."""
        self.made.observe(made)
        self.time.observe(time)


class ExitDrafts:
    """Average outcome of the exit's drafts.

    Their speed is computed from these and from the present costs of calls. Averages of times would
    stay high for many drafts after other work has slowed a few.

    Attributes:
        made: Final tokens of a draft.
        rows: Rows of its deep pass.
        heads: Rows with the exit's head.
        slowness: Time of a draft, relative to the costs of its calls.
        tried: A draft was observed.
    """

    def __init__(self) -> None:
        self.made = Average(RULE.first_exit_draft[0])
        self.rows = Average(2.0)
        self.heads = Average(2.0)
        self.slowness = Average(1.0)
        self.tried = False

    def observe(self, made: int, rows: int, heads: int, slowness: float) -> None:
        """Add a draft."""
        self.tried = True
        self.made.observe(made)
        self.rows.observe(rows)
        self.heads.observe(heads)
        self.slowness.observe(slowness)


class ExitSaving:
    """Time that an exit with layers of its own saves, net. Decides which requests draft from it.

    These layers read every row of a request, drafted or not. What the exit's drafts save, minus
    that time, is added up over tokens and requests. It is measured within requests, so it does not
    depend on how fast other requests are.
    """

    def __init__(self) -> None:
        self._requests = 0
        self._saved = 0.0  # in tokens of mode "full". Older tokens fade.

    def next(self) -> bool:
        """Return True if the next request may draft from the exit."""
        self._requests += 1
        if self._requests <= RULE.alternating:
            return self._requests % 2 == 1
        if self._saved > 0:
            return self._requests % RULE.compare != 0
        return self._requests % RULE.retry == 0

    def observe(self, saved: float, tokens: int) -> None:
        """Add the time saved at some tokens of a request that may draft from the exit."""
        self._saved = self._saved * max(0.0, 1 - tokens / RULE.saving_tokens) + saved


class DraftOrder:
    """Speeds of requests that draft from the exit first, and of those that search the text first.

    Decides which of both the next request does. What the exit's drafts would gain at a token cannot
    be told from the tokens for which the text has no draft, which are the hard ones.
    """

    def __init__(self) -> None:
        self._requests = 0
        # By whether the exit is first. Older tokens fade.
        self._tokens = {True: 0.0, False: 0.0}
        self._time = {True: 0.0, False: 0.0}

    def next(self) -> bool:
        """Return True if the next request drafts from the exit first."""
        self._requests += 1
        if self._requests <= RULE.alternating:
            return self._requests % 2 == 0
        if not self._time[False]:  # no request ran alone
            return False
        faster = self._speed(True) > self._speed(False)
        sure = self._tokens[not faster] >= RULE.early_tokens
        return faster != (self._requests % (RULE.retry if sure else RULE.early_retry) == 0)

    def observe(self, exit_first: bool, tokens: int, time: float) -> None:
        """Add a pass: its final tokens, and its time in tokens of mode "full"."""
        fade = max(0.0, 1 - tokens / RULE.order_tokens)
        self._tokens[exit_first] = self._tokens[exit_first] * fade + tokens
        self._time[exit_first] = self._time[exit_first] * fade + time

    def _speed(self, exit_first: bool) -> float:
        time = self._time[exit_first]
        return self._tokens[exit_first] / time if time else 0.0


class Acceptance:
    """Acceptance rates and speeds of drafts over many requests.

    Shared by requests with the same setting. A lost update does no harm.
    """

    def __init__(self) -> None:
        bounds = pairwise((0.0, *RULE.confidence_bins, 1.0))
        self.by_confidence = [Average((low + high) / 2) for low, high in bounds]
        self.exit = Average()
        self.saving = ExitSaving()
        self.order = DraftOrder()
        # Final tokens and seconds. In seconds, because the price of a token is measured rarely.
        self.passes: Speed | None = None
        # Seconds outside the engines of a token without a draft.
        self.outside = Average(0.0)
        # Seconds of a search for drafts from text, and the time that its draft saved, in tokens of
        # mode "full".
        self.search_seconds = Average(0.0)
        self.search_saved = Average()
        self._exit_drafts: dict[int, ExitDrafts] = {}
        self._by_evidence: dict[Evidence, Average] = {}

    def observe_pass(self, made: int, seconds: float) -> None:
        """Add the final tokens and the seconds of a pass."""
        if self.passes is None:
            self.passes = Speed(made, seconds)
        else:
            self.passes.observe(made, seconds)

    def exit_drafts(self, sequences: int) -> ExitDrafts:
        """Return the exit's drafts in calls that `sequences` sequences share."""
        drafts = self._exit_drafts.get(sequences)
        if drafts is None:
            drafts = self._exit_drafts[sequences] = ExitDrafts()
        return drafts

    def of_confidence(self, confidence: float) -> Average:
        """Return the acceptance rate of exit predictions with this confidence."""
        return self.by_confidence[bisect(RULE.confidence_bins, confidence)]

    def of_text(self, evidence: Evidence) -> Average:
        """Return the acceptance rate of candidates with this evidence."""
        average = self._by_evidence.get(evidence)
        if average is None:
            source, level = evidence
            if source in COUNTED:  # the share of occurrences
                prior = (level % LEVELS + 0.5) / LEVELS
                if source == "phrases" and level < AGREED:
                    prior *= RULE.phrase_prior[level // LEVELS]
            else:  # the more tokens match, the more likely the next one does too
                prior = (level + 1) / (level + 3)
            average = self._by_evidence.setdefault(evidence, Average(prior))
        return average

    def rate(self, evidence: Evidence) -> float:
        """Return the value of `of_text`."""
        return self.of_text(evidence).value


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
