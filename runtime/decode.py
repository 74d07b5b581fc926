"""The decode loops: one token at a time after the prompt (Bae et al. 2023, section 3; docs/decoding.md).

Each is endless: the caller stops. `first` is what the prompt's last row says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from runtime.continuation import Continuation, Step
from runtime.decoder import Decoder, Prediction
from runtime.pace import Pace, Verdict

# Called after each sync pass with the shallow confidence and whether both decoders' arg max agree, of every row.
Observe = Callable[[Sequence[tuple[float, bool]]], None]


def full(decoder: Decoder, first: Prediction, output: Continuation) -> Iterator[Step]:
    """Decoding with the whole model: every token runs both engines, the shallow head never."""
    yield output.add(output.choose(first), False, None, first)
    while True:
        decoder.step(output.newest, head=False)
        (said,) = decoder.sync()
        yield output.add(output.choose(said), False, None, said)


def free(
    decoder: Decoder,
    first: Prediction,
    output: Continuation,
    threshold: float,
    max_pending: int,
    observe: Observe | None = None,
) -> Iterator[Step]:
    """FREE: tokens surer than `threshold` exit and wait on the stack; the others run the deep decoder over all that
    wait. A full stack of `max_pending` rows forces it."""
    yield output.add(output.choose(first), False, first.confidence, first)
    guesses: list[Prediction] = []
    while True:
        guess = decoder.step(output.newest, head=True)
        guesses.append(guess)
        if _sure(guess, threshold) and decoder.stacked < max_pending:
            decoder.stats.exits += 1
            yield output.add(output.choose(guess), True, guess.confidence, guess)
            continue
        decoder.stats.forced += _sure(guess, threshold)
        said = decoder.sync(heads=1 if observe is None else len(guesses))
        if observe is not None:
            observe([(g.confidence or 0.0, g.token == s.token) for g, s in zip(guesses, said, strict=True)])
        guesses.clear()
        yield output.add(output.choose(said[-1]), False, guess.confidence, said[-1])


def shallow(decoder: Decoder, first: Prediction, output: Continuation) -> Iterator[Step]:
    """Static exiting: after the first token, which is the deep decoder's, the shallow decoder goes on alone."""
    yield output.add(output.choose(first), False, first.confidence, first)
    while True:
        guess = decoder.step(output.newest, head=True)
        decoder.drop_stack()
        decoder.stats.exits += 1
        yield output.add(output.choose(guess), True, guess.confidence, guess)


def rollback(
    decoder: Decoder, first: Prediction, output: Continuation, threshold: float, max_pending: int, limit: float
) -> Iterator[Step]:
    """Rollback: exited tokens wait for the next sync pass. The first whose deep cross-entropy is more than `limit` nats
    gives way to the deep token, and what follows it is discarded."""
    yield output.add(output.choose(first), False, first.confidence, first)
    while True:
        drafts, guesses = _draft(decoder, output, threshold, max_pending - 1, head=True)
        said = decoder.sync(len(guesses), drafts)
        kept = next((row for row in range(len(drafts)) if (said[row].nll or 0.0) > limit), len(drafts))
        correction = output.choose(said[kept], drafts[:kept]) if kept < len(said) else None
        yield from _settle(decoder, output, Verified(drafts, guesses, said, kept, correction))


def lossless(
    decoder: Decoder, first: Prediction, output: Continuation, threshold: float, max_pending: int, pace: Pace
) -> Iterator[Step]:
    """The tokens of `full`: exited tokens are drafts, kept as far as the deep decoder chooses the same."""
    yield output.add(output.choose(first), False, first.confidence, first)
    while True:
        most, probe = pace.plan(max_pending - 1)
        shallow, deep = decoder.stats.shallow_seconds, decoder.stats.deep_seconds
        drafts, guesses = _draft(decoder, output, threshold, most, head=probe)
        said = decoder.sync(len(guesses), drafts)
        verified = Verified(drafts, guesses, said, *_agreement(output, drafts, said))
        shallow, deep = decoder.stats.shallow_seconds - shallow, decoder.stats.deep_seconds - deep
        pace.observe_costs(sum(guess.confidence is not None for guess in guesses), len(guesses), shallow, deep)
        pace.observe_drafts(_verdicts(output, threshold, verified))
        yield from _settle(decoder, output, verified)


class Verified(NamedTuple):
    """A draft after its sync pass: what both decoders said at each row, how many tokens are kept, and the deep token
    after them; None where the draft would end the request and all of it is kept."""

    drafts: list[int]
    guesses: list[Prediction]
    said: list[Prediction]
    kept: int
    correction: int | None


def _draft(
    decoder: Decoder, output: Continuation, threshold: float, most: int, head: bool
) -> tuple[list[int], list[Prediction]]:
    """Shallow steps until one is not sure, `most` tokens are drafted, or one would end the request: the tokens, and
    what the shallow decoder said at each row. `head`: ask it also at the row after the `most`-th."""
    drafts: list[int] = []
    guesses: list[Prediction] = []
    while True:
        guess = decoder.step(drafts[-1] if drafts else output.newest, head or len(drafts) < most)
        guesses.append(guess)
        if not _sure(guess, threshold) or len(drafts) == most:
            decoder.stats.forced += _sure(guess, threshold)
            return drafts, guesses
        drafts.append(output.choose(guess, drafts))
        if output.ends(drafts):
            return drafts, guesses


def _agreement(output: Continuation, drafts: list[int], said: list[Prediction]) -> tuple[int, int | None]:
    """How many drafts the deep decoder chooses too, and what it chooses after them, if it was asked."""
    for row, prediction in enumerate(said):
        token = output.choose(prediction, drafts[:row])
        if row == len(drafts) or token != drafts[row]:
            return row, token
    return len(drafts), None


def _settle(decoder: Decoder, output: Continuation, verified: Verified) -> Iterator[Step]:
    """Trim both caches to what is kept, and make it final."""
    drafts, guesses, said, kept, correction = verified
    decoder.stats.rejected += len(drafts) - kept
    surplus = len(said) - kept - (correction is not None)
    if surplus:
        decoder.trim(decoder.lengths()[1] - surplus)
    for row in range(kept):
        decoder.stats.exits += 1
        yield output.add(drafts[row], True, guesses[row].confidence, said[row])
    if correction is not None:
        yield output.add(correction, False, guesses[kept].confidence, said[kept])


def _verdicts(output: Continuation, threshold: float, verified: Verified) -> Iterator[Verdict]:
    """What is known of each row's guess, up to the first that was refused."""
    drafts, guesses, _, kept, correction = verified
    for row, guess in enumerate(guesses[: kept + 1]):
        if row < len(drafts):
            yield Verdict(True, row < kept)
        elif guess.confidence is not None:
            sure = _sure(guess, threshold)
            yield Verdict(sure, sure and output.choose(guess, drafts) == correction)


def _sure(guess: Prediction, threshold: float) -> bool:
    return guess.confidence is not None and guess.confidence > threshold
