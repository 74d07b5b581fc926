"""The decode loops: one token at a time after the prompt (Bae et al. 2023, section 3; docs/decoding.md).

They begin where `response.newest` is the next token to read: after the prompt's own prediction of a decoder-only
model, and at the start token of an encoder-decoder, whose first token is so decided like any other. Each makes tokens
final in `response` until that is finished. They are coroutines (runtime/decoding/slot_call.py): between steps they
yield the engine calls that they wait for.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

from runtime.adaptation.adaptive_threshold import RequestLabels
from runtime.adaptation.draft_length import DraftLength, DraftOutcome
from runtime.decoding.decoder import Decoder, RunAhead
from runtime.decoding.draft_sources import NONE, Candidates, DraftSources
from runtime.decoding.prediction import Prediction
from runtime.decoding.response import Response
from runtime.decoding.slot_call import AT_ONCE, Waiting, Waits
from runtime.result import Stats, Token

Loop = Generator[Token | Waiting, None, None]


def full(decoder: Decoder, response: Response) -> Loop:
    """Decode with the whole model: every token runs both engines, the shallow head never."""
    while not response.finished:
        if decoder.alone and response.greedy:
            yield AT_ONCE
            yield response.add(decoder.full_step(response.newest), False, None)
        else:
            deep = yield from _deep_token(decoder, response)
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
            if decoder.alone:
                yield AT_ONCE
                guess = decoder.step(response.newest, head=True)
            else:
                yield from decoder.stepping(response.newest, head=True)
                guess = decoder.guess()
            token = response.choose(guess)
            sure = (guess.confidence or 0.0) > threshold
            if labels is not None:
                rows.append(guess)
            if sure and decoder.stacked < max_pending:
                decoder.stats.exits += 1
                at_rest = True
                yield response.add(token, True, guess.confidence, guess)
                continue
            decoder.stats.forced += sure
            ahead = _run_ahead(decoder, response, threshold, [], token) if decoder.overlaps else None
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
        guess = decoder.guess()
        decoder.drop_stack()
        decoder.stats.exits += 1
        yield response.add(response.choose(guess), True, guess.confidence, guess)


def rollback(decoder: Decoder, response: Response, threshold: float, max_pending: int, limit: float) -> Loop:
    """Rollback: exited tokens wait for the next sync pass. The first whose deep cross-entropy is more than `limit` nats
    gives way to the deep token, and what follows it is discarded."""
    while not response.finished:
        draft = yield from _draft(decoder, response, threshold, max_pending - 1, head=True)
        answers = yield from _verify(decoder, response, threshold, draft)
        tokens = draft.tokens
        kept = next((row for row in range(len(tokens)) if (answers[row].nll or 0.0) > limit), len(tokens))
        correction = response.choose(answers[kept], tokens[:kept]) if kept < len(answers) else None
        yield from _settle(decoder, response, draft, answers, kept, correction)


def lossless(
    decoder: Decoder,
    response: Response,
    threshold: float,
    max_pending: int,
    pace: DraftLength,
    sources: DraftSources | None = None,
    exits: bool = True,
) -> Loop:
    """The tokens of `full`: drafts are kept as far as the deep decoder chooses the same. Those of `sources` go first;
    tokens that exit follow, or are the draft where there are none."""
    pace.begin()
    while not response.finished:
        now = pace.among(decoder.batch_size)
        most, probe = now.plan(max_pending - 1) if exits else (0, False)
        found = NONE if sources is None else sources.propose(response, now, max_pending - 1)
        before = decoder.stats.shallow_seconds, decoder.stats.deep_seconds
        if most == 0 and not probe and not found.tokens:
            plain = yield from _deep_token(decoder, response)
            now.observe_plain(*_since(before, decoder.stats))
            yield response.add(response.choose(plain), False, None, plain)
            continue
        draft = yield from _draft(decoder, response, threshold, most, probe, found)
        answers = yield from _verify(decoder, response, threshold, draft)
        kept, correction = _agreement(response, draft.tokens, answers)
        tokens, seconds = kept + (correction is not None), _since(before, decoder.stats)
        now.observe_costs(draft.with_head, len(answers), *seconds, tokens, draft.together)
        now.observe_drafts(_verdicts(draft, threshold, kept, correction))
        yield from _settle(decoder, response, draft, answers, kept, correction)


def _deep_token(decoder: Decoder, response: Response) -> Waits[Prediction]:
    """Both decoders on the newest token, without the shallow head: the deep prediction."""
    yield from decoder.stepping(response.newest, head=False)
    decoder.guess()
    yield from decoder.syncing(heads=1)
    return decoder.answers()[0]


def _since(before: tuple[float, float], stats: Stats) -> tuple[float, float]:
    """Seconds of both decoders' calls since they were `before`."""
    return stats.shallow_seconds - before[0], stats.deep_seconds - before[1]


class Draft(NamedTuple):
    """Shallow steps without the deep decoder: `guesses`, the prediction at each row, and the `tokens` taken after the
    rows but the last; after the last too where that ends the request. `following` would be next, None where unknown.
    The first of the tokens, so many, were `found` by a source, and their rows one call; the others exited."""

    tokens: list[int]
    guesses: list[Prediction]
    following: int | None
    found: Candidates = NONE

    @property
    def with_head(self) -> int:
        """Rows at which the shallow head ran."""
        return sum(guess.confidence is not None for guess in self.guesses)

    @property
    def together(self) -> int:
        """Rows of the first shallow call."""
        return min(len(self.found.tokens) + 1, len(self.guesses))


def _draft(
    decoder: Decoder, response: Response, threshold: float, most: int, head: bool, found: Candidates = NONE
) -> Waits[Draft]:
    """The tokens `found`; then until a token is not sure, `most` are drafted, or one would end the request. `head`: ask
    the shallow head also at the row after the last."""
    tokens, ends = list(found.tokens), bool(found.tokens) and response.ends(found.tokens)
    guesses: list[Prediction] = []
    while True:
        if tokens and not guesses:
            read = [response.newest, *tokens[: len(tokens) - ends]]
            yield from decoder.stepping_together(read, not ends and (head or len(tokens) < most))
            guesses = decoder.guesses()
        else:
            yield from decoder.stepping(tokens[-1] if tokens else response.newest, head or len(tokens) < most)
            guesses.append(decoder.guess())
        guess = guesses[-1]
        following = None if guess.confidence is None else response.choose(guess, tokens)
        if following is None or not _sure(guess, threshold) or len(tokens) >= most:
            decoder.stats.forced += _sure(guess, threshold)
            return Draft(tokens, guesses, following, found)
        tokens.append(following)
        if response.ends(tokens):
            return Draft(tokens, guesses, None, found)


def _verify(decoder: Decoder, response: Response, threshold: float, draft: Draft) -> Waits[list[Prediction]]:
    """The deep prediction at every row of a draft."""
    ahead = _run_ahead(decoder, response, threshold, draft.tokens, draft.following)
    yield from decoder.syncing(len(draft.guesses), draft.tokens, ahead)
    return decoder.answers()


def _run_ahead(
    decoder: Decoder, response: Response, threshold: float, drafts: list[int], following: int | None
) -> RunAhead | None:
    """Take the shallow decoder's own prediction for the next token, and go on as long as it is sure."""
    if following is None or not decoder.overlaps:
        return None

    def ahead(guess: Prediction | None, tokens: Sequence[int]) -> int | None:
        if guess is not None and not _sure(guess, threshold):
            return None
        path = [*drafts, *tokens]
        token = following if guess is None else response.choose(guess, path)
        return None if response.ends([*path, token]) else token

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
    stats, found = decoder.stats, len(draft.found.tokens)
    stats.rejected += len(draft.tokens) - kept
    stats.count_draft(draft.found.source, found, min(found, kept))
    stats.count_draft("exit", len(draft.tokens) - found, max(0, kept - found))
    surplus = len(answers) - kept - (correction is not None)
    if surplus:
        decoder.trim(decoder.lengths()[1] - surplus)
    for row in range(kept):
        if response.finished:
            return
        stats.exits += row >= found
        yield response.add(draft.tokens[row], row >= found, draft.guesses[row].confidence, answers[row])
    if correction is not None and not response.finished:
        yield response.add(correction, False, draft.guesses[kept].confidence, answers[kept])


def _verdicts(draft: Draft, threshold: float, kept: int, correction: int | None) -> Iterator[DraftOutcome]:
    """What is known of each row's guess that the shallow head made, up to the first that was refused."""
    for row in range(len(draft.found.tokens), min(kept + 1, len(draft.guesses))):
        if row < len(draft.tokens):
            yield DraftOutcome(True, row < kept)
        elif draft.following is not None:
            sure = _sure(draft.guesses[row], threshold)
            yield DraftOutcome(sure, sure and draft.following == correction)


def _sure(guess: Prediction, threshold: float) -> bool:
    return guess.confidence is not None and guess.confidence > threshold
