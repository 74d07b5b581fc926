"""One request: it takes a slot, decodes until something ends it, and gives the slot back."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from queue import Empty, Queue
from time import perf_counter

from runtime.continuation import Step
from runtime.decoder import Decoder
from runtime.result import FinishReason, GenerationResult, Stats, Token
from runtime.text_stream import TextStream

# Seconds between looks at whether a waiting request was cancelled.
WAIT = 0.05

# Begins a request in a slot, which it resets first.
Start = Callable[[Decoder], Iterator[Step]]


class Stream(Iterator[Token]):
    """The tokens of one request, as they become final. `result` is complete once the stream has ended, when `ended` is
    called, if it had a slot."""

    def __init__(
        self,
        slots: Queue[Decoder],
        start: Start,
        text: TextStream,
        eos: frozenset[int],
        limit: int,
        cancelled: Callable[[], bool],
        ended: Callable[[], None] | None = None,
    ) -> None:
        self._ended = ended
        self._slots, self._start, self._text, self._cancelled = slots, start, text, cancelled
        self._eos, self._limit = eos, limit
        self._steps: list[Step] = []
        self._stats = Stats()
        self._finish: FinishReason | None = None
        self._tokens = self._run()

    def __next__(self) -> Token:
        return next(self._tokens)

    def close(self) -> None:
        """End the request and give its slot back. Idempotent."""
        self._tokens.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def result(self) -> GenerationResult:
        """The tokens so far; `finish_reason` is "cancelled" unless the stream came to its end."""
        return GenerationResult(
            text=self._text.text,
            token_ids=tuple(step.token for step in self._steps),
            exited=tuple(step.exited for step in self._steps),
            confidence=tuple(step.confidence for step in self._steps),
            finish_reason=self._finish or "cancelled",
            stats=self._stats,
            logprobs=_logprobs(self._steps),
        )

    def _run(self) -> Generator[Token, None, None]:
        decoder = take(self._slots, self._cancelled)
        if decoder is None:
            return
        steps: Iterator[Step] = iter(())
        try:
            began = perf_counter()
            steps = self._start(decoder)
            self._stats = decoder.stats
            for step in steps:
                token = self._accept(step)
                self._stats.seconds += perf_counter() - began
                yield token
                if self._finish is not None:
                    return
                began = perf_counter()
        finally:
            try:
                self._end(steps)
            finally:
                self._slots.put(decoder)
                self._text.finish()
            if self._ended is not None:
                self._ended()

    def _end(self, steps: Iterator[Step]) -> None:
        """Close the loop while the slot is still its own: it may run one pass more."""
        began = perf_counter()
        if isinstance(steps, Generator):
            steps.close()
        self._stats.seconds += perf_counter() - began

    def _accept(self, step: Step) -> Token:
        self._steps.append(step)
        self._stats.tokens += 1
        text = "" if step.token in self._eos else self._text.push(step.token)
        self._finish = self._reason(step)
        if self._finish is not None:
            text += self._text.finish()
        return Token(step.token, text, step.exited, step.confidence, step.logprob)

    def _reason(self, step: Step) -> FinishReason | None:
        if step.token in self._eos:
            return "eos"
        if self._text.stopped:
            return "stop"
        if len(self._steps) >= self._limit:
            return "length"
        return "cancelled" if self._cancelled() else None


def take(slots: Queue[Decoder], cancelled: Callable[[], bool]) -> Decoder | None:
    """The next free slot; None where the request is cancelled, or the session closed, while it waits."""
    while True:
        try:
            return slots.get(timeout=WAIT)
        except Empty:
            if cancelled():
                return None


def _logprobs(steps: list[Step]) -> tuple[float, ...] | None:
    values = tuple(step.logprob for step in steps if step.logprob is not None)
    return values if len(values) == len(steps) and steps else None
