"""A request in the scheduler: its coroutine, what that waits for, and the tokens that nobody has read yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator

from runtime.decoding.decoder import Decoder
from runtime.decoding.response import NOBODY, Caller
from runtime.decoding.slot_call import AT_ONCE, Waiting
from runtime.result import Token

# Told that a request was "queued", then that it was "refused" or has "ended", each for an error if there was one.
Observe = Callable[[str, BaseException | None], None]

# What a request does in a slot.
Run = Callable[[Decoder], Generator[Token | Waiting, None, None]]


class Task:
    """Its `caller` may end it while it waits for a slot and between pieces of its prompt; at its deadline `until` it
    leaves at the next turn, and so it does once `abandoned` is set. `told`, where it is set, is called, by whichever
    thread drives, after tokens came and at the end. `aside`: a step of it may take long, as where it runs code of its
    caller's: only the scheduler's own thread drives it. `observe` must not raise."""

    def __init__(
        self, run: Run, caller: Caller = NOBODY, aside: bool = False, observe: Observe = lambda kind, error: None
    ) -> None:
        self._run, self.caller, self.until, self.aside, self.observe = run, caller, caller.until, aside, observe
        self.told: Callable[[], None] | None = None
        self.tokens: deque[Token] = deque()
        self.abandoned, self.ended = False, False
        self.error: BaseException | None = None
        self.waits: Waiting = None
        self.since = 0  # the turn from which on it waits
        self.begun = False
        self._decoder: Decoder | None = None
        self._coroutine: Generator[Token | Waiting, None, None] | None = None

    @property
    def decoder(self) -> Decoder:
        assert self._decoder is not None
        return self._decoder

    def ready(self, whole: bool) -> bool:
        """Whether there is something to read; with `whole`, whether all of it is there."""
        return self.ended or (bool(self.tokens) and not whole)

    def begin(self, decoder: Decoder) -> None:
        self._decoder, self._coroutine = decoder, self._run(decoder)

    def advance(self, error: Exception | None = None) -> bool:
        """Go on to what it waits for next, or with an `error` of that: whether there is something. Raises its error."""
        coroutine = self._coroutine
        assert coroutine is not None
        self.begun = True
        try:
            item = next(coroutine) if error is None else coroutine.throw(error)
            while item is not AT_ONCE:
                if not isinstance(item, Token):
                    self.waits = item
                    return True
                self.tokens.append(item)
                item = next(coroutine)
        except StopIteration:
            return False
        self.waits = AT_ONCE
        return True

    def stop(self) -> None:
        """Close the coroutine, which must not touch its slot afterwards."""
        if self._coroutine is not None:
            self._coroutine.close()

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more will come, for this `error` if there was one."""
        self.waits = self._decoder = self._coroutine = None
        self.observe("ended", error)
        self.error, self.ended = error, True
        if self.told is not None:
            self.told()
