"""Drafts of a lossless request: when it drafts, from which source, and how many tokens.

docs/decoding.md, "When to draft", explains the rule. runtime/decoding/draft_rule.py holds its
constants.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import NamedTuple

from runtime.adaptation.call_costs import CallCosts
from runtime.decoding.draft_acceptance import Acceptance
from runtime.decoding.draft_rule import RULE
from runtime.decoding.draft_sources import (
    COUNTED,
    NO_CANDIDATES,
    Candidates,
    DraftSources,
    agreeing,
)
from runtime.decoding.exit_draft import ExitDraft
from runtime.decoding.response import Response


class DraftPlan(NamedTuple):
    """The next draft: `tokens` from a text `source`, or up to `exits` predictions of the exit."""

    source: str = "exit"
    tokens: tuple[int, ...] = ()
    exits: int = 0


NO_DRAFT = DraftPlan()


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


class Drafts:
    """Plans the drafts of one request.

    Args:
        acceptance: Measured acceptance rates, for the setting of the request.
        sources: Sources of drafts from text.
        exits: Also draft from the exit.
        exit_first: Search the text only where the exit does not pay, and after its drafts. None:
            no, and the speed of this request is not compared with that of others.
        without_exit: Measured costs of requests that skip the exit's own layers. None if there are
            no such requests.

    Attributes:
        exits: The request may draft from the exit.
        rest: Number of tokens before the text is searched again. Without `exits` they need no plan.
    """

    clock = staticmethod(perf_counter)

    def __init__(
        self,
        costs: CallCosts,
        acceptance: Acceptance,
        sources: DraftSources | None = None,
        exits: bool = True,
        without_exit: CallCosts | None = None,
        exit_first: bool | None = None,
    ) -> None:
        self._costs = costs
        self._without_exit = without_exit if exits else None
        self._acceptance = acceptance
        self._sources = sources
        self.exits = exits
        self._exit_first = exit_first
        self._open: list[Candidates] = []  # candidates for the next tokens
        self._looked = False  # the sources have read all final tokens
        self._continuation: Candidates | None = None  # continues a draft of the exit
        # By source: maximum length of the next draft, and True if the last one was accepted in
        # full.
        self._next: dict[str, tuple[int, bool]] = {}
        self._sequences = 1
        self._tokens = 0
        # Time that drafts have lost, those from text and those from the exit.
        self._lost = {"text": 0.0, "exit": 0.0}
        self._began = self.clock()  # time when the next token was planned
        # Speed of the best draft from text that was not made, relative to mode "full".
        self._alternative = 1.0
        self._call_seconds = 0.0  # duration of the last call of draft_source
        self.rest = 0
        self._to_probe = 1
        self._timed_at = 2  # number of tokens from which the next one without a draft is timed
        # The last draft was the exit's, so its layers have no rows to catch up.
        self._after_exit = False
        self._counted = 0  # tokens counted by the saving of the exit

    def plan(self, response: Response, most: int, sequences: int = 1) -> DraftPlan:
        """Return the next draft of at most `most` tokens, in calls shared by `sequences`."""
        self._began = self.clock()
        self._tokens = len(response.tokens)
        self._sequences = sequences
        self._looked = False
        self._alternative = 1.0
        self._continuation = None
        # Without a measurement of mode "full", a losing draft would seem to pay.
        if most == 0 or (sequences == 1 and not self._costs.measured("pass", 1)):
            self._timed_at = 0
            return NO_DRAFT
        if self._exit_first and self._exit_gain:
            return self._plan_exit(most)
        if self.rest:
            self.rest -= 1
        elif self._sources is not None:
            plan = self._search(self._sources, response, most)
            began = self._began
            self._began = self.clock()
            self._acceptance.search_seconds.observe(self._began - began)
            if plan is not NO_DRAFT:
                return plan
            self._acceptance.search_saved.observe(0.0)
            if self._sources.own is None:  # the caller's source is always asked
                self.rest = self._tokens_to_rest
        return self._plan_exit(most) if self.exits else NO_DRAFT

    def _search(self, sources: DraftSources, response: Response, most: int) -> DraftPlan:
        """Return a draft from text that is worth its time, or NO_DRAFT."""
        self._observe_open(sources, response)
        self._looked = True
        for found in self._candidates(sources, most):
            if not found.tokens:
                continue
            self._open.append(found)
            tokens = response.within(found.tokens)
            count = self._length(found, len(tokens))
            if count:
                return DraftPlan(found.source, tuple(tokens[:count]))
        return NO_DRAFT

    @property
    def _tokens_to_rest(self) -> int:
        """Number of tokens before the next search, after one that found nothing."""
        cost = self._acceptance.search_seconds.value / self._token_seconds
        if self._acceptance.search_saved.value > cost:
            return 0
        return min(RULE.longest_rest, int(cost / RULE.search_share))

    def observe_plain(self, shallow: float, deep: float, shared: bool) -> None:
        """Record the seconds of a token without a draft: those of its step and of its deep pass.

        Calls that are `shared` with other sequences are not measured.
        """
        if self.exits:
            self._observe_speed(1, self._token_seconds, shared)
            self._after_exit = False
        if not shared and self._tokens >= self._timed_at:
            self._timed_at = self._tokens + RULE.timed
            outside = self.clock() - self._began - shallow - deep
            self._acceptance.outside.observe(max(0.0, min(outside, shallow + deep)))
            self._costs.observe("step", 1, shallow)
            self._costs.observe("pass", 1, deep)
            self._observe_saving(1, self._own_share - 1)

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
        if not shared:
            self._costs.observe("pass", outcome.rows, deep)
        if plan.tokens:
            self._observe_text(plan.source, outcome, shallow=shallow, deep=deep, shared=shared)
        else:
            self._observe_exit(outcome, shallow=shallow, deep=deep, shared=shared)

    def _observe_text(
        self, source: str, outcome: Outcome, shallow: float, deep: float, shared: bool
    ) -> None:
        costs = self._costs
        rows = outcome.rows
        if not shared:
            costs.observe("step", rows, shallow)
        in_full = outcome.accept_length == outcome.proposed
        longest = 2 * outcome.proposed + 1 if in_full else max(1, outcome.accept_length)
        self._next[source] = longest, in_full
        self._after_exit = False
        together = self._sequences + rows - 1
        expected = costs.seconds("pass", together) + costs.seconds("step", together)
        seconds = expected if shared else self._taken(shallow + deep, expected)
        token_seconds = self._token_seconds
        # Losses are counted at average costs: one slow call says nothing about the next draft.
        self._count_loss("text", expected / token_seconds, outcome.made)
        time = seconds / token_seconds
        self._acceptance.search_saved.observe(outcome.made - (self._exit_gain or 1.0) * time)
        if self.exits:
            self._observe_speed(outcome.made, seconds, shared)
            if not shared:
                self._observe_saving(outcome.made, (self._own_share - 1) * time)

    def _observe_exit(self, outcome: Outcome, shallow: float, deep: float, shared: bool) -> None:
        costs = self._costs
        acceptance = self._acceptance
        rows = outcome.rows
        heads = sum(confidence is not None for confidence in outcome.confidences)
        if not shared and heads and self._after_exit:
            # A step with the head takes at least as long as one without.
            rest = shallow - (costs.seconds("step", rows - heads) if rows > heads else 0.0)
            costs.observe("head", 1, max(rest / heads, shallow / rows))
        self._after_exit = True
        expected = self._exit_seconds(rows, heads)
        seconds = expected if shared else self._taken(shallow + deep, expected)
        token_seconds = self._token_seconds
        self._observe_speed(outcome.made, seconds, shared)
        # Without the exit, the text would have been drafted, too, at the next token.
        own_rows = min(rows, outcome.proposed + 1)
        made = min(outcome.made, outcome.proposed + 1)
        own_seconds = self._exit_seconds(own_rows, heads)
        drafts = acceptance.exit_drafts(self._sequences)
        drafts.observe(made, own_rows, heads, seconds / expected)
        seconds -= expected - own_seconds
        self._count_loss("exit", own_seconds * self._alternative / token_seconds, made)
        if not shared:
            saved = self._own_share * made - self._alternative * seconds / token_seconds
            self._observe_saving(outcome.made, saved)
        # Rows with the head, up to the first rejected one.
        for row, confidence in enumerate(outcome.confidences[: outcome.accept_length + 1]):
            if confidence is not None:
                accepted = (
                    outcome.agreed if row == outcome.proposed else row < outcome.accept_length
                )
                acceptance.of_confidence(confidence).observe(accepted)
                acceptance.exit.observe(accepted)
        if self._continuation is not None and outcome.accept_length >= outcome.proposed:
            accepted_here = outcome.accept_length - outcome.proposed
            for place, evidence in enumerate(self._continuation.evidence[: accepted_here + 1]):
                acceptance.of_text(evidence).observe(place < accepted_here)

    def _taken(self, engines: float, expected: float) -> float:
        """Return the seconds of a draft whose engine calls took `engines` seconds."""
        return min(max(engines, self.clock() - self._began), RULE.stray * expected)

    def exit_draft(self, threshold: float) -> ExitDraft:
        """Start a draft of the exit, of predictions with a confidence above `threshold`."""
        costs = self._costs
        others = self._sequences - 1
        prices = costs.prices(self._sequences)
        tokens_per_second = self._gain / self._token_seconds
        return ExitDraft(
            self._acceptance,
            threshold,
            deep=lambda rows: tokens_per_second * costs.seconds("pass", others + rows),
            step=tokens_per_second * prices.step,
            head=tokens_per_second * prices.head,
            budget=self._budget("exit"),
        )

    def continuation(
        self,
        response: Response,
        drafted: Sequence[int],
        most: int,
        draft: ExitDraft,
    ) -> Candidates:
        """Return at most `most` tokens of a text that continue the tokens `drafted` by the exit."""
        if self._sources is None or most <= 0:
            return NO_CANDIDATES
        if not self._looked:
            self._observe_open(self._sources, response)
        found = self._sources.after(drafted, most, self._acceptance.rate)
        tokens = response.within([*drafted, *found.tokens])[len(drafted) :]
        count = draft.extension(map(self._acceptance.rate, found.evidence[: len(tokens)]))
        self._continuation = found._replace(tokens=tokens[:count], evidence=found.evidence[:count])
        return self._continuation

    def _observe_speed(self, made: int, seconds: float, shared: bool) -> None:
        """Record the final tokens and the seconds of a pass."""
        self._acceptance.observe_pass(made, seconds)
        if self._exit_first is not None and not shared:
            time = seconds / self._token_seconds
            self._acceptance.order.observe(self._exit_first, made, time)

    def _observe_saving(self, made: int, saved: float) -> None:
        """Record what the exit saved by the last `made` tokens.

        Before them were tokens without a draft, which the exit's own layers read.
        """
        if self._without_exit is not None and self._costs.measured("pass", 1):
            plain = self._tokens - self._counted
            self._acceptance.saving.observe(saved + (self._own_share - 1) * plain, plain + made)
        self._counted = self._tokens + made

    @property
    def _own_share(self) -> float:
        """Time of a token without the exit's own layers, relative to one with them.

        Compared by the cost of a deep pass, which does not depend on the exit, because requests
        without these layers may have met another load or other lengths.
        """
        without = self._without_exit
        if without is None or not without.measured("pass", 1):
            return 1.0
        step, deep = (
            self._costs.seconds(kind, 1) / without.seconds(kind, 1) for kind in ("step", "pass")
        )
        share = without.seconds("step", 1) / without.seconds("pass", 1)
        return min(1.0, (1 + share) / (1 + share * step / deep))

    def _count_loss(self, kind: str, time: float, made: int) -> None:
        """Add the loss of a draft of a kind that took the time of `time` tokens for `made`."""
        lost = self._lost[kind] + time - made
        self._lost[kind] = max(-RULE.most_saved, lost)

    def _may_lose(self, kind: str) -> bool:
        """Return True if drafts of this kind have not used up their grant."""
        return self._budget(kind) >= 0

    def _budget(self, kind: str) -> float:
        """Return the time that drafts of this kind may still lose."""
        return RULE.grant + RULE.grant_share * self._tokens - self._lost[kind]

    @property
    def _outside(self) -> float:
        """Seconds of a token outside the engines, 0 if other sequences use that time."""
        return self._acceptance.outside.value if self._sequences == 1 else 0.0

    @property
    def _token_seconds(self) -> float:
        """Seconds of a token without a draft."""
        return self._costs.prices(self._sequences).token + self._outside

    def _exit_seconds(self, rows: float, heads: float) -> float:
        """Return the expected seconds of the engine calls of a draft of the exit.

        Interpolates between whole numbers of rows.
        """
        costs = self._costs
        together = self._sequences + rows - 1
        whole = int(together)
        seconds = costs.seconds("pass", whole)
        if whole < together:
            seconds += (together - whole) * (costs.seconds("pass", whole + 1) - seconds)
        # All but one of the rows without the head are read together with others, in one call.
        prices = costs.prices(self._sequences)
        return seconds + min(rows, heads + 1) * prices.step + heads * prices.head

    def _candidates(self, sources: DraftSources, most: int) -> Iterator[Candidates]:
        own = sources.own
        if own is not None and self._call_seconds / self._token_seconds <= self._budget("text"):
            began = self.clock()
            tokens = own.candidates(sources.context, most)
            self._call_seconds = self.clock() - began
            self._lost["text"] += self._call_seconds / self._token_seconds
            yield agreeing(own.name, 0, tokens)
        yield from sources.found(most, self._acceptance.rate)

    def _observe_open(self, sources: DraftSources, response: Response) -> None:
        """Update acceptance from the new final tokens, for all candidates, drafted or not."""
        final = sources.follow(response.tokens)
        for found in self._open:
            pairs = zip(found.tokens, found.evidence, final, strict=False)
            for candidate, evidence, token in pairs:
                self._acceptance.of_text(evidence).observe(candidate == token)
                if candidate != token:
                    break
        self._open = []

    def _length(self, found: Candidates, count: int) -> int:
        """Return how many of the first `count` candidates to draft."""
        if not count:
            return 0
        source, agreement, _, evidence = found
        rate_of = self._acceptance.rate
        if source in COUNTED:
            longest = count  # a share of occurrences is known before the first
            in_full = False
            is_sure = rate_of(evidence[0]) >= RULE.confirmed
        else:
            longest, in_full = self._next.get(source, (RULE.first_length, False))
            is_sure = agreement >= RULE.sure_agreement
        if not is_sure and not self._may_lose("text"):
            return 0
        costs = self._costs
        token_seconds = self._token_seconds
        outside = self._outside
        expected = 1.0  # expected number of final tokens
        probability = 1.0  # probability that all tokens so far are accepted
        drafted = 0
        best = 0
        promise = 0.0  # speed of the best length, relative to mode "full"
        for length in RULE.lengths:
            if length > min(longest, count):
                break
            while drafted < length:
                repeats = in_full and evidence[drafted][0] == source
                rate = rate_of(evidence[drafted])
                probability *= max(rate, RULE.confirmed) if repeats else rate
                expected += probability
                drafted += 1
            together = self._sequences + length
            seconds = costs.seconds("step", together) + costs.seconds("pass", together) + outside
            speed = expected * token_seconds / seconds
            if speed > promise:
                best = length
                promise = speed
        if source != "lookup" and source not in COUNTED:
            return best
        exit_gain = self._exit_gain
        always_tried = source == "lookup" and agreement >= RULE.tried_agreement and not exit_gain
        if promise > (exit_gain or RULE.margin) or always_tried:
            return best
        self._alternative = max(self._alternative, promise)
        return 0

    def _plan_exit(self, most: int) -> DraftPlan:
        if not self._may_lose("exit"):
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

    @property
    def _gain(self) -> float:
        """Speed of this setting relative to mode "full"."""
        passes = self._acceptance.passes
        return 1.0 if passes is None else max(1.0, passes.value * self._token_seconds)

    @property
    def _exit_gain(self) -> float:
        """Speed of the exit's drafts relative to mode "full". 0 if they do not pay."""
        if not self.exits or not self._may_lose("exit"):
            return 0.0
        drafts = self._acceptance.exit_drafts(self._sequences)
        if drafts.tried:
            seconds = self._exit_seconds(drafts.rows.value, drafts.heads.value)
            time = drafts.slowness.value * seconds / self._token_seconds
        else:
            time = RULE.first_exit_draft[1]
        gain = drafts.made.value / time
        return gain if gain > RULE.margin else 0.0
