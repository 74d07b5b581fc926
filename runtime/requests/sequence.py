"""A request in the scheduler, from the queue to its end."""

from __future__ import annotations

from collections.abc import Callable

from runtime.decoding.calls import RUN_INLINE, Waiting
from runtime.decoding.decoder import Decoder
from runtime.decoding.loops import Loop
from runtime.requests.generation import Generation
from runtime.requests.metrics import Observer
from runtime.result import GenerationResult, Token


class Sequence:
    """A request with its state in the scheduler.

    Attributes:
        generation: Decodes it in a slot.
        response: Its output so far.
        waits: The engine call or event that it waits for.
        since: The turn since which it has waited.
        abandoned: Set if nobody needs it any more. It ends at the next turn.
        begun: True once it has had a slot.
        ended: True once no more tokens follow.
        error: The exception that ended it, if any.
        deliver: Called with each token, in the worker. Must not raise.
        on_end: Called at the end, in the worker. Must not raise.
        follow: Returns the request of the next prompt, if this one belongs to a list of prompts.
        follows: True for all but the first request of a list.
    """

    def __init__(self, generation: Generation, observer: Observer) -> None:
        self.generation = generation
        self.response = generation.response
        self.observer = observer
        self.number = observer.next_number()
        self.waits: Waiting = None
        self.since = 0
        self.abandoned = False
        self.begun = False
        self.ended = False
        self.error: BaseException | None = None
        self.deliver: Callable[[Token], None] | None = None
        self.on_end: Callable[[], None] | None = None
        self.follow: Callable[[], Sequence | None] | None = None
        self.follows = False
        self._delivered = False  # a token has been delivered
        self._decoder: Decoder | None = None
        self._coroutine: Loop | None = None

    @property
    def decoder(self) -> Decoder:
        """The decoder of its slot."""
        assert self._decoder is not None
        return self._decoder

    @property
    def result(self) -> GenerationResult:
        """The result so far."""
        return self.response.result

    def enter(self, decoder: Decoder) -> None:
        """Take a slot."""
        self._decoder = decoder
        self._coroutine = self.generation.run(decoder)

    def advance(self, error: Exception | None = None) -> bool:
        """Continue up to the next wait, and return False if the request has ended.

        Raises the error that ended the request.

        Args:
            error: The error of what it waited for, if that failed.
        """
        coroutine = self._coroutine
        assert coroutine is not None
        if not self.begun:
            self.begun = True
            self.observer.tell("started", self.number)
        try:
            item = next(coroutine) if error is None else coroutine.throw(error)
            while item is not RUN_INLINE:
                if not isinstance(item, Token):
                    self.waits = item
                    return True
                if not self._delivered:
                    self._delivered = True
                    self.observer.tell("first_token", self.number)
                if self.deliver is not None:
                    self.deliver(item)
                item = next(coroutine)
        except StopIteration:
            return False
        self.waits = RUN_INLINE
        return True

    def stop(self) -> None:
        """Close the coroutine, so that it no longer uses its slot."""
        if self._coroutine is not None:
            self._coroutine.close()

    def end(self, error: BaseException | None = None) -> None:
        """Called when no more tokens follow, with the `error` that ended the request."""
        self.waits = None
        self._decoder = None
        self._coroutine = None
        self.error = error
        try:
            results = self.generation.results or [self.result]
            times = self.generation.token_times or [[]]
            self.observer.ended(
                self.number, self.response.arrival, results, times=times, error=error
            )
        finally:
            on_end = self.on_end
            # Break the reference cycle of a list of prompts and its requests.
            self.on_end = None
            self.follow = None
            self.ended = True
            if on_end is not None:
                on_end()
