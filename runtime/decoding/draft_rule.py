"""Rule that decides when a lossless request drafts, from which source, and how many tokens.

docs/decoding.md, "When to draft", explains the rule: what is measured, what is compared, and when a
source is tried again. `DraftRule` holds its constants, each with the reason for it.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import NamedTuple

from runtime.adaptation.call_costs import CallCosts
from runtime.decoding.calls import Prediction
from runtime.decoding.draft_sources import Candidates, DraftSources
from runtime.decoding.response import Response


@dataclass(frozen=True)
class DraftRule:
    """Constants of the rule.

    Times are in units of one token in mode "full".
    """

    # Drafts from text

    lengths: tuple[int, ...] = (1, 3, 7, 15)
    """Lengths of drafts from text.

    Few, because engine calls are bound once per number of rows, and binding takes as long as a
    token.
    """

    first_length: int = 3
    """Maximum length of a request's first draft from a source, as its acceptance is unknown."""

    tried_agreement: int = 3
    """Agreement in tokens from which a lookup is tried regardless of earlier requests.

    A text that repeats is thus found in the first request too. Shorter matches are often
    coincidence.
    """

    sure_agreement: int = 8
    """Agreement in tokens from which a lookup is tried even after drafts have used up their grant.

    Such a match is rarely a coincidence.
    """

    confirmed: float = 0.9
    """Minimum acceptance rate assumed after a fully accepted draft: the text is being repeated."""

    most_agreement: int = 8
    """Agreement in tokens up to which acceptance rates are kept separately."""

    # Limits on the time that drafts lose

    grant: float = 0.5
    """Time that drafts may lose before a request stops drafting. Half a token is not noticeable."""

    grant_share: float = 0.015
    """Share of a request's tokens that is added to `grant`.

    Long requests keep trying, and lose at most this share.
    """

    most_saved: float = 8.0
    """Maximum time saved by earlier drafts that later drafts may lose again.

    A text that repeated once thus does not pay for misses in the rest of the request.
    """

    margin: float = 1.01
    """Minimum speedup over mode "full" that a draft must promise, unless it is always tried.

    Smaller gains are within the error of the estimates.
    """

    # Drafts from the exit

    # fmt: off
    confidence_bins: tuple[float, ...] = (
        0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999,
    )
    # fmt: on
    """Boundaries of the confidence bins in which acceptance is measured.

    They are denser near 1, because most predictions are there, and acceptance matters most for long
    drafts.
    """

    probe_share: float = 0.005
    """Maximum share of the time spent on probing an exit while its drafts do not pay."""

    probe_tokens: int = 16
    """Minimum number of tokens between two probes, for exits whose head is almost free."""

    # An exit with layers of its own, chosen once for each request

    alternating: int = 6
    """First requests of a setting, which alternate between drafting from the exit and not."""

    retry: int = 16
    """One request in this many uses the slower way, which may have become the faster one."""

    retry_far: int = 64
    """Replaces `retry` if the ratio exceeds `far`, because a wrong choice then costs more."""

    far: float = 1.2
    """Ratio of the times per token of the two ways from which `retry_far` applies."""

    choice_tokens: int = 2048
    """Tokens after which a request's time has faded, so that the choice follows recent traffic."""

    # Measuring

    timed: int = 8
    """One in this many tokens without a draft is timed. Timing adds Python between engine calls."""

    recent: int = 64
    """Number of observations over which acceptance rates are averaged."""

    most_settings: int = 64
    """Maximum number of settings (threshold and sampling) whose acceptance a session remembers."""


RULE = DraftRule()


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
        self._by_source: dict[tuple[str, int], Average] = {}

    def of_confidence(self, confidence: float) -> Average:
        """Return the acceptance rate of exit predictions with this confidence."""
        return self.by_confidence[bisect(RULE.confidence_bins, confidence)]

    def of_text(self, source: str, agreement: int) -> Average:
        """Return the acceptance rate of a source's candidate after `agreement` matching tokens."""
        key = source, min(agreement, RULE.most_agreement)
        if key not in self._by_source:
            # Prior: the more tokens match, the more likely the next one does too.
            self._by_source[key] = Average((key[1] + 1) / (key[1] + 3))
        return self._by_source[key]

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


class DraftPlan(NamedTuple):
    """The next draft: `tokens` from a text `source`, or up to `exits` predictions of the exit."""

    source: str = "exit"
    tokens: tuple[int, ...] = ()
    exits: int = 0


NO_DRAFT = DraftPlan()
NO_CANDIDATES = Candidates("lookup", 0, [])


class Outcome(NamedTuple):
    """Outcome of a draft.

    Attributes:
        rows: Shallow steps.
        proposed: Drafted tokens, without those that continue an exit's draft.
        accept_length: Accepted tokens, including those of the continuation.
        made: Tokens that became final.
        confidences: Confidence at each row, None if the head did not run.
        agreed: The exit's prediction after the proposed tokens matched the deep decoder's.
    """

    rows: int
    proposed: int
    accept_length: int
    made: int
    confidences: tuple[float | None, ...] = ()
    agreed: bool = False


class ExitDraft:
    """Decides token by token how long one draft of the exit becomes.

    Costs are in tokens that would otherwise be generated in that time.

    Args:
        acceptance: Measured acceptance rates.
        threshold: Predictions with this confidence or less are not drafted.
        row: Cost of one more row in the deep pass.
        step: Cost of that row and its shallow step.
        head: Cost of the head for the next prediction.
    """

    def __init__(
        self,
        acceptance: Acceptance,
        threshold: float,
        row: float,
        step: float,
        head: float,
    ) -> None:
        self._acceptance = acceptance
        self._threshold = threshold
        self._row = row
        self._step = step
        self._head = head
        self._probability = 1.0  # probability that all drafted tokens are accepted

    def __call__(self, prediction: Prediction) -> bool:
        """Return True if this prediction should be drafted."""
        confidence = prediction.confidence
        if confidence is None or confidence <= self._threshold:
            return False
        probability = self._probability * self._acceptance.of_confidence(confidence).value
        if probability > self._step:
            self._probability = probability
        return probability > self._step

    def continues(self) -> bool:
        """Return True if one more prediction, of average acceptance, is worth its step and head."""
        if self._probability == 1.0:
            return True
        return self._probability * self._acceptance.exit.value > self._step + self._head

    def extends(self, rate: float) -> bool:
        """Return True if a candidate of a text with this acceptance rate should be appended."""
        self._probability *= rate
        return self._probability > self._row


class Drafts:
    """Plans the drafts of one request.

    Args:
        costs: Measured costs of engine calls.
        acceptance: Measured acceptance rates, for the setting of the request.
        sources: Sources of drafts from text.
        exits: Also draft from the exit.
    """

    clock = staticmethod(perf_counter)

    def __init__(
        self,
        costs: CallCosts,
        acceptance: Acceptance,
        sources: DraftSources | None = None,
        exits: bool = True,
    ) -> None:
        self._costs = costs
        self._acceptance = acceptance
        self._sources = sources
        self._exits = exits
        self._open: list[Candidates] = []  # candidates for the next tokens
        self._looked = False  # the sources have read all final tokens
        self._continuation: Candidates | None = None  # continues a draft of the exit
        # By source: maximum length of the next draft, and True if the last one was accepted in
        # full.
        self._next: dict[str, tuple[int, bool]] = {}
        self._sequences = 1
        self._tokens = 0
        self._lost = 0.0  # time that drafts have lost
        self._call_seconds = 0.0  # duration of the last call of draft_source
        self._to_probe = 1
        self._to_time = 2
        # The last draft was the exit's, so its layers have no rows to catch up.
        self._after_exit = False
        # Time and final tokens at the last observation for the choice of the exit.
        self._choice_time = self.clock()
        self._choice_tokens = 0

    def plan(self, response: Response, most: int, sequences: int = 1) -> DraftPlan:
        """Return the next draft of at most `most` tokens, in calls shared by `sequences`."""
        self._tokens = len(response.tokens)
        self._sequences = sequences
        self._looked = False
        self._continuation = None
        # Without a measurement of mode "full", a losing draft would seem to pay.
        if most == 0 or (sequences == 1 and not self._costs.measured("pass", 1)):
            return NO_DRAFT
        if self._sources is not None and self._sources.due():
            self._observe_open(self._sources, response)
            self._looked = True
            for found in self._candidates(self._sources, most):
                self._open.append(found)
                tokens = response.within(found.tokens)
                count = self._length(found.source, found.agrees, len(tokens))
                if count:
                    self._sources.tokens_to_look = 0
                    return DraftPlan(found.source, tuple(tokens[:count]))
        return self._plan_exit(most) if self._exits else NO_DRAFT

    def observe_plain(self, shallow: float, deep: float, shared: bool) -> None:
        """Record the seconds of a token without a draft: those of its step and of its deep pass.

        Calls that are `shared` with other sequences are not measured.
        """
        self._acceptance.observe_pass(1, 1.0)
        self._after_exit = False
        self._to_time -= 1
        if not shared and (self._to_time <= 0 or not self._costs.measured("pass", 1)):
            self._to_time = RULE.timed
            self._costs.observe("step", 1, shallow)
            self._costs.observe("pass", 1, deep)
            self._observe_choice(self._tokens + 1, shared)

    def observe(
        self,
        plan: DraftPlan,
        outcome: Outcome,
        shallow: float,
        deep: float,
        shared: bool,
    ) -> None:
        """Record the outcome of a draft, and the seconds of its shallow and deep calls.

        The shallow seconds of a sequence that drafts alone include the Python between the calls.
        """
        costs = self._costs
        acceptance = self._acceptance
        rows = outcome.rows
        heads = sum(confidence is not None for confidence in outcome.confidences)
        self._observe_choice(self._tokens + outcome.made, shared)
        if not shared:
            costs.observe("pass", rows, deep)
            if plan.tokens:
                costs.observe("step", rows, shallow)
            elif heads and self._after_exit:
                # A step with the head takes at least as long as one without.
                rest = shallow - (costs.seconds("step", rows - heads) if rows > heads else 0.0)
                costs.observe("head", 1, max(rest / heads, shallow / rows))
        together = self._sequences + rows - 1
        seconds = costs.seconds("pass", together)
        if plan.tokens:
            seconds += costs.seconds("step", together)
            in_full = outcome.accept_length == outcome.proposed
            longest = 2 * outcome.proposed + 1 if in_full else max(1, outcome.accept_length)
            self._next[plan.source] = longest, in_full
        else:
            seconds += self._exit_seconds(rows, heads)
            acceptance.observe_exit_draft(outcome.made, rows, heads)
        self._after_exit = not plan.tokens
        time = seconds / costs.prices(self._sequences).token
        self._lost = max(-RULE.most_saved, self._lost + time - outcome.made)
        acceptance.observe_pass(outcome.made, time)
        # Rows with the head, up to the first rejected one.
        for row, confidence in enumerate(outcome.confidences[: outcome.accept_length + 1]):
            if confidence is not None:
                accepted = (
                    outcome.agreed if row == outcome.proposed else row < outcome.accept_length
                )
                acceptance.of_confidence(confidence).observe(accepted)
                acceptance.exit.observe(accepted)
        if self._continuation is not None and outcome.accept_length >= outcome.proposed:
            source, agreement, tokens = self._continuation
            accepted_here = outcome.accept_length - outcome.proposed
            for place in range(min(accepted_here + 1, len(tokens))):
                acceptance.of_text(source, agreement + place).observe(place < accepted_here)

    def exit_draft(self, threshold: float) -> ExitDraft:
        """Start a draft of the exit, of predictions with a confidence above `threshold`."""
        prices = self._costs.prices(self._sequences)
        tokens_per_second = self._gain / prices.token
        return ExitDraft(
            self._acceptance,
            threshold,
            row=tokens_per_second * prices.row,
            step=tokens_per_second * (prices.row + prices.step),
            head=tokens_per_second * prices.head,
        )

    def continuation(
        self,
        response: Response,
        drafted: Sequence[int],
        most: int,
        draft: ExitDraft,
    ) -> Candidates:
        """Return at most `most` tokens of a text that continue the tokens `drafted` by the exit."""
        if self._sources is None or not self._looked or most <= 0:
            return NO_CANDIDATES
        source, agreement, candidates = self._sources.after(drafted, most)
        tokens = response.within([*drafted, *candidates])[len(drafted) :]
        count = 0
        while count < len(tokens):
            if not draft.extends(self._acceptance.of_text(source, agreement + count).value):
                break
            count += 1
        self._continuation = Candidates(source, agreement, tokens[:count])
        return self._continuation

    def _observe_choice(self, tokens: int, shared: bool) -> None:
        """Record the time up to `tokens` final tokens for the choice of the exit.

        All time counts, because drafts of the exit take more calls, with Python between them.
        """
        now = self.clock()
        if not shared and self._costs.measured("pass", 1):
            time = (now - self._choice_time) / self._costs.seconds("pass", 1)
            self._acceptance.choice.observe(self._exits, time, tokens - self._choice_tokens)
        self._choice_time = now
        self._choice_tokens = tokens

    @property
    def _budget(self) -> float:
        """Time that drafts may still lose."""
        return RULE.grant + RULE.grant_share * self._tokens - self._lost

    def _candidates(self, sources: DraftSources, most: int) -> Iterator[Candidates]:
        token_seconds = self._costs.prices(self._sequences).token
        if sources.own is not None and self._call_seconds / token_seconds <= self._budget:
            began = perf_counter()
            tokens = sources.own.candidates(sources.context, most)
            self._call_seconds = perf_counter() - began
            self._lost += self._call_seconds / token_seconds
            yield Candidates(sources.own.name, 0, tokens)
        yield from sources.found(most)

    def _observe_open(self, sources: DraftSources, response: Response) -> None:
        """Update acceptance from the new final tokens, for all candidates, drafted or not."""
        final = sources.follow(response.tokens)
        for source, agreement, tokens in self._open:
            for place, (candidate, token) in enumerate(zip(tokens, final, strict=False)):
                self._acceptance.of_text(source, agreement + place).observe(candidate == token)
                if candidate != token:
                    break
                sources.unexpected = 0
        self._open = []

    def _length(self, source: str, agreement: int, count: int) -> int:
        """Return how many of `count` candidates to draft after `agreement` matching tokens."""
        if not count or (self._budget < 0 and agreement < RULE.sure_agreement):
            return 0
        longest, in_full = self._next.get(source, (RULE.first_length, False))
        costs = self._costs
        token_seconds = costs.prices(self._sequences).token
        expected = 1.0  # expected number of final tokens
        probability = 1.0  # probability that all tokens so far are accepted
        drafted = 0
        best = 0
        promise = 0.0  # speed of the best length, relative to mode "full"
        for length in RULE.lengths:
            if length > min(longest, count):
                break
            while drafted < length:
                rate = self._acceptance.of_text(source, agreement + drafted).value
                probability *= max(rate, RULE.confirmed) if in_full else rate
                expected += probability
                drafted += 1
            together = self._sequences + length
            seconds = costs.seconds("step", together) + costs.seconds("pass", together)
            speed = expected * token_seconds / seconds
            if speed > promise:
                best = length
                promise = speed
        if source != "lookup":
            return best
        exit_gain = self._exit_gain
        always_tried = agreement >= RULE.tried_agreement and not exit_gain
        return best if promise > (exit_gain or RULE.margin) or always_tried else 0

    def _plan_exit(self, most: int) -> DraftPlan:
        if self._budget < 0:
            return NO_DRAFT
        draft = DraftPlan(exits=min(RULE.lengths[-1], most))
        if self._exit_gain:
            return draft
        self._to_probe -= 1
        if self._to_probe > 0:
            return NO_DRAFT
        if self._to_probe < 0:  # second of two probes: this one is timed
            prices = self._costs.prices(self._sequences)
            share = prices.head / prices.token
            self._to_probe = max(RULE.probe_tokens, int(share / RULE.probe_share))
        return draft

    def _exit_seconds(self, rows: float, heads: float) -> float:
        """Return the seconds of a draft's shallow steps, with the head at some of them.

        All but one of the rows without the head are read together with others, in one call.
        """
        prices = self._costs.prices(self._sequences)
        return min(rows, heads + 1) * prices.step + heads * prices.head

    @property
    def _gain(self) -> float:
        """Speed of this setting relative to mode "full"."""
        return max(1.0, self._acceptance.made.value / self._acceptance.time.value)

    @property
    def _exit_gain(self) -> float:
        """Speed of the exit's drafts relative to mode "full". 0 if they do not pay."""
        if not self._exits:
            return 0.0
        prices = self._costs.prices(self._sequences)
        rows = self._acceptance.exit_rows.value
        heads = self._acceptance.exit_heads.value
        seconds = prices.deep + (rows - 1) * prices.row + self._exit_seconds(rows, heads)
        gain = self._acceptance.exit_made.value * prices.token / seconds
        return gain if gain > RULE.margin else 0.0
