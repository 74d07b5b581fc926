"""Drafts of a sequence: their tokens, their deep pass, and the tokens that it accepts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from runtime.decoding.calls import AT_ONCE, NOTHING, Prediction, Waits
from runtime.decoding.decoder import Decoder
from runtime.decoding.draft_sources import Candidates
from runtime.decoding.drafts import DraftPlan, Drafts, Outcome
from runtime.decoding.response import Response
from runtime.result import Token

# Returns True if a shallow prediction is confident enough to be drafted.
Sure = Callable[[Prediction], bool]


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


def _read(response: Response, tokens: Sequence[int]) -> Sequence[int]:
    """Return the drafted tokens that the decoders read: all except one that ends the request."""
    return tokens[:-1] if response.ends(tokens) else tokens


def draft_text(
    decoder: Decoder, response: Response, source: str, unread: list[int], tokens: list[int]
) -> Waits[Draft]:
    """Draft the tokens of a text in one shallow call, without the head."""
    read = _read(response, tokens)
    yield from decoder.stepping_together([*unread, *read])
    decoder.shallow_prediction()
    return Draft(source, tokens, [NOTHING] * (len(read) + 1))


def text_at_once(
    decoder: Decoder, response: Response, drafts: Drafts, plan: DraftPlan
) -> Iterator[Token]:
    """Draft the tokens of a text, verify them, and add the accepted tokens and the next one.

    Equivalent to `draft_text`, `verify` and `settle`, with fewer Python calls. No other sequence
    may run.
    """
    stats = decoder.stats
    tokens = plan.tokens
    shallow_seconds = stats.shallow_seconds
    deep_seconds = stats.deep_seconds
    deep = decoder.read_draft([response.newest, *_read(response, tokens)])
    rows = len(deep)
    predictions: list[Prediction] | None = None
    if response.plain and response.greedy:
        accept_length = 0
        while accept_length < len(tokens) and tokens[accept_length] == deep[accept_length]:
            accept_length += 1
        final = deep[: accept_length + 1]
    else:
        predictions = [decoder.answer(row) for row in range(rows)]
        accept_length, correction = agreement(response, list(tokens), predictions)
        final = [*tokens[:accept_length], *([] if correction is None else [correction])]
    made = len(final)
    drafts.observe(
        plan,
        Outcome(rows=rows, proposed=len(tokens), accept_length=accept_length, made=made),
        shallow=stats.shallow_seconds - shallow_seconds,
        deep=stats.deep_seconds - deep_seconds,
        shared=False,
    )
    stats.rejected += len(tokens) - accept_length
    stats.count_draft(plan.source, len(tokens), accept_length)
    if made < rows:
        decoder.trim(decoder.lengths()[1] - rows + made)
    for row, token in enumerate(final):
        if response.finished:
            return
        source = plan.source if row < accept_length else None
        prediction = predictions[row] if predictions else None
        yield response.add(token, False, None, prediction, source=source)


def draft_continued(
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


def draft_exits(
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
    """Draft like `draft_exits` with fewer Python calls: nothing is forced, no other sequence runs.

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


def verify(decoder: Decoder, draft: Draft) -> Waits[list[Prediction]]:
    """Run the deep pass over a draft and return the deep prediction at every row."""
    yield from decoder.syncing(len(draft.predictions), draft.tokens)
    return decoder.deep_predictions()


def agreement(
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


def settle(
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
