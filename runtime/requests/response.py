"""The answer to one request as it grows: its tokens, their text, and what ends it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Generator
from time import monotonic

from runtime.decoding.decoder import Decoder
from runtime.decoding.loops import Loop
from runtime.decoding.output_tokens import Step
from runtime.decoding.slot_call import Waiting
from runtime.result import FinishReason, GenerationResult, Stats, Token
from runtime.scheduling.ending import Ending
from runtime.text.detokenizer import Detokenizer

# Begins a request in a slot, which it resets first.
Start = Callable[[Decoder], Loop]


class Response:
    """`eos` ends it, and `limit` tokens do, and what `ending` says after each token. It was asked for at `asked` by the
    monotonic clock; `clock` in seconds; `ended` is called at its end, if it had a slot."""

    def __init__(
        self,
        start: Start,
        text: Detokenizer,
        eos: frozenset[int],
        limit: int,
        ending: Ending,
        asked: float,
        clock: Callable[[], float],
        ended: Callable[[], None] | None = None,
    ) -> None:
        self._start, self._text, self._ending, self._clock = start, text, ending, clock
        self._eos, self._limit, self._ended, self._asked = eos, limit, ended, asked
        self._tokens: list[Token] = []
        self._rest = ""  # text that was withheld when it was cut short
        self._stats = Stats()
        self._finish: FinishReason | None = None
        self._left: GenerationResult | None = None

    def run(self, decoder: Decoder) -> Generator[Token | Waiting, None, None]:
        """The tokens, to the last one, and what they wait for."""
        began = self._clock()
        steps = self._start(decoder)
        self._stats = decoder.stats
        self._stats.queue_seconds = monotonic() - self._asked
        try:
            for item in steps:
                if not isinstance(item, Step):
                    yield item
                    continue
                token = self._accept(item)
                self._stats.seconds = self._clock() - began
                yield token
                if self._finish is not None:
                    return
        finally:
            # While the slot is still its own: the loop may run one pass more.
            before = self._clock()
            steps.close()
            self._stats.seconds += self._clock() - before
            if self._ended is not None:
                self._ended()
            self.end()
            self._rest = self._text.finish()

    def end(self) -> None:
        """Nothing more will come: say why, unless it came to its end."""
        if self._finish is None:
            self._finish = self._ending.reason or "cancelled"

    def leave(self) -> GenerationResult:
        """Stop waiting for it at its deadline: the tokens so far, and what comes later is not seen any more."""
        if self._left is None:
            tokens = tuple(self._tokens)
            # Whoever drives may go on writing to them.
            counts = dict(self._stats.sync_sizes), dict(self._stats.sync_seconds)
            stats = dataclasses.replace(self._stats, tokens=len(tokens), sync_seconds=counts[1])
            stats.sync_sizes = Counter(counts[0])
            self._left = _result(tokens, "", "deadline", stats)
        return self._left

    @property
    def result(self) -> GenerationResult:
        """The tokens so far; `finish_reason` is "cancelled" or "deadline" unless it came to its end."""
        if self._left is not None:
            return self._left
        reason = self._finish or self._ending.reason or "cancelled"
        return _result(tuple(self._tokens), self._rest, reason, self._stats)

    def tokens_from(self, number: int) -> list[Token]:
        """Those of the result from this one on."""
        return self._tokens[number : len(self.result.token_ids)]

    def _accept(self, step: Step) -> Token:
        id_, exited, confidence, logprob = step
        count = len(self._tokens) + 1
        if id_ in self._eos:
            self._finish, text = "eos", ""
        else:
            text = self._text.push(id_)
            if self._text.stopped:
                self._finish = "stop"
            elif count >= self._limit:
                self._finish = "length"
            else:
                self._finish = self._ending.reason
        if self._finish is not None:
            text += self._text.finish()
        token = Token(id_, text, exited, confidence, logprob)
        self._tokens.append(token)
        self._stats.tokens = count
        if count == 1:
            self._stats.first_token_seconds = monotonic() - self._asked
        return token


def _result(tokens: tuple[Token, ...], rest: str, reason: FinishReason, stats: Stats) -> GenerationResult:
    logprobs = tuple(token.logprob for token in tokens if token.logprob is not None)
    return GenerationResult(
        text="".join(token.text for token in tokens) + rest,
        token_ids=tuple(token.id for token in tokens),
        exited=tuple(token.exited for token in tokens),
        confidence=tuple(token.confidence for token in tokens),
        finish_reason=reason,
        stats=stats,
        logprobs=logprobs if tokens and len(logprobs) == len(tokens) else None,
    )
