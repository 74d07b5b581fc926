"""The rule that decides what a sequence drafts before its next deep pass.

Each step of the loop asks for a plan. The rule (docs/decoding.md, "When to draft") compares a plain
token, each proposal of a text, and the exit by one number: the expected number of tokens that
become final, minus the number of tokens that the request would otherwise generate in that time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from time import perf_counter
from typing import NamedTuple

from runtime.adaptation.call_costs import CallCosts
from runtime.decoding.acceptance import TRUST_WEIGHT_OF_EXIT, Acceptance, Trust
from runtime.decoding.calls import Prediction
from runtime.decoding.draft_sources import NO_PROPOSAL, DraftSource, Proposal
from runtime.decoding.response import Response

# Maximum number of drafted tokens.
MAX_DRAFT = 15
# Tokens that a draft must be expected to gain. Smaller gains are within the error of the estimates.
MARGIN = 0.01
# Seconds of processor time of a search for a draft from text.
SEARCH_SECONDS = 20e-6
# Share of the time that is spent on asking a source that does not pay, so that a change is noticed.
EXPLORED = 0.005
# Minimum number of tokens between two trials of an exit that does not pay.
MIN_EXIT_PAUSE = 16
# Maximum number of tokens without a search for a draft from text.
MAX_SEARCH_PAUSE = 32


class DraftPlan(NamedTuple):
    """The next draft: the tokens of a `proposal`, or up to `exits` predictions of the exit."""

    proposal: Proposal = NO_PROPOSAL
    exits: int = 0


NO_DRAFT = DraftPlan()


class Outcome(NamedTuple):
    """Outcome of a deep pass.

    Attributes:
        rows: Rows since the newest final token.
        proposed: Drafted tokens, without those that continue an exit's draft.
        accept_length: Accepted tokens, including those of the continuation.
        made: Tokens that became final.
        confidences: Confidence at each row, None if the head did not run.
        agreed: The exit's prediction after the proposed tokens was accepted, too.
    """

    rows: int
    proposed: int
    accept_length: int
    made: int
    confidences: tuple[float | None, ...] = ()
    agreed: bool = False


# A token of the deep decoder without a draft.
PLAIN_OUTCOME = Outcome(rows=1, proposed=0, accept_length=0, made=1)


class Plain:
    """Drafts nothing, as in mode full. The base of other rules."""

    clock = staticmethod(perf_counter)

    def plan(self, response: Response, room: int, sequences: int = 1) -> DraftPlan:
        """Return the next draft of at most `room` tokens, in calls shared by `sequences`."""
        return NO_DRAFT

    def keeps(self, prediction: Prediction) -> bool:
        """Return True if this prediction of the exit is drafted."""
        return False

    def continues(self, room: int) -> bool:
        """Return True if the exit's head should run at the next row.

        There is `room` for so many more tokens.
        """
        return True

    def continuation(self, response: Response, drafted: Sequence[int], room: int) -> Proposal:
        """Return at most `room` tokens of a text that continue the tokens `drafted` by the exit."""
        return NO_PROPOSAL

    def observe(
        self, plan: DraftPlan, outcome: Outcome, shallow: float, deep: float, shared: bool
    ) -> None:
        """Record the outcome of a deep pass, and the seconds of its shallow and deep calls.

        Calls that are `shared` with other sequences are not measured.
        """

    def observe_final(self) -> None:
        """Record a token of the exit that is final without a deep pass."""


class ConfidentExits(Plain):
    """Drafts predictions of the exit above a threshold: the policy of the paper.

    With threshold NEVER_EXIT it only asks the exit, for tokens that are final without verification.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold

    def plan(self, response: Response, room: int, sequences: int = 1) -> DraftPlan:
        return DraftPlan(exits=max(1, room))

    def keeps(self, prediction: Prediction) -> bool:
        return (prediction.confidence or 0.0) > self._threshold


class Drafts(Plain):
    """Plans the drafts of one request by their expected gain.

    Args:
        costs: Costs of engine calls.
        acceptance: Measured acceptance rates.
        sources: Sources of drafts from text.
        exits: Also draft from the exit.
        threshold: Predictions of the exit with this confidence or less are not drafted.
        learns: Measure costs. If not, plans depend on the request alone: neither on times nor on
            other sequences.
    """

    def __init__(
        self,
        costs: CallCosts,
        acceptance: Acceptance,
        sources: Sequence[DraftSource] = (),
        exits: bool = True,
        threshold: float = 0.0,
        learns: bool = True,
    ) -> None:
        self._learns = learns
        self._costs = costs
        self._acceptance = acceptance
        self._sources = sources
        self._exits = exits
        self._threshold = threshold
        self._trust_text = Trust()
        self._trust_exit = Trust()
        self._trust_exit_drafts = Trust(TRUST_WEIGHT_OF_EXIT)
        self._followed = 0  # final tokens that the sources have read
        self._open: list[Proposal] = []  # proposals for the next tokens
        self._continuation = NO_PROPOSAL  # continues the draft of the exit
        self._to_search = 0  # tokens before the text is searched again
        self._after_exit = False  # the last draft was the exit's
        self._finals = 0  # final tokens of the exit since the last deep pass
        self._began = 0.0  # time after the last search
        self._sequences = 1
        self._reach = 1.0  # probability that all tokens drafted by the exit are accepted
        self._rows = 1

    def plan(self, response: Response, room: int, sequences: int = 1) -> DraftPlan:
        self._sequences = sequences if self._learns else 1
        self._reach = 1.0
        self._rows = 1
        self._continuation = NO_PROPOSAL
        if self._finals and room:
            # An exit that was sure goes on: its rows wait for a deep pass in any case.
            return DraftPlan(exits=min(MAX_DRAFT, room))
        best = NO_DRAFT
        # Without a measurement of mode "full", a losing draft would seem to pay.
        measured = not self._learns or sequences > 1 or self._costs.measured("pass", 1)
        if room and measured:
            best_value = 1.0 - self._pace + MARGIN
            if self._to_search:
                self._to_search -= 1
            elif self._sources:
                best, best_value = self._search(response, room, best_value)
            if self._exits and self._tries_exit(best_value):
                best = DraftPlan(exits=min(MAX_DRAFT, room))
        self._began = self.clock()
        return best

    def _search(self, response: Response, room: int, min_value: float) -> tuple[DraftPlan, float]:
        """Return the best draft from text and its value, or NO_DRAFT and `min_value`."""
        best = NO_DRAFT
        self._follow(response)
        for source in self._sources:
            proposal = source.propose((), room)
            if not proposal.tokens:
                continue
            self._open.append(proposal)
            count = len(response.within(proposal.tokens))
            length, value = self._length(proposal.probabilities[:count])
            if value > min_value:
                min_value = value
                best = DraftPlan(_first(proposal, length))
        if best is NO_DRAFT:
            self._count_search(0.0)
        return best, min_value

    def _count_search(self, gain: float) -> None:
        """Record the tokens that a search gained, and rest if searches do not pay."""
        average = self._acceptance.search_gain
        average.observe(gain)
        share = SEARCH_SECONDS / self._token
        if average.value <= share:
            self._to_search = min(MAX_SEARCH_PAUSE, int(share / EXPLORED))

    def _tries_exit(self, min_value: float) -> bool:
        """Return True if a draft of the exit is worth more than `min_value`, or due for a trial."""
        outcomes = self._acceptance.exit_outcomes(self._sequences)
        time = self._exit_seconds(outcomes.rows.value, outcomes.heads.value) / self._token
        made = 1 + (outcomes.made.value - 1) * self._trust_exit_drafts.value
        if made - self._pace * time > min_value:
            return True
        return self._acceptance.exit_is_due(self._exit_pause)

    def _follow(self, response: Response) -> None:
        """Read new final tokens, and count which proposals they accept, drafted or not."""
        final = [token.id for token in response.tokens[self._followed :]]
        self._followed += len(final)
        for proposal in self._open:
            self._count_accepted(proposal, final)
        self._open = []
        for source in self._sources:
            source.follow(final)

    def _count_accepted(self, proposal: Proposal, final: Sequence[int]) -> None:
        """Count the tokens of a proposal that became final, up to the first that did not."""
        for token, evidence, right in zip(proposal.tokens, proposal.evidence, final, strict=False):
            rate = self._acceptance.of(evidence)
            self._trust_text.observe(rate.value, token == right)
            rate.observe(token == right)
            if token != right:
                break

    def _length(self, probabilities: Sequence[float]) -> tuple[int, float]:
        """Return how many of the first tokens of a text to draft, and the value of that."""
        costs = self._costs
        pace = self._pace
        trust = self._trust_text.value
        expected = 1.0  # expected number of final tokens
        reach = 1.0  # probability that all tokens so far are accepted
        best = 0
        best_value = -math.inf
        for length, probability in enumerate(probabilities[:MAX_DRAFT], 1):
            reach *= probability * trust
            expected += reach
            rows = self._sequences + length
            seconds = costs.seconds("step", rows) + costs.seconds("pass", rows) + self._outside
            value = expected - pace * seconds / self._token
            if value > best_value:
                best = length
                best_value = value
        return best, best_value

    def keeps(self, prediction: Prediction) -> bool:
        confidence = prediction.confidence
        if confidence is None or confidence <= self._threshold:
            return False
        evidence = self._acceptance.of_estimate("exit", confidence)
        reach = self._reach * self._acceptance.rate(evidence) * self._trust_exit.value
        prices = self._costs.prices(self._sequences)
        if reach <= self._pace * (prices.step + self._row_seconds(self._rows)) / self._token:
            return False
        self._reach = reach
        self._rows += 1
        return True

    def continues(self, room: int) -> bool:
        if room <= 0:
            return False
        prices = self._costs.prices(self._sequences)
        seconds = prices.step + prices.head + self._row_seconds(self._rows)
        reach = self._reach * self._acceptance.exit.value * self._trust_exit.value
        return reach > self._pace * seconds / self._token

    def continuation(self, response: Response, drafted: Sequence[int], room: int) -> Proposal:
        if room <= 0 or self._to_search or not self._sources:
            return NO_PROPOSAL
        best = NO_PROPOSAL
        best_value = 0.0
        self._follow(response)
        for source in self._sources:
            found = source.propose(drafted, room)
            count = len(response.within([*drafted, *found.tokens])) - len(drafted)
            reach = self._reach
            value = 0.0
            for place, probability in enumerate(found.probabilities[: max(0, count)]):
                reach *= probability * self._trust_text.value
                cost = self._pace * self._row_seconds(self._rows + place) / self._token
                value += reach - cost
                if value > best_value:
                    best_value = value
                    best = _first(found, place + 1)
        self._continuation = best
        if best is NO_PROPOSAL:
            self._count_search(0.0)
        return best

    def observe(
        self, plan: DraftPlan, outcome: Outcome, shallow: float, deep: float, shared: bool
    ) -> None:
        costs = self._costs
        acceptance = self._acceptance
        rows = outcome.rows
        heads = sum(confidence is not None for confidence in outcome.confidences)
        if self._learns and not shared:
            costs.observe("pass", rows, deep)
            if not heads:
                costs.observe("step", rows, shallow)
            elif self._after_exit:
                # The exit had no rows of other passes to catch up with. A step with the head takes
                # at least as long as one without.
                rest = shallow - (costs.seconds("step", rows - heads) if rows > heads else 0.0)
                costs.observe("head", 1, max(rest / heads, shallow / rows))
            if plan is NO_DRAFT:
                outside = self.clock() - self._began - shallow - deep
                acceptance.outside.observe(max(0.0, min(outside, shallow + deep)))
        self._after_exit = plan.exits > 0
        finals = self._finals
        self._finals = 0
        if plan.exits or finals:
            seconds = self._exit_seconds(rows + finals, heads + finals)
            # The text that continues the exit's draft would have been drafted without it, too.
            proposed = outcome.proposed if plan.exits else 0
            exit_made = finals + min(outcome.made, proposed + 1)
            outcomes = acceptance.exit_outcomes(self._sequences)
            gained = (exit_made - 1) / max(0.1, outcomes.made.value - 1)
            self._trust_exit_drafts.observe(1.0, gained)
            outcomes.observe(
                made=exit_made,
                rows=finals + min(rows, proposed + 1),
                heads=finals + heads,
            )
        else:
            together = self._sequences + rows - 1
            seconds = costs.seconds("step", together) + costs.seconds("pass", together)
            seconds += self._outside
        time = seconds / self._token
        if plan.exits:
            self._count_exits(outcome)
        elif plan.proposal.tokens:
            self._count_search(outcome.made - 1 - self._pace * (time - 1))
        made = outcome.made + finals
        acceptance.pace.observe(made, time)
        if not shared:
            # In deep passes, whose time does not depend on the exit's layers.
            acceptance.exit_choice.observe(self._exits, made, seconds / costs.seconds("pass", 1))

    def observe_final(self) -> None:
        self._finals += 1

    def _count_exits(self, outcome: Outcome) -> None:
        """Count which predictions of the exit, and of the text after it, were accepted."""
        acceptance = self._acceptance
        # Rows with the head, up to the first rejected one.
        for row, confidence in enumerate(outcome.confidences[: outcome.accept_length + 1]):
            if confidence is None:
                continue
            accepted = outcome.agreed if row == outcome.proposed else row < outcome.accept_length
            rate = acceptance.of(acceptance.of_estimate("exit", confidence))
            self._trust_exit.observe(rate.value, accepted)
            rate.observe(accepted)
            acceptance.exit.observe(accepted)
        found = self._continuation
        if found.tokens and outcome.accept_length >= outcome.proposed:
            accepted_here = outcome.accept_length - outcome.proposed
            rows = range(outcome.proposed + 1, outcome.proposed + 1 + len(found.tokens))
            cost = sum(map(self._row_seconds, rows))
            self._count_search(accepted_here - self._pace * cost / self._token)
            for place, evidence in enumerate(found.evidence[: accepted_here + 1]):
                acceptance.of(evidence).observe(place < accepted_here)

    @property
    def _pace(self) -> float:
        """Tokens that this setting generates in the time of one in mode full."""
        return max(1.0, self._acceptance.pace.value)

    @property
    def _outside(self) -> float:
        """Seconds of a token outside the engines, 0 if other sequences use that time."""
        return self._acceptance.outside.value if self._sequences == 1 else 0.0

    @property
    def _token(self) -> float:
        """Seconds of a token without a draft."""
        return self._costs.prices(self._sequences).token + self._outside

    def _row_seconds(self, rows: int) -> float:
        """Seconds of one more row of a deep pass over `rows` rows.

        Averaged over twice as many rows, because the difference of two measured costs is noisy.
        """
        costs = self._costs
        others = self._sequences - 1
        more = costs.seconds("pass", others + 2 * rows) - costs.seconds("pass", others + rows)
        return max(0.0, more / rows)

    def _exit_seconds(self, rows: float, heads: float) -> float:
        """Return the expected seconds of a draft of the exit, interpolated between whole rows."""
        costs = self._costs
        together = self._sequences + rows - 1
        whole = int(together)
        seconds = costs.seconds("pass", whole)
        if whole < together:
            seconds += (together - whole) * (costs.seconds("pass", whole + 1) - seconds)
        # All but one of the rows without the head are read together with others, in one call.
        prices = costs.prices(self._sequences)
        steps = min(rows, heads + 1) * prices.step
        return seconds + steps + heads * prices.head + self._outside

    @property
    def _exit_pause(self) -> int:
        """Number of tokens between two trials of an exit that does not pay."""
        share = self._costs.prices(self._sequences).head / self._token
        return max(MIN_EXIT_PAUSE, int(share / EXPLORED))


def _first(proposal: Proposal, count: int) -> Proposal:
    """Return the first tokens of a proposal."""
    return Proposal(
        proposal.source,
        proposal.tokens[:count],
        proposal.probabilities[:count],
        proposal.evidence[:count],
    )
