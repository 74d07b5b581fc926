"""The decode loops: one token at a time after the prompt (Bae et al. 2023, section 3; docs/decoding.md).

Each is endless: the caller stops. `first` is what the prompt's last row says. They are coroutines
(runtime/decoding/slot_call.py): between steps they yield the engine calls that they wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple

from runtime.adaptation.draft_length import DraftLength, DraftOutcome
from runtime.decoding.decoder import Decoder, RunAhead
from runtime.decoding.output_tokens import OutputTokens, Step
from runtime.decoding.prediction import Prediction
from runtime.decoding.slot_call import Waiting, Waits
from runtime.result import Stats

Loop = Generator[Step | Waiting, None, None]

# Called after each sync pass with the shallow confidence and whether both decoders' arg max agree, of every row.
Observe = Callable[[Sequence[tuple[float, bool]]], None]
# Called at the end with the confidences of what is left on the stack, and whether no call is under way, so that a pass
# over it can be run. True asks for that pass, to be observed.
Leave = Callable[[Sequence[float], bool], bool]


def full(decoder: Decoder, first: Prediction, output: OutputTokens) -> Loop:
    """Decoding with the whole model: every token runs both engines, the shallow head never."""
    yield output.add(output.choose(first), False, None, first)
    while True:
        yield from decoder.stepping(output.newest, head=False)
        (said,) = yield from decoder.syncing(1, (), None)
        yield output.add(output.choose(said), False, None, said)


def free(
    decoder: Decoder,
    first: Prediction,
    output: OutputTokens,
    threshold: float,
    max_pending: int,
    sync_every: int = 0,
    observe: Observe | None = None,
    leave: Leave | None = None,
) -> Loop:
    """FREE: tokens surer than `threshold` exit and wait on the stack; the others run the deep decoder over all that
    wait. A full stack of `max_pending` rows forces it. Where lanes overlap, each `sync_every` rows are passed on in the
    background; 0 is never, and `observe` needs 0. `leave` is asked where the caller closes the generator."""
    yield output.add(output.choose(first), False, first.confidence, first)
    guesses: list[Prediction] = []
    at_rest = False
    try:
        while True:
            at_rest = False
            guess = yield from decoder.stepping(output.newest, head=True)
            guesses.append(guess)
            token = output.choose(guess)
            if _sure(guess, threshold) and decoder.stacked < max_pending:
                decoder.stats.exits += 1
                at_rest = True
                yield output.add(token, True, guess.confidence, guess)
                if sync_every:
                    decoder.start_sync(sync_every)
                continue
            decoder.stats.forced += _sure(guess, threshold)
            heads, ahead = 1 if observe is None else len(guesses), _run_ahead(output, threshold, [], token)
            said = yield from decoder.syncing(heads, (), ahead)
            if observe is not None:
                observe(_labels(guesses, said))
            guesses.clear()
            yield output.add(output.choose(said[-1]), False, guess.confidence, said[-1])
    except GeneratorExit:
        left = [guess.confidence or 0.0 for guess in guesses]
        if leave is not None and leave(left, at_rest) and observe is not None:
            observe(_labels(guesses, decoder.sync(len(guesses))))
        raise


def _labels(guesses: Sequence[Prediction], said: Sequence[Prediction]) -> list[tuple[float, bool]]:
    return [(guess.confidence or 0.0, guess.token == deep.token) for guess, deep in zip(guesses, said, strict=True)]


def shallow(decoder: Decoder, first: Prediction, output: OutputTokens) -> Loop:
    """Static exiting: after the first token, which is the deep decoder's, the shallow decoder goes on alone."""
    yield output.add(output.choose(first), False, first.confidence, first)
    while True:
        guess = yield from decoder.stepping(output.newest, head=True)
        decoder.drop_stack()
        decoder.stats.exits += 1
        yield output.add(output.choose(guess), True, guess.confidence, guess)


def rollback(
    decoder: Decoder, first: Prediction, output: OutputTokens, threshold: float, max_pending: int, limit: float
) -> Loop:
    """Rollback: exited tokens wait for the next sync pass. The first whose deep cross-entropy is more than `limit` nats
    gives way to the deep token, and what follows it is discarded."""
    yield output.add(output.choose(first), False, first.confidence, first)
    while True:
        draft = yield from _draft(decoder, output, threshold, max_pending - 1, head=True)
        said = yield from _verify(decoder, output, threshold, draft)
        tokens = draft.tokens
        kept = next((row for row in range(len(tokens)) if (said[row].nll or 0.0) > limit), len(tokens))
        correction = output.choose(said[kept], tokens[:kept]) if kept < len(said) else None
        yield from _settle(decoder, output, draft, said, kept, correction)


def lossless(
    decoder: Decoder, first: Prediction, output: OutputTokens, threshold: float, max_pending: int, pace: DraftLength
) -> Loop:
    """The tokens of `full`: exited tokens are drafts, kept as far as the deep decoder chooses the same."""
    yield output.add(output.choose(first), False, first.confidence, first)
    while True:
        now = pace.among(decoder.company)
        most, probe = now.plan(max_pending - 1)
        before = decoder.stats.shallow_seconds, decoder.stats.deep_seconds
        if most == 0 and not probe:
            yield from decoder.stepping(output.newest, head=False)
            (plain,) = yield from decoder.syncing(1, (), None)
            now.observe_plain(*_since(before, decoder.stats))
            yield output.add(output.choose(plain), False, None, plain)
            continue
        draft = yield from _draft(decoder, output, threshold, most, head=probe)
        said = yield from _verify(decoder, output, threshold, draft)
        kept, correction = _agreement(output, draft.tokens, said)
        tokens = kept + (correction is not None)
        now.observe_costs(draft.asked, len(said), *_since(before, decoder.stats), tokens)
        now.observe_drafts(_verdicts(draft, threshold, kept, correction))
        yield from _settle(decoder, output, draft, said, kept, correction)


def _since(before: tuple[float, float], stats: Stats) -> tuple[float, float]:
    """Seconds of both decoders' calls since they were `before`."""
    return stats.shallow_seconds - before[0], stats.deep_seconds - before[1]


class Draft(NamedTuple):
    """Shallow steps without the deep decoder: `guesses`, what was said at each row, and the `tokens` taken after the
    rows but the last; after the last too where that ends the request. `following` would be next, None where unknown."""

    tokens: list[int]
    guesses: list[Prediction]
    following: int | None

    @property
    def asked(self) -> int:
        """Rows at which the shallow head ran."""
        return sum(guess.confidence is not None for guess in self.guesses)


def _draft(decoder: Decoder, output: OutputTokens, threshold: float, most: int, head: bool) -> Waits[Draft]:
    """Until a token is not sure, `most` are drafted, or one would end the request. `head`: ask the shallow head also at
    the row after the `most`-th."""
    tokens: list[int] = []
    guesses: list[Prediction] = []
    while True:
        guess = yield from decoder.stepping(tokens[-1] if tokens else output.newest, head or len(tokens) < most)
        guesses.append(guess)
        following = None if guess.confidence is None else output.choose(guess, tokens)
        if following is None or not _sure(guess, threshold) or len(tokens) == most:
            decoder.stats.forced += _sure(guess, threshold)
            return Draft(tokens, guesses, following)
        tokens.append(following)
        if output.ends(tokens):
            return Draft(tokens, guesses, None)


def _verify(decoder: Decoder, output: OutputTokens, threshold: float, draft: Draft) -> Waits[list[Prediction]]:
    """What the deep decoder says at every row of a draft."""
    ahead = _run_ahead(output, threshold, draft.tokens, draft.following)
    return (yield from decoder.syncing(len(draft.guesses), draft.tokens, ahead))


def _run_ahead(output: OutputTokens, threshold: float, drafts: list[int], following: int | None) -> RunAhead | None:
    """Take the shallow decoder's own prediction for the next token, and go on as long as it is sure."""
    if following is None:
        return None

    def ahead(said: Prediction | None, tokens: Sequence[int]) -> int | None:
        if said is not None and not _sure(said, threshold):
            return None
        path = [*drafts, *tokens]
        token = following if said is None else output.choose(said, path)
        return None if output.ends([*path, token]) else token

    return ahead


def _agreement(output: OutputTokens, drafts: list[int], said: list[Prediction]) -> tuple[int, int | None]:
    """How many drafts the deep decoder chooses too, and what it chooses after them, if it was asked."""
    for row, prediction in enumerate(said):
        token = output.choose(prediction, drafts[:row])
        if row == len(drafts) or token != drafts[row]:
            return row, token
    return len(drafts), None


def _settle(
    decoder: Decoder, output: OutputTokens, draft: Draft, said: list[Prediction], kept: int, correction: int | None
) -> Iterator[Step]:
    """Trim both caches to the `kept` tokens, make them final, then the deep decoder's `correction`: None where all of a
    draft that ends the request is kept."""
    decoder.stats.rejected += len(draft.tokens) - kept
    surplus = len(said) - kept - (correction is not None)
    if surplus:
        decoder.trim(decoder.lengths()[1] - surplus)
    for row in range(kept):
        decoder.stats.exits += 1
        yield output.add(draft.tokens[row], True, draft.guesses[row].confidence, said[row])
    if correction is not None:
        yield output.add(correction, False, draft.guesses[kept].confidence, said[kept])


def _verdicts(draft: Draft, threshold: float, kept: int, correction: int | None) -> Iterator[DraftOutcome]:
    """What is known of each row's guess, up to the first that was refused."""
    for row in range(min(kept + 1, len(draft.guesses))):
        if row < len(draft.tokens):
            yield DraftOutcome(True, row < kept)
        elif draft.following is not None:
            sure = _sure(draft.guesses[row], threshold)
            yield DraftOutcome(sure, sure and draft.following == correction)


def _sure(guess: Prediction, threshold: float) -> bool:
    return guess.confidence is not None and guess.confidence > threshold
