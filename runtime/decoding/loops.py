"""The decode loops, one for each mode (Bae et al. 2023, section 3; docs/decoding.md).

A loop starts with `response.newest` as the next token to read: the first token, predicted after the
prompt, for a decoder-only model, and the start token for an encoder-decoder. It adds final tokens
to `response` until that is finished. Loops are coroutines (runtime/decoding/calls.py) that yield
the engine calls they wait for, and final tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple

from runtime.adaptation.learner import RequestLabels
from runtime.decoding.calls import AT_ONCE, NOTHING, Prediction, Waiting, Waits
from runtime.decoding.decoder import Decoder
from runtime.decoding.draft_sources import Candidates
from runtime.decoding.drafts import NO_DRAFT, Drafts, Outcome
from runtime.decoding.response import Response
from runtime.result import Token

Loop = Generator[Token | Waiting, None, None]
# Returns True if a shallow prediction is confident enough to be drafted.
Sure = Callable[[Prediction], bool]


def full(decoder: Decoder, response: Response) -> Loop:
    """Decode with the whole model: every token runs both engines, without the shallow head."""
    while not response.finished:
        if decoder.alone and response.greedy:
            yield AT_ONCE
            yield response.add(decoder.full_step(response.newest), False, None)
            continue
        unread = yield from _forced(decoder, response, decoder.max_pending)
        if not response.finished:
            deep = yield from _deep_token(decoder, unread)
            yield response.add(response.choose(deep), False, None, deep)


def free(
    decoder: Decoder,
    response: Response,
    threshold: float,
    max_pending: int,
    sync_every: int = 0,
    labels: RequestLabels | None = None,
) -> Loop:
    """Decode with FREE: tokens exit early if the shallow decoder is confident.

    A token whose confidence is above `threshold` exits, and its row waits on the stack. Any other
    token, or a full stack, triggers a deep pass over the stack.

    Args:
        response: Collects the tokens.
        threshold: Confidence above which a token exits.
        max_pending: Maximum number of rows on the stack.
        sync_every: With overlap, start a deep pass in the background for every `sync_every` rows. 0
            disables this.
        labels: Collects the deep prediction at every row. Requires sync_every=0.
    """
    sync_every = sync_every if decoder.overlaps else 0
    rows: list[Prediction] = []  # predictions of the stacked rows, to be labelled
    at_rest = True
    try:
        while not response.finished:
            if sync_every:
                decoder.start_sync(sync_every)
            at_rest = False
            joins = response.joins_forced and labels is None
            unread = (
                (yield from _forced(decoder, response, max_pending)) if joins else [response.newest]
            )
            if response.finished:
                return
            if decoder.alone and len(unread) == 1:
                yield AT_ONCE
                prediction = decoder.step(response.newest, head=True)
            else:
                yield from decoder.stepping_together(unread, head=True)
                prediction = decoder.shallow_prediction()
            if labels is not None:
                rows.append(prediction)
            prediction = response.constrained(prediction)
            token = response.choose(prediction)
            sure = (prediction.confidence or 0.0) > threshold
            if sure and decoder.stacked < max_pending:
                decoder.stats.exits += 1
                at_rest = True
                yield response.add(token, True, prediction.confidence, prediction)
                continue
            decoder.stats.forced += sure
            yield from decoder.syncing(len(rows) or 1)
            deep = decoder.deep_predictions()
            if labels is not None:
                labels.label(_labels(rows, deep))
                rows.clear()
            yield response.add(response.choose(deep[-1]), False, prediction.confidence, deep[-1])
    finally:
        # The rows left on the stack need one more pass to be labelled, if no call is in flight.
        if labels is not None and labels.leave([row.confidence or 0.0 for row in rows], at_rest):
            labels.label(_labels(rows, decoder.sync(len(rows))))


def _labels(
    shallow: Sequence[Prediction],
    deep: Sequence[Prediction],
) -> list[tuple[float, bool]]:
    """Return, for every row, the confidence, and True if shallow and deep tokens agree."""
    pairs = zip(shallow, deep, strict=True)
    return [(ours.confidence or 0.0, ours.token == theirs.token) for ours, theirs in pairs]


def shallow(decoder: Decoder, response: Response) -> Loop:
    """Decode with the shallow decoder only, after the prompt (static exiting)."""
    while not response.finished:
        yield from decoder.stepping(response.newest, head=True)
        prediction = response.constrained(decoder.shallow_prediction())
        decoder.drop_stack()
        decoder.stats.exits += 1
        yield response.add(response.choose(prediction), True, prediction.confidence, prediction)


def rollback(
    decoder: Decoder,
    response: Response,
    threshold: float,
    max_pending: int,
    limit: float,
) -> Loop:
    """Decode with rollback: exited tokens wait for the next deep pass.

    The first token whose deep cross-entropy exceeds `limit` nats is replaced by the deep
    prediction, and the tokens after it are discarded.
    """
    while not response.finished:
        unread = yield from _forced(decoder, response, max_pending)
        if response.finished:
            return
        most = max_pending - len(unread)
        draft = yield from _exits(decoder, response, _above(threshold), unread=unread, most=most)
        deep = yield from _verify(decoder, draft)
        tokens = draft.tokens
        uncertain = (row for row in range(len(tokens)) if not draft.certain(row))
        rejected = (row for row in uncertain if (deep[row].nll or 0.0) > limit)
        accept_length = next(rejected, len(tokens))
        correction = None
        if accept_length < len(deep):
            correction = response.choose(deep[accept_length], tokens[:accept_length])
        yield from _settle(
            decoder, response, draft, deep=deep, accept_length=accept_length, correction=correction
        )


def lossless(
    decoder: Decoder,
    response: Response,
    threshold: float,
    max_pending: int,
    drafts: Drafts,
) -> Loop:
    """Decode losslessly: accept drafted tokens that the deep decoder also chooses.

    `drafts` decides what to draft. The output equals that of `full`.
    """
    stats = decoder.stats
    while not response.finished:
        if drafts.rest and not drafts.exits and decoder.alone and response.greedy:
            drafts.rest -= 1
            yield AT_ONCE
            yield response.add(decoder.full_step(response.newest), False, None)
            continue
        unread = (
            (yield from _forced(decoder, response, max_pending))
            if response.joins_forced
            else [response.newest]
        )
        if response.finished:
            return
        plan = drafts.plan(response, max_pending - len(unread), decoder.batch_size)
        shallow_seconds = stats.shallow_seconds
        deep_seconds = stats.deep_seconds
        if plan is NO_DRAFT:
            if decoder.alone and response.greedy:
                yield AT_ONCE
                token = response.add(decoder.full_step(response.newest), False, None)
            else:
                prediction = yield from _deep_token(decoder, unread)
                token = response.add(response.choose(prediction), False, None, prediction)
            shared = decoder.batch_size > 1 or len(unread) > 1
            shallow_seconds = stats.shallow_seconds - shallow_seconds
            # Before the token is yielded: the caller's time is no cost of a token.
            drafts.observe_plain(shallow_seconds, stats.deep_seconds - deep_seconds, shared)
            yield token
            continue
        if plan.tokens:
            draft = yield from _together(
                decoder, response, plan.source, unread=unread, tokens=list(plan.tokens)
            )
        else:
            began = drafts.clock()
            alone = decoder.alone
            exit_draft = drafts.exit_draft(threshold)
            most = plan.exits
            draft = yield from _exits(
                decoder,
                response,
                exit_draft,
                unread=unread,
                most=most,
                continues=exit_draft.continues,
            )
            if not (draft.tokens and response.ends(draft.tokens)):
                most -= len(draft.tokens)
                found = drafts.continuation(response, draft.tokens, most, exit_draft)
                draft = yield from _continued(decoder, response, draft, found)
            if alone and decoder.alone:
                # Python between the calls of the exit is a part of what its drafts cost.
                shallow_seconds = stats.shallow_seconds + began - drafts.clock()
        deep = yield from _verify(decoder, draft)
        accept_length, correction = _agreement(response, draft.tokens, deep)
        made = [*draft.tokens[:accept_length], *([] if correction is None else [correction])]
        proposed = draft.proposed
        outcome = Outcome(
            rows=len(draft.predictions),
            proposed=proposed,
            accept_length=accept_length,
            made=len(made),
            confidences=tuple(row.confidence for row in draft.predictions[: proposed + 1]),
            agreed=draft.following is not None
            and made[proposed : proposed + 1] == [draft.following],
        )
        drafts.observe(
            plan,
            outcome,
            shallow=stats.shallow_seconds - shallow_seconds,
            deep=stats.deep_seconds - deep_seconds,
            shared=decoder.batch_size > 1 or len(unread) > 1,
        )
        yield from _settle(
            decoder, response, draft, deep=deep, accept_length=accept_length, correction=correction
        )


def _forced(
    decoder: Decoder, response: Response, most: int
) -> Generator[Token | Waiting, None, list[int]]:
    """Add the tokens that the grammar forces, and return the final tokens that are still unread.

    These are at most as many as fit into a deep pass of `most` rows together with the stack.
    Earlier ones are read here.
    """
    unread = [response.newest]
    while not response.finished and (token := response.forced()) is not None:
        if decoder.stacked + len(unread) == most:
            yield from decoder.stepping_together(unread)
            decoder.shallow_prediction()
            yield from decoder.syncing(heads=0)
            decoder.deep_predictions()
            unread = []
        decoder.stats.forced_tokens += 1
        unread.append(token)
        yield response.add(token, False, None, source="forced")
    return unread


def _deep_token(decoder: Decoder, unread: Sequence[int]) -> Waits[Prediction]:
    """Run both decoders on final tokens and return the deep prediction after the last one.

    The shallow head does not run.
    """
    yield from decoder.stepping_together(unread)
    decoder.shallow_prediction()
    yield from decoder.syncing(heads=1)
    return decoder.deep_predictions()[0]


class Draft(NamedTuple):
    """Shallow steps before a deep pass.

    Attributes:
        source: Where the tokens come from.
        tokens: The drafted tokens: one after each row but the last, and one after the last if it
            ends the request.
        predictions: The shallow prediction at each row, starting at the newest final token.
        following: The token that would have been drafted next. None if unknown.
        continued: Number of last tokens that come from a text instead.
        continued_by: Name of that text.
    """

    source: str
    tokens: list[int]
    predictions: list[Prediction]
    following: int | None = None
    continued: int = 0
    continued_by: str = ""

    @property
    def proposed(self) -> int:
        """Number of tokens from the source itself."""
        return len(self.tokens) - self.continued

    def certain(self, row: int) -> bool:
        """Return True if the grammar forced this token of an exit's draft, without a prediction."""
        return (
            self.source == "exit"
            and row < self.proposed
            and self.predictions[row].confidence is None
        )


def _together(
    decoder: Decoder, response: Response, source: str, unread: list[int], tokens: list[int]
) -> Waits[Draft]:
    """Draft the tokens of a text in one shallow call, without the head."""
    read = tokens[:-1] if response.ends(tokens) else tokens
    yield from decoder.stepping_together([*unread, *read])
    decoder.shallow_prediction()
    return Draft(source, tokens, [NOTHING] * (len(read) + 1))


def _continued(
    decoder: Decoder, response: Response, draft: Draft, found: Candidates
) -> Waits[Draft]:
    """Append the candidates of a text to a draft in one shallow call, without the head."""
    tokens = [*draft.tokens, *found.tokens]
    read = found.tokens[:-1] if found.tokens and response.ends(tokens) else found.tokens
    if read:
        yield from decoder.stepping_together(read)
        decoder.shallow_prediction()
    predictions = [*draft.predictions, *[NOTHING] * len(read)]
    return draft._replace(
        tokens=tokens,
        predictions=predictions,
        continued=len(found.tokens),
        continued_by=found.source,
    )


def _exits(
    decoder: Decoder,
    response: Response,
    sure: Sure,
    unread: list[int],
    most: int,
    continues: Callable[[], bool] | None = None,
) -> Waits[Draft]:
    """Draft the exit's predictions, and the tokens that the grammar forces after each.

    Stops when a prediction is not `sure`, `most` tokens are drafted, or one would end the request.
    The shallow head runs at a row if `continues()` returns True. Default: at every row, including
    the one after the last draft. A sequence that is alone drafts at once.
    """
    if decoder.alone and response.plain:
        yield AT_ONCE
        return _exits_at_once(decoder, response, sure, most=most, continues=continues)
    tokens: list[int] = []
    predictions: list[Prediction] = []
    while True:
        head = continues is None or (len(tokens) < most and continues())
        yield from decoder.stepping_together(unread, head)
        prediction = response.constrained(decoder.shallow_prediction(), tokens)
        predictions.append(prediction)
        following = None if prediction.confidence is None else response.choose(prediction, tokens)
        enough = sure(prediction)
        if following is None or not enough or len(tokens) >= most:
            decoder.stats.forced += enough
            return Draft("exit", tokens, predictions, following)
        unread = []
        while following is not None and len(tokens) < most:
            predictions += [NOTHING] * bool(unread)
            unread.append(following)
            tokens.append(following)
            if response.ends(tokens):
                if unread[:-1]:
                    yield from decoder.stepping_together(unread[:-1])
                    decoder.shallow_prediction()
                return Draft("exit", tokens, predictions)
            following = response.forced(tokens)


def _exits_at_once(
    decoder: Decoder,
    response: Response,
    sure: Sure,
    most: int,
    continues: Callable[[], bool] | None,
) -> Draft:
    """Draft like `_exits`, with fewer Python calls: no token is forced, and no other sequence runs.

    The processor's caches are cold after each engine call, so every Python call counts.
    """
    token = response.newest
    tokens: list[int] = []
    predictions: list[Prediction] = []
    while True:
        head = continues is None or (len(tokens) < most and continues())
        prediction = decoder.step(token, head)
        predictions.append(prediction)
        if not head:
            return Draft("exit", tokens, predictions)
        token = prediction.token
        enough = sure(prediction)
        if not enough or len(tokens) >= most:
            decoder.stats.forced += enough
            return Draft("exit", tokens, predictions, token)
        tokens.append(token)
        if response.ends(tokens):
            return Draft("exit", tokens, predictions)


def _verify(decoder: Decoder, draft: Draft) -> Waits[list[Prediction]]:
    """Run the deep pass over a draft and return the deep prediction at every row."""
    yield from decoder.syncing(len(draft.predictions), draft.tokens)
    return decoder.deep_predictions()


def _agreement(
    response: Response, drafts: list[int], deep: list[Prediction]
) -> tuple[int, int | None]:
    """Return how many drafts the deep decoder also chooses, and its token after them.

    The token is None if its head did not run there.
    """
    for row, prediction in enumerate(deep):
        token = response.choose(prediction, drafts[:row])
        if row == len(drafts) or token != drafts[row]:
            return row, token
    return len(drafts), None


def _settle(
    decoder: Decoder,
    response: Response,
    draft: Draft,
    deep: list[Prediction],
    accept_length: int,
    correction: int | None,
) -> Iterator[Token]:
    """Add the accepted tokens and then the deep decoder's `correction`, and trim both caches.

    `correction` is None if the whole draft is accepted and ends the request.
    """
    stats = decoder.stats
    proposed = draft.proposed
    certain = [draft.certain(row) for row in range(len(draft.tokens))]
    accepted = min(accept_length, proposed)
    stats.rejected += certain[accept_length:].count(False)
    stats.count_draft(
        draft.source, certain[:proposed].count(False), certain[:accepted].count(False)
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
        if certain[row]:
            source = "forced"
        exited = source == "exit"
        stats.exits += exited
        stats.forced_tokens += certain[row]
        confidence = draft.predictions[row].confidence
        yield response.add(draft.tokens[row], exited, confidence, deep[row], source=source)
    if correction is not None and not response.finished:
        confidence = draft.predictions[accept_length].confidence
        yield response.add(correction, False, confidence, deep[accept_length])


def _above(threshold: float) -> Sure:
    """Return a check for predictions whose confidence is above the threshold."""

    def sure(prediction: Prediction) -> bool:
        return prediction.confidence is not None and prediction.confidence > threshold

    return sure
