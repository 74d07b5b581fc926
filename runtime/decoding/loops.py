"""The decode loops: one token at a time after the prompt (Bae et al. 2023, section 3; docs/decoding.md).

They begin where `response.newest` is the next token to read: after the prompt's own prediction of a decoder-only
model, and at the start token of an encoder-decoder, whose first token is so decided like any other. Each makes tokens
final in `response` until that is finished. They are coroutines (runtime/decoding/calls.py): between steps they
yield the engine calls that they wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from runtime.adaptation.adaptive_threshold import RequestLabels
from runtime.decoding.calls import AT_ONCE, NOTHING, Prediction, RunAhead, Waiting, Waits
from runtime.decoding.decoder import Decoder
from runtime.decoding.draft_rule import PLAIN, Drafts, Outcome
from runtime.decoding.draft_sources import Candidates
from runtime.decoding.response import Response
from runtime.result import Token

Loop = Generator[Token | Waiting, None, None]
# Whether a shallow prediction is sure enough to go on with.
Sure = Callable[[Prediction], bool]


def full(decoder: Decoder, response: Response) -> Loop:
    """Decode with the whole model: every token runs both engines, the shallow head never."""
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
    """FREE: tokens more confident than `threshold` exit and wait on the stack; the others run the deep decoder over all
    that wait. A full stack of `max_pending` rows forces it. Where engines overlap, each `sync_every` rows are passed on
    in the background; 0 is never. `labels` are told what sync passes say of every row, which needs 0."""
    sync_every = sync_every if decoder.overlaps else 0
    rows: list[Prediction] = []  # of the stack, where they are to be labelled
    at_rest = True
    try:
        while not response.finished:
            if sync_every:
                decoder.start_sync(sync_every)
            at_rest = False
            joins = response.joins_forced and labels is None
            unread = (yield from _forced(decoder, response, max_pending)) if joins else [response.newest]
            if response.finished:
                return
            if decoder.alone and len(unread) == 1:
                yield AT_ONCE
                guess = decoder.step(response.newest, head=True)
            else:
                yield from decoder.stepping_together(unread, head=True)
                guess = decoder.guess()
            if labels is not None:
                rows.append(guess)
            guess = response.judged(guess)
            token = response.choose(guess)
            sure = (guess.confidence or 0.0) > threshold
            if sure and decoder.stacked < max_pending:
                decoder.stats.exits += 1
                at_rest = True
                yield response.add(token, True, guess.confidence, guess)
                continue
            decoder.stats.forced += sure
            ahead = _run_ahead(decoder, response, partial(_above, threshold), [], token) if decoder.overlaps else None
            yield from decoder.syncing(len(rows) or 1, (), ahead)
            answers = decoder.answers()
            if labels is not None:
                labels.label(_labels(rows, answers))
                rows.clear()
            yield response.add(response.choose(answers[-1]), False, guess.confidence, answers[-1])
    finally:
        # What is left on the stack, which one pass more may tell of where no call is under way.
        if labels is not None and labels.leave([guess.confidence or 0.0 for guess in rows], at_rest):
            labels.label(_labels(rows, decoder.sync(len(rows))))


def _labels(guesses: Sequence[Prediction], answers: Sequence[Prediction]) -> list[tuple[float, bool]]:
    return [(guess.confidence or 0.0, guess.token == deep.token) for guess, deep in zip(guesses, answers, strict=True)]


def shallow(decoder: Decoder, response: Response) -> Loop:
    """Static exiting: after the prompt the shallow decoder goes on alone."""
    while not response.finished:
        yield from decoder.stepping(response.newest, head=True)
        guess = response.judged(decoder.guess())
        decoder.drop_stack()
        decoder.stats.exits += 1
        yield response.add(response.choose(guess), True, guess.confidence, guess)


def rollback(decoder: Decoder, response: Response, threshold: float, max_pending: int, limit: float) -> Loop:
    """Rollback: exited tokens wait for the next sync pass. The first whose deep cross-entropy is more than `limit` nats
    gives way to the deep token, and what follows it is discarded."""
    while not response.finished:
        unread = yield from _forced(decoder, response, max_pending)
        if response.finished:
            return
        draft = yield from _exits(decoder, response, _above(threshold), unread, max_pending - len(unread))
        deep = yield from _verify(decoder, response, partial(_above, threshold), draft)
        tokens = draft.tokens
        wrong = (row for row in range(len(tokens)) if not draft.certain(row) and (deep[row].nll or 0.0) > limit)
        kept = next(wrong, len(tokens))
        correction = response.choose(deep[kept], tokens[:kept]) if kept < len(deep) else None
        yield from _settle(decoder, response, draft, deep, kept, correction)


def lossless(decoder: Decoder, response: Response, threshold: float, max_pending: int, drafts: Drafts) -> Loop:
    """The tokens of `full`: `drafts` decides what to draft, and of that what the deep decoder chooses too is kept."""
    stats = decoder.stats
    while not response.finished:
        unread = (yield from _forced(decoder, response, max_pending)) if response.joins_forced else [response.newest]
        if response.finished:
            return
        plan = drafts.plan(response, max_pending - len(unread), decoder.batch_size)
        shallow, deep = stats.shallow_seconds, stats.deep_seconds
        if plan is PLAIN:
            if decoder.alone and response.greedy:
                yield AT_ONCE
                yield response.add(decoder.full_step(response.newest), False, None)
            else:
                prediction = yield from _deep_token(decoder, unread)
                yield response.add(response.choose(prediction), False, None, prediction)
            shared = decoder.batch_size > 1 or len(unread) > 1
            drafts.observe_plain(stats.shallow_seconds - shallow, stats.deep_seconds - deep, shared)
            continue
        if plan.tokens:
            draft = yield from _together(decoder, response, plan.source, unread, list(plan.tokens))
        else:
            chain = drafts.chain(threshold)
            draft = yield from _exits(decoder, response, chain, unread, plan.exits, chain.goes_on)
            # Where passes run beside, the exit goes on instead.
            if not decoder.overlaps and not (draft.tokens and response.ends(draft.tokens)):
                most = plan.exits - len(draft.tokens)
                draft = yield from _continued(
                    decoder, response, draft, drafts.behind(response, draft.tokens, most, chain)
                )
        answers = yield from _verify(decoder, response, partial(drafts.chain, threshold), draft)
        kept, correction = _agreement(response, draft.tokens, answers)
        confidences = tuple(guess.confidence for guess in draft.guesses[: draft.own + 1])
        behind = [*draft.tokens[:kept], correction][draft.own : draft.own + 1]
        agreed = draft.following is not None and behind == [draft.following]
        made = kept + (correction is not None)
        outcome = Outcome(len(draft.guesses), draft.own, kept, made, confidences, agreed)
        spent = stats.shallow_seconds - shallow, stats.deep_seconds - deep
        drafts.observe(plan, outcome, *spent, decoder.batch_size > 1 or len(unread) > 1)
        yield from _settle(decoder, response, draft, answers, kept, correction)


def _forced(decoder: Decoder, response: Response, most: int) -> Generator[Token | Waiting, None, list[int]]:
    """Make final what the grammar forces. Returns the final tokens that no engine has read, the newest before and
    these: at most as many as fit a pass of `most` rows with what is stacked; those before are read here."""
    unread = [response.newest]
    while not response.finished and (token := response.forced()) is not None:
        if decoder.stacked + len(unread) == most:
            yield from decoder.stepping_together(unread)
            decoder.guess()
            yield from decoder.syncing(heads=0)
            decoder.answers()
            unread = []
        decoder.stats.forced_tokens += 1
        unread.append(token)
        yield response.add(token, False, None)
    return unread


def _deep_token(decoder: Decoder, unread: Sequence[int]) -> Waits[Prediction]:
    """Both decoders on final tokens, without the shallow head: the deep prediction after the last."""
    yield from decoder.stepping_together(unread)
    decoder.guess()
    yield from decoder.syncing(heads=1)
    return decoder.answers()[0]


class Draft(NamedTuple):
    """Shallow steps without the deep decoder: `guesses`, the prediction at each row from the newest final token on, and
    the `tokens` of a `source` taken after the rows but the last; after the last too where that ends the request.
    `following` would be next, None where unknown. The last `further` tokens are of a text, the source `behind`."""

    source: str
    tokens: list[int]
    guesses: list[Prediction]
    following: int | None = None
    further: int = 0
    behind: str = ""

    @property
    def own(self) -> int:
        """Tokens of the source itself."""
        return len(self.tokens) - self.further

    def certain(self, row: int) -> bool:
        """Whether the grammar forces a token of an exit's draft: no prediction drafted it."""
        return self.source == "exit" and row < self.own and self.guesses[row].confidence is None


def _together(decoder: Decoder, response: Response, source: str, unread: list[int], tokens: list[int]) -> Waits[Draft]:
    """Draft the tokens of a source, in one shallow call without the head."""
    read = tokens[:-1] if response.ends(tokens) else tokens
    yield from decoder.stepping_together([*unread, *read])
    decoder.guess()
    return Draft(source, tokens, [NOTHING] * (len(read) + 1))


def _continued(decoder: Decoder, response: Response, draft: Draft, found: Candidates) -> Waits[Draft]:
    """Draft the tokens of a text behind those of a draft, in one shallow call without the head."""
    tokens = [*draft.tokens, *found.tokens]
    read = found.tokens[:-1] if found.tokens and response.ends(tokens) else found.tokens
    if read:
        yield from decoder.stepping_together(read)
        decoder.guess()
    guesses = [*draft.guesses, *[NOTHING] * len(read)]
    return draft._replace(tokens=tokens, guesses=guesses, further=len(found.tokens), behind=found.source)


def _exits(
    decoder: Decoder,
    response: Response,
    sure: Sure,
    unread: list[int],
    most: int,
    goes_on: Callable[[], bool] | None = None,
) -> Waits[Draft]:
    """Draft tokens that exit, and what the grammar forces after each, until one is not `sure`, `most` are drafted, or
    one would end the request. The shallow head runs where it `goes_on`; None: also at the row after the last."""
    tokens: list[int] = []
    guesses: list[Prediction] = []
    while True:
        head = goes_on is None or (len(tokens) < most and goes_on())
        yield from decoder.stepping_together(unread, head)
        guess = response.judged(decoder.guess(), tokens)
        guesses.append(guess)
        following = None if guess.confidence is None else response.choose(guess, tokens)
        enough = sure(guess)
        if following is None or not enough or len(tokens) >= most:
            decoder.stats.forced += enough
            return Draft("exit", tokens, guesses, following)
        unread = []
        while following is not None and len(tokens) < most:
            guesses += [NOTHING] * bool(unread)
            unread.append(following)
            tokens.append(following)
            if response.ends(tokens):
                if unread[:-1]:
                    yield from decoder.stepping_together(unread[:-1])
                    decoder.guess()
                return Draft("exit", tokens, guesses)
            following = response.forced(tokens)


def _verify(decoder: Decoder, response: Response, begin: Callable[[], Sure], draft: Draft) -> Waits[list[Prediction]]:
    """The deep prediction at every row of a draft."""
    ahead = _run_ahead(decoder, response, begin, draft.tokens, draft.following)
    yield from decoder.syncing(len(draft.guesses), draft.tokens, ahead)
    return decoder.answers()


def _run_ahead(
    decoder: Decoder, response: Response, begin: Callable[[], Sure], drafts: list[int], following: int | None
) -> RunAhead | None:
    """Take the shallow decoder's own prediction for the next token, and go on as long as it is as sure as what `begin`
    gives asks for."""
    if following is None or not decoder.overlaps:
        return None
    sure = begin()

    def ahead(guess: Prediction | None, tokens: Sequence[int]) -> int | None:
        path = [*drafts, *tokens]
        if guess is not None and not sure(response.judged(guess, path)):
            return None
        token = following if guess is None else response.choose(guess, path)
        # What is forced after a token is read with it, in one call.
        return None if response.ends([*path, token]) or response.forced([*path, token]) is not None else token

    return ahead


def _agreement(response: Response, drafts: list[int], answers: list[Prediction]) -> tuple[int, int | None]:
    """How many drafts the deep decoder chooses too, and what it chooses after them, if its head ran there."""
    for row, prediction in enumerate(answers):
        token = response.choose(prediction, drafts[:row])
        if row == len(drafts) or token != drafts[row]:
            return row, token
    return len(drafts), None


def _settle(
    decoder: Decoder, response: Response, draft: Draft, answers: list[Prediction], kept: int, correction: int | None
) -> Iterator[Token]:
    """Trim both caches to the `kept` tokens, make them final, then the deep decoder's `correction`: None where all of a
    draft that ends the request is kept."""
    stats, own = decoder.stats, draft.own
    exits = own if draft.source == "exit" else 0
    certain = [draft.certain(row) for row in range(len(draft.tokens))]
    stats.rejected += certain[kept:].count(False)
    stats.count_draft(draft.source, certain[:own].count(False), certain[: min(kept, own)].count(False))
    if kept >= own:  # else what is behind was not compared
        stats.count_draft(draft.behind, draft.further, kept - own)
    surplus = len(answers) - kept - (correction is not None)
    if surplus:
        decoder.trim(decoder.lengths()[1] - surplus)
    for row in range(kept):
        if response.finished:
            return
        exited = row < exits and not certain[row]
        stats.exits += exited
        stats.forced_tokens += certain[row]
        yield response.add(draft.tokens[row], exited, draft.guesses[row].confidence, answers[row])
    if correction is not None and not response.finished:
        yield response.add(correction, False, draft.guesses[kept].confidence, answers[kept])


def _above(threshold: float) -> Sure:
    """Surer than the threshold."""
    return lambda guess: guess.confidence is not None and guess.confidence > threshold
