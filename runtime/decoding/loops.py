"""The decode loops, one for each mode (Bae et al. 2023, section 3; docs/decoding.md).

A loop starts with `response.newest` as the next token to read: the first token, predicted after the
prompt, for a decoder-only model, and the start token for an encoder-decoder. It adds final tokens
to `response` until that is finished. Loops are coroutines (runtime/decoding/calls.py) that yield
the engine calls they wait for, and final tokens.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from runtime.adaptation.learner import RequestLabels
from runtime.decoding.calls import AT_ONCE, Prediction, Waiting, Waits
from runtime.decoding.decoder import Decoder
from runtime.decoding.drafting import (
    Sure,
    agreement,
    draft_continued,
    draft_exits,
    draft_text,
    settle,
    text_at_once,
    verify,
)
from runtime.decoding.drafts import NO_DRAFT, Drafts, Outcome
from runtime.decoding.response import Response
from runtime.result import Token

Loop = Generator[Token | Waiting, None, None]


def full(decoder: Decoder, response: Response) -> Loop:
    """Decode with the whole model: every token runs both engines, without the shallow head."""
    while not response.finished:
        if decoder.alone and not response.joins_forced:
            yield AT_ONCE
            yield _token_at_once(decoder, response)
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
        draft = yield from draft_exits(
            decoder, response, _above(threshold), unread=unread, most=most
        )
        deep = yield from verify(decoder, draft)
        tokens = draft.tokens
        uncertain = (row for row in range(len(tokens)) if not draft.certain(row))
        rejected = (row for row in uncertain if (deep[row].nll or 0.0) > limit)
        accept_length = next(rejected, len(tokens))
        correction = None
        if accept_length < len(deep):
            correction = response.choose(deep[accept_length], tokens[:accept_length])
        yield from settle(
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
        if drafts.rest and not drafts.exits and decoder.alone and not response.joins_forced:
            drafts.rest -= 1
            yield AT_ONCE
            yield _token_at_once(decoder, response)
            continue
        unread = (
            (yield from _forced(decoder, response, max_pending))
            if response.joins_forced
            else [response.newest]
        )
        if response.finished:
            return
        at_once = decoder.alone and len(unread) == 1
        plan = drafts.plan(response, max_pending - len(unread), decoder.batch_size)
        shallow_seconds = stats.shallow_seconds
        deep_seconds = stats.deep_seconds
        if plan is NO_DRAFT:
            if at_once:
                yield AT_ONCE
                token = _token_at_once(decoder, response)
            else:
                prediction = yield from _deep_token(decoder, unread)
                token = response.add(response.choose(prediction), False, None, prediction)
            shared = decoder.batch_size > 1 or len(unread) > 1
            shallow_seconds = stats.shallow_seconds - shallow_seconds
            # Before the token is yielded: the caller's time is no cost of a token.
            drafts.observe_plain(shallow_seconds, stats.deep_seconds - deep_seconds, shared)
            yield token
            continue
        if plan.tokens and at_once:
            yield AT_ONCE
            yield from text_at_once(decoder, response, drafts, plan)
            continue
        if plan.tokens:
            draft = yield from draft_text(
                decoder, response, plan.source, unread=unread, tokens=list(plan.tokens)
            )
        else:
            began = drafts.clock()
            alone = decoder.alone
            exit_draft = drafts.exit_draft(threshold)
            most = plan.exits
            draft = yield from draft_exits(
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
                draft = yield from draft_continued(decoder, response, draft, found)
            if alone and decoder.alone:
                # Python between the calls of the exit is a part of what its drafts cost.
                shallow_seconds = stats.shallow_seconds + began - drafts.clock()
        deep = yield from verify(decoder, draft)
        accept_length, correction = agreement(response, draft.tokens, deep)
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
        yield from settle(
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


def _token_at_once(decoder: Decoder, response: Response) -> Token:
    """Run both decoders on the newest token and add the next one. No other sequence may run."""
    token = decoder.full_step(response.newest)
    if response.greedy:
        return response.add(token, False, None)
    prediction = decoder.answer(0)
    return response.add(response.choose(prediction), False, None, prediction)


def _deep_token(decoder: Decoder, unread: Sequence[int]) -> Waits[Prediction]:
    """Run both decoders on final tokens and return the deep prediction after the last one.

    The shallow head does not run.
    """
    yield from decoder.stepping_together(unread)
    decoder.shallow_prediction()
    yield from decoder.syncing(heads=1)
    return decoder.deep_predictions()[0]


def _above(threshold: float) -> Sure:
    """Return a check for predictions whose confidence is above the threshold."""

    def sure(prediction: Prediction) -> bool:
        return prediction.confidence is not None and prediction.confidence > threshold

    return sure
