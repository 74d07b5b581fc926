"""The tokens of one request for one reader, in a thread or an asyncio program, and requests for a list of prompts."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from collections.abc import Sequence as List
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from queue import Empty, SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING, Generic, TypeVar

from runtime.errors import BatchError
from runtime.result import GenerationResult, Stats, Token
from runtime.scheduler import Scheduler
from runtime.sequence import Sequence
from runtime.text.prompt import Prompt

if TYPE_CHECKING:
    import asyncio

# Seconds after its deadline that a caller leaves without the worker, which is late.
GRACE = 0.05

T = TypeVar("T")


class Inbox(Generic[T]):
    """Items from the worker for one thread, which waits in C, without the interpreter's lock."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[T] = SimpleQueue()
        self.put = self._queue.put
        self.empty = self._queue.empty

    def get(self, until: float = math.inf) -> T:
        """The next item; TimeoutError shortly after `until`, a time of the monotonic clock."""
        try:
            return self._queue.get(timeout=_patience(until))
        except Empty:
            raise TimeoutError from None


class AsyncInbox(Generic[T]):
    """Items from the worker for one task of an event loop."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event: asyncio.Event | None = None
        self._rung = False

    def put(self, item: T) -> None:
        """Add an item; in any thread."""
        self._items.append(item)
        loop = self._loop
        event = self._event
        if loop is not None and event is not None and not self._rung:
            self._rung = True
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(event.set)

    async def get(self, until: float = math.inf) -> T:
        """The next item; TimeoutError shortly after `until`, a time of the monotonic clock."""
        if self._event is None:
            import asyncio  # 0.1 s, and few need it

            self._event = asyncio.Event()
            self._loop = asyncio.get_running_loop()
        while True:
            self._event.clear()
            self._rung = False  # before the look at what is there: what comes after it rings
            if self._items:
                return self._items.popleft()
            if until == math.inf:
                await self._event.wait()
                continue
            import asyncio

            async with asyncio.timeout(_patience(until)):
                await self._event.wait()


class _Reader:
    """A request that has a place among the others from the start. `whole`: its tokens are not read one by one."""

    def __init__(
        self,
        scheduler: Scheduler,
        sequence: Sequence,
        put: Callable[[Token | None], None],
        whole: bool,
    ) -> None:
        self._scheduler = scheduler
        self._sequence = sequence
        self._whole = whole
        self._given = 0
        self._ended = False
        sequence.deliver = None if whole else put
        sequence.on_end = partial(put, None)
        scheduler.submit(sequence)

    def __del__(self) -> None:
        # Nothing that takes a lock: this may be anywhere. The worker ends the request.
        if hasattr(self, "_sequence"):
            self._sequence.abandoned = True

    @property
    def result(self) -> GenerationResult:
        """The tokens so far, read or not; `finish_reason` is "cancelled" or "deadline" unless the request came to its
        end."""
        return self._sequence.result

    def _take(self, token: Token | None) -> Token | None:
        """Count a token that the inbox gave; None is the end, and raises the request's error, once."""
        if token is not None:
            self._given += 1
            return token
        self._ended = True
        if self._sequence.error is not None:
            raise self._sequence.error
        return None

    def _leave(self) -> None:
        """Go without the worker, which is late: the result is what was read."""
        self._sequence.abandoned = self._ended = True
        self._sequence.response.freeze(None if self._whole else self._given)


class Stream(_Reader, Iterator[Token]):
    """The tokens of one request, as they become final. `result` is complete once the stream has ended. It is decoded
    whether or not it is read; closing the stream, or dropping it, ends it."""

    def __init__(self, scheduler: Scheduler, sequence: Sequence, whole: bool = False) -> None:
        self._inbox: Inbox[Token | None] = Inbox()
        super().__init__(scheduler, sequence, self._inbox.put, whole)

    def __next__(self) -> Token:
        token = None if self._ended else self._next()
        if token is None:
            raise StopIteration
        return token

    def drain(self) -> GenerationResult:
        """To the end, without reading the tokens one by one: the result."""
        while not self._ended:
            self._next()
        return self.result

    def close(self) -> None:
        """End the request and give its slot back. Idempotent."""
        self._sequence.abandoned = True
        if not (self._ended or self._scheduler.forked or self._scheduler.inside):
            with suppress(TimeoutError):
                while self._inbox.get(self._sequence.response.until) is not None:
                    pass
        self._ended = True

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _next(self) -> Token | None:
        try:
            if self._inbox.empty():
                self._scheduler.check()  # within a callback it would wait for itself
            token = self._inbox.get(self._sequence.response.until)
        except TimeoutError:
            self._leave()
            return None
        except BaseException:
            self._sequence.abandoned = True
            raise
        return self._take(token)


class AsyncStream(_Reader, AsyncIterator[Token]):
    """`Stream` for asyncio, for one reader of one event loop. Leaving the loop, `aclose`, or cancelling the task that
    reads ends the request."""

    def __init__(self, scheduler: Scheduler, sequence: Sequence, whole: bool = False) -> None:
        self._inbox: AsyncInbox[Token | None] = AsyncInbox()
        super().__init__(scheduler, sequence, self._inbox.put, whole)

    async def __anext__(self) -> Token:
        token = None if self._ended else await self._next()
        if token is None:
            raise StopAsyncIteration
        return token

    async def drain(self) -> GenerationResult:
        """To the end, without reading the tokens one by one: the result."""
        while not self._ended:
            await self._next()
        return self.result

    async def aclose(self) -> None:
        """End the request; its slot is free after what is decoded now. Idempotent."""
        self._sequence.abandoned = self._ended = True

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _next(self) -> Token | None:
        try:
            token = await self._inbox.get(self._sequence.response.until)
        except TimeoutError:
            self._leave()
            return None
        except BaseException:
            self._sequence.abandoned = True
            raise
        return self._take(token)


class PromptList:
    """The requests of a list of prompts. Each that leaves the queue lets the next in (`follow`), so a long list neither
    fills the queue nor keeps other callers out. `until` is the deadline of all, by the monotonic clock; `ended` is
    called once all have ended."""

    def __init__(
        self,
        make: Callable[[Prompt], Sequence],
        prompts: List[Prompt],
        until: float,
        ended: Callable[[], None],
    ) -> None:
        self._make = make
        self.until = until
        self._ended = ended
        self._context = copy_context()
        self._left = iter(list(enumerate(prompts)))
        self._made: list[Sequence | BaseException | None] = [None] * len(
            prompts
        )  # None: the deadline came first
        self.running = 0
        self._abandoned = False

    def follow(self) -> Sequence | None:
        """The request of the next prompt, made in the context of who asked; those of which no request can be made fail
        individually."""
        return self._context.run(self._next)

    def _next(self) -> Sequence | None:
        for number, prompt in self._left:
            if monotonic() >= self.until or self._abandoned:
                return None
            try:
                sequence = self._make(prompt)
            except BaseException as error:
                self._made[number] = error
                if isinstance(error, Exception):
                    continue
                return None  # an interruption ends the list
            sequence.follow = self.follow
            sequence.on_end = self._end
            sequence.follows = self.running > 0
            self._made[number] = sequence
            if sequence.follows:
                sequence.observer.tell("queued", sequence.number)
            self.running += 1
            return sequence
        return None

    def _end(self) -> None:
        self.running -= 1
        if not self.running:
            self._ended()

    def abandon(self) -> None:
        self._abandoned = True
        for sequence in self._made:
            if isinstance(sequence, Sequence):
                sequence.abandoned = True

    def results(self) -> list[GenerationResult]:
        """In the order of the prompts; of those that have not ended, what is there. Raises BatchError, with all that
        there is, where any failed."""
        self.abandon()
        found = [_outcome(each) for each in self._made]
        failed = [
            (number, each) for number, each in enumerate(found) if isinstance(each, BaseException)
        ]
        for _, error in failed:
            if not isinstance(error, Exception):
                raise error  # a callback ended more than its request
        if failed:
            number, error = failed[0]
            raise BatchError(
                f"{len(failed)} of {len(found)} prompts failed, the first of them prompt {number}: "
                f"{type(error).__name__}: {error}; the exception's results have the others",
                list(found),
            )
        return [each for each in found if isinstance(each, GenerationResult)]


def _outcome(made: Sequence | BaseException | None) -> GenerationResult | BaseException:
    if made is None:
        return GenerationResult("", (), (), (), "deadline", Stats())
    if isinstance(made, BaseException):
        return made
    if not made.ended:
        made.response.freeze()
    return made.result if made.error is None else made.error


def _patience(until: float) -> float | None:
    """Seconds that a caller with a deadline, by the monotonic clock, waits; None is without limit."""
    return None if until == math.inf else max(0.0, until + GRACE - monotonic())
