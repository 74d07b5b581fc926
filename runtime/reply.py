"""The answer to one request as it grows: its tokens, their text, and what ends it."""

from __future__ import annotations

from collections.abc import Callable, Generator

from runtime.continuation import Step
from runtime.decode import Loop
from runtime.decoder import Decoder
from runtime.result import FinishReason, GenerationResult, Stats, Token
from runtime.text_stream import TextStream
from runtime.work import Waiting

# Begins a request in a slot, which it resets first.
Start = Callable[[Decoder], Loop]


class Reply:
    """`eos` ends it, and `limit` tokens do. `cancelled` is asked after each token; `clock` in seconds; `ended` is
    called at its end, if it had a slot."""

    def __init__(
        self,
        start: Start,
        text: TextStream,
        eos: frozenset[int],
        limit: int,
        cancelled: Callable[[], bool],
        clock: Callable[[], float],
        ended: Callable[[], None] | None = None,
    ) -> None:
        self._start, self._text, self._cancelled, self._clock = start, text, cancelled, clock
        self._eos, self._limit, self._ended = eos, limit, ended
        self._steps: list[Step] = []
        self._stats = Stats()
        self._finish: FinishReason | None = None

    def run(self, decoder: Decoder) -> Generator[Token | Waiting, None, None]:
        """The tokens, to the last one, and what they wait for."""
        began = self._clock()
        steps = self._start(decoder)
        self._stats = decoder.stats
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
            self._text.finish()

    @property
    def result(self) -> GenerationResult:
        """The tokens so far; `finish_reason` is "cancelled" unless it came to its end."""
        return GenerationResult(
            text=self._text.text,
            token_ids=tuple(step.token for step in self._steps),
            exited=tuple(step.exited for step in self._steps),
            confidence=tuple(step.confidence for step in self._steps),
            finish_reason=self._finish or "cancelled",
            stats=self._stats,
            logprobs=_logprobs(self._steps),
        )

    def _accept(self, step: Step) -> Token:
        self._steps.append(step)
        self._stats.tokens = count = len(self._steps)
        token, exited, confidence, logprob = step
        if token in self._eos:
            self._finish, text = "eos", ""
        else:
            text = self._text.push(token)
            if self._text.stopped:
                self._finish = "stop"
            elif count >= self._limit:
                self._finish = "length"
            elif self._cancelled():
                self._finish = "cancelled"
        if self._finish is not None:
            text += self._text.finish()
        return Token(token, text, exited, confidence, logprob)


def _logprobs(steps: list[Step]) -> tuple[float, ...] | None:
    values = tuple(step.logprob for step in steps if step.logprob is not None)
    return values if len(values) == len(steps) and steps else None
