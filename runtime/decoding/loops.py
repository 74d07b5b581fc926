"""The decode loop (Bae et al. 2023, section 3; docs/decoding.md).

All modes are one loop. What differs is what it proposes before a deep pass (`drafts`), and what is
final without verification (`Policy`). The loop starts with `response.newest` as the next token to
read: the first token, predicted after the prompt, for a decoder-only model, and the start token for
an encoder-decoder. It adds final tokens to `response` until that is finished. It is a coroutine
(runtime/decoding/calls.py) that yields the engine calls it waits for, and final tokens.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

from runtime.adaptation.learner import RequestLabels
from runtime.bundle.beta import NEVER_EXIT
from runtime.decoding.calls import NOTHING, RUN_INLINE, Prediction, Waiting, Waits
from runtime.decoding.decoder import Decoder
from runtime.decoding.drafts import NO_DRAFT, PLAIN_OUTCOME, DraftPlan, Outcome, Plain
from runtime.decoding.response import Response
from runtime.result import Token

Loop = Generator[Token | Waiting, None, None]


class Policy(NamedTuple):
    """What is final without the deep decoder's agreement.

    Attributes:
        threshold: Confidence above which a prediction of the exit is final ("free").
        limit: Mode "rollback": a draft is accepted if its deep cross-entropy is at most this many
            nats, instead of if it is the deep prediction.
        max_pending: Maximum number of rows of a deep pass.
        sync_every: With overlap, start a deep pass in the background for every `sync_every` rows. 0
            disables this.
    """

    threshold: float = NEVER_EXIT
    limit: float | None = None
    max_pending: int = 16
    sync_every: int = 0


class Draft(NamedTuple):
    """Rows since the newest final token, before their deep pass.

    Attributes:
        tokens: The drafted tokens: one after each row but the last, and one after the last if it
            ends the request.
        predictions: The shallow prediction at each row, starting at the newest final token.
        source: Where the tokens come from.
        following: The token that would have been drafted next. None if unknown.
        continued: Number of last tokens that come from a text instead.
        continued_by: Name of that text.
        is_final: `following` is final without a deep pass.
    """

    tokens: list[int]
    predictions: list[Prediction]
    source: str = "exit"
    following: int | None = None
    continued: int = 0
    continued_by: str = ""
    is_final: bool = False

    @property
    def proposed(self) -> int:
        """Number of tokens from the source itself."""
        return len(self.tokens) - self.continued

    def is_forced(self, row: int) -> bool:
        """Return True if the grammar forced this token of an exit's draft, without a prediction."""
        return (
            self.source == "exit"
            and row < self.proposed
            and self.predictions[row].confidence is None
        )


def decode(
    decoder: Decoder,
    response: Response,
    drafts: Plain,
    policy: Policy,
    labels: RequestLabels | None = None,
) -> Loop:
    """Decode one request.

    Args:
        response: Collects the tokens.
        drafts: Decides what to draft.
        labels: Collects the deep prediction at every row of the exit.
    """
    max_pending = policy.max_pending
    sync_every = policy.sync_every if decoder.overlaps else 0
    stats = decoder.stats
    unlabelled: list[Prediction] = []
    at_rest = True
    try:
        while not response.finished:
            if decoder.only_sequence:
                yield RUN_INLINE
            if sync_every:
                decoder.start_sync(sync_every)
            at_rest = False
            unread = [response.newest]
            if response.joins_forced and labels is None:
                unread = yield from _forced(decoder, response, max_pending)
                if response.finished:
                    return
            room = max_pending - decoder.stacked - len(unread)
            plan = drafts.plan(response, room, decoder.batch_size)
            if plan is NO_DRAFT and labels is None:
                yield (yield from _plain(decoder, response, drafts, unread))
                continue
            shallow_seconds = stats.shallow_seconds
            deep_seconds = stats.deep_seconds
            began = drafts.clock()
            draft = yield from _propose(
                decoder, response, drafts, plan=plan, policy=policy, unread=unread, room=room
            )
            if labels is not None:
                unlabelled += draft.predictions
            if draft.is_final:
                assert draft.following is not None
                prediction = draft.predictions[-1]
                stats.exits += 1
                drafts.observe_final()
                at_rest = True
                yield response.add(draft.following, True, prediction.confidence, prediction)
                continue
            shallow_seconds = stats.shallow_seconds - shallow_seconds
            if plan.exits and decoder.only_sequence:
                # Python between the calls of the exit is a part of what its drafts cost.
                shallow_seconds = drafts.clock() - began
            rows = len(draft.predictions)
            heads = max(rows, len(unlabelled))
            verified = draft.tokens if policy.limit is not None else ()
            deep = yield from decoder.syncing(heads, verified)
            if labels is not None:
                labels.label(_labels(unlabelled, deep))
                unlabelled.clear()
            deep = deep[heads - rows :]
            accept_length, correction = _accepted(response, draft, deep, policy)
            drafts.observe(
                plan,
                _outcome(draft, accept_length, correction),
                shallow=shallow_seconds,
                deep=stats.deep_seconds - deep_seconds,
                shared=decoder.batch_size > 1 or len(unread) > 1,
            )
            yield from _settle(
                decoder, response, draft, deep, accept_length=accept_length, correction=correction
            )
    finally:
        # The rows left on the stack need one more pass to be labelled, if no call is in flight.
        if labels is not None:
            confidences = [row.confidence or 0.0 for row in unlabelled]
            if labels.leave(confidences, at_rest):
                labels.label(_labels(unlabelled, decoder.sync(len(unlabelled))))


def _plain(
    decoder: Decoder, response: Response, drafts: Plain, unread: Sequence[int]
) -> Waits[Token]:
    """Read final tokens with both decoders, and add the deep decoder's next token."""
    stats = decoder.stats
    shallow_seconds = stats.shallow_seconds
    deep_seconds = stats.deep_seconds
    yield from decoder.stepping(unread, head=False)
    (prediction,) = yield from decoder.syncing(heads=1)
    token = response.add(response.choose(prediction), False, None, prediction)
    drafts.observe(
        NO_DRAFT,
        PLAIN_OUTCOME,
        shallow=stats.shallow_seconds - shallow_seconds,
        deep=stats.deep_seconds - deep_seconds,
        shared=decoder.batch_size > 1 or len(unread) > 1,
    )
    return token


def shallow(decoder: Decoder, response: Response) -> Loop:
    """Decode with the shallow decoder only, after the prompt (static exiting)."""
    while not response.finished:
        prediction = yield from decoder.stepping((response.newest,), head=True)
        prediction = response.constrained(prediction)
        decoder.drop_stack()
        decoder.stats.exits += 1
        yield response.add(response.choose(prediction), True, prediction.confidence, prediction)


def _forced(
    decoder: Decoder, response: Response, max_rows: int
) -> Generator[Token | Waiting, None, list[int]]:
    """Add the tokens that the grammar forces, and return the final tokens that are still unread.

    These are at most as many as fit into a deep pass of `max_rows` rows together with the stack.
    Earlier ones are read here.
    """
    unread = [response.newest]
    while not response.finished and (token := response.forced()) is not None:
        if decoder.stacked + len(unread) == max_rows:
            yield from decoder.stepping(unread, head=False)
            yield from decoder.syncing(heads=0)
            unread = []
        decoder.stats.forced_tokens += 1
        unread.append(token)
        yield response.add(token, False, None, source="forced")
    return unread


def _propose(
    decoder: Decoder,
    response: Response,
    drafts: Plain,
    plan: DraftPlan,
    policy: Policy,
    unread: list[int],
    room: int,
) -> Waits[Draft]:
    """Run the shallow decoder on the `unread` tokens, and draft by the plan."""
    tokens = plan.proposal.tokens
    if not plan.exits:
        read = tokens[:-1] if tokens and response.ends(tokens) else tokens
        yield from decoder.stepping([*unread, *read], head=False)
        return Draft(tokens, [NOTHING] * (len(read) + 1), plan.proposal.source)
    draft = yield from _draft_exits(
        decoder,
        response,
        drafts,
        unread=unread,
        max_tokens=min(plan.exits, room),
        threshold=policy.threshold,
    )
    if draft.is_final or (draft.tokens and response.ends(draft.tokens)):
        return draft
    found = drafts.continuation(response, draft.tokens, room - len(draft.tokens))
    if not found.tokens:
        return draft
    tokens = [*draft.tokens, *found.tokens]
    read = found.tokens[:-1] if response.ends(tokens) else found.tokens
    if read:
        yield from decoder.stepping(read, head=False)
    return draft._replace(
        tokens=tokens,
        predictions=[*draft.predictions, *[NOTHING] * len(read)],
        continued=len(found.tokens),
        continued_by=found.source,
    )


def _draft_exits(
    decoder: Decoder,
    response: Response,
    drafts: Plain,
    unread: list[int],
    max_tokens: int,
    threshold: float,
) -> Waits[Draft]:
    """Draft the exit's predictions, and the tokens that the grammar forces after each.

    Stops at a prediction that is not worth drafting, after `max_tokens`, or at one that would
    end the request. A first prediction above the `threshold` is final.
    """
    tokens: list[int] = []
    predictions: list[Prediction] = []
    while True:
        head = not tokens or drafts.continues(max_tokens - len(tokens))
        prediction = yield from decoder.stepping(unread, head)
        prediction = response.constrained(prediction, tokens)
        predictions.append(prediction)
        if not head:
            return Draft(tokens, predictions)
        following: int | None = response.choose(prediction, tokens)
        confident = (prediction.confidence or 0.0) > threshold
        if confident and not tokens and max_tokens > 0:
            return Draft(tokens, predictions, following=following, is_final=True)
        enough = confident or drafts.keeps(prediction)
        if not enough or len(tokens) >= max_tokens:
            decoder.stats.forced += enough
            return Draft(tokens, predictions, following=following)
        unread = []
        while following is not None and len(tokens) < max_tokens:
            predictions += [NOTHING] * bool(unread)
            unread.append(following)
            tokens.append(following)
            if response.ends(tokens):
                if unread[:-1]:
                    yield from decoder.stepping(unread[:-1], head=False)
                return Draft(tokens, predictions)
            following = response.forced(tokens)


def _accepted(
    response: Response, draft: Draft, deep: Sequence[Prediction], policy: Policy
) -> tuple[int, int | None]:
    """Return how many drafted tokens are accepted, and the deep decoder's token after them.

    The token is None if its head did not run there.
    """
    tokens = draft.tokens
    for row, prediction in enumerate(deep):
        if row < len(tokens):
            confidence = draft.predictions[row].confidence if row < draft.proposed else None
            if confidence is not None and confidence > policy.threshold:
                continue
            if policy.limit is not None:
                if draft.is_forced(row) or (prediction.nll or 0.0) <= policy.limit:
                    continue
                return row, response.choose(prediction, tokens[:row])
        token = response.choose(prediction, tokens[:row])
        if row == len(tokens) or token != tokens[row]:
            return row, token
    return len(tokens), None


def _outcome(draft: Draft, accept_length: int, correction: int | None) -> Outcome:
    proposed = draft.proposed
    following: int | None = correction
    if accept_length > proposed:
        following = draft.tokens[proposed]
    return Outcome(
        rows=len(draft.predictions),
        proposed=proposed,
        accept_length=accept_length,
        made=accept_length + (correction is not None),
        confidences=tuple(row.confidence for row in draft.predictions[: proposed + 1]),
        agreed=accept_length >= proposed and draft.following == following is not None,
    )


def _settle(
    decoder: Decoder,
    response: Response,
    draft: Draft,
    deep: Sequence[Prediction],
    accept_length: int,
    correction: int | None,
) -> Iterator[Token]:
    """Add the accepted tokens and then the deep decoder's `correction`, and trim both caches.

    `correction` is None if the whole draft is accepted and ends the request.
    """
    stats = decoder.stats
    proposed = draft.proposed
    if draft.tokens:
        forced = [draft.is_forced(row) for row in range(len(draft.tokens))]
        accepted = min(accept_length, proposed)
        stats.rejected += forced[accept_length:].count(False)
        stats.count_draft(
            draft.source, forced[:proposed].count(False), forced[:accepted].count(False)
        )
        if accept_length >= proposed:  # otherwise the continuation was not checked
            stats.count_draft(draft.continued_by, draft.continued, accept_length - proposed)
    surplus = len(deep) - accept_length - (correction is not None)
    if surplus:
        decoder.trim(decoder.lengths()[1] - surplus)
    for row in range(accept_length):
        if response.finished:
            return
        source = draft.source if row < proposed else draft.continued_by
        if forced[row]:
            source = "forced"
        exited = source == "exit"
        stats.exits += exited
        stats.forced_tokens += forced[row]
        confidence = draft.predictions[row].confidence
        yield response.add(draft.tokens[row], exited, confidence, deep[row], source=source)
    if correction is not None and not response.finished:
        confidence = draft.predictions[accept_length].confidence
        yield response.add(correction, False, confidence, deep[accept_length])


def _labels(shallow: Sequence[Prediction], deep: Sequence[Prediction]) -> list[tuple[float, bool]]:
    """Return, for each row of the exit, its confidence, and True if both decoders agree."""
    return [
        (ours.confidence, ours.token == theirs.token)
        for ours, theirs in zip(shallow, deep, strict=True)
        if ours.confidence is not None
    ]
