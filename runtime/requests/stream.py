"""Readers of one request's tokens, for threads and asyncio, and requests for a list of prompts."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping
from collections.abc import Sequence as List
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from numbers import Integral
from queue import Empty, SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from runtime.errors import BatchError
from runtime.requests.scheduler import Scheduler
from runtime.requests.sequence import Sequence
from runtime.result import GenerationResult, Segment, Stats, Token
from runtime.text.prompt import Prompt

if TYPE_CHECKING:
    import asyncio

# Seconds after its deadline at which a caller returns without waiting for the worker.
GRACE = 0.05

T = TypeVar("T")


class Inbox(Generic[T]):
    """Items from the worker for one thread, which waits in C code, without the GIL."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[T] = SimpleQueue()
        self.put = self._queue.put
        self.empty = self._queue.empty

    def get(self, until: float = math.inf) -> T:
        """Return the next item.

        Raises:
            TimeoutError: Shortly after `until`, a time of the monotonic clock.
        """
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
        """Add an item. Callable from any thread."""
        self._items.append(item)
        loop = self._loop
        event = self._event
        if loop is not None and event is not None and not self._rung:
            self._rung = True
            with suppress(RuntimeError):  # the loop is closed, so nobody waits
                loop.call_soon_threadsafe(event.set)

    async def get(self, until: float = math.inf) -> T:
        """Return the next item.

        Raises:
            TimeoutError: Shortly after `until`, a time of the monotonic clock.
        """
        if self._event is None:
            import asyncio  # takes 0.1 s, and few programs need it

            self._event = asyncio.Event()
            self._loop = asyncio.get_running_loop()
        while True:
            self._event.clear()
            # Reset before checking for items, so that any later item sets the event.
            self._rung = False
            if self._items:
                return self._items.popleft()
            if until == math.inf:
                await self._event.wait()
                continue
            import asyncio

            async with asyncio.timeout(_patience(until)):
                await self._event.wait()


class _Reader:
    """Reads a request, which is submitted at once.

    Args:
        scheduler: Decodes the request.
        sequence: The request.
        put: Receives the tokens, and None at the end.
        whole: Do not deliver tokens one by one.
    """

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
        # Must not take a lock, because this can run anywhere. The worker ends the request.
        if hasattr(self, "_sequence"):
            self._sequence.abandoned = True

    @property
    def result(self) -> GenerationResult:
        """The tokens so far, including those not read yet.

        `finish_reason` is "cancelled" or "deadline" until the request has ended by itself.
        """
        return self._sequence.result

    def _take(self, token: Token | None) -> Token | None:
        """Count a token from the inbox. At the end, None, raise the request's error, once."""
        if token is not None:
            self._given += 1
            return token
        self._ended = True
        if self._sequence.error is not None:
            raise self._sequence.error
        return None

    def _leave(self) -> None:
        """Stop waiting for the worker, which is late. The result has the tokens read so far."""
        self._sequence.abandoned = self._ended = True
        self._sequence.response.freeze(None if self._whole else self._given)


class Stream(_Reader, Iterator[Token]):
    """Iterator over the tokens of one request, as they become final.

    The request is decoded whether or not its tokens are read. Closing or dropping the stream ends
    the request. `result` is complete once the stream has ended.
    """

    def __init__(self, scheduler: Scheduler, sequence: Sequence, whole: bool = False) -> None:
        self._inbox: Inbox[Token | None] = Inbox()
        super().__init__(scheduler, sequence, self._inbox.put, whole)

    def __next__(self) -> Token:
        token = None if self._ended else self._next()
        if token is None:
            raise StopIteration
        return token

    def drain(self) -> GenerationResult:
        """Wait for the end without reading tokens one by one, and return the result."""
        while not self._ended:
            self._next()
        return self.result

    def close(self) -> None:
        """End the request and free its slot. Idempotent."""
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
                self._scheduler.check()  # refuses to wait within a callback of the request itself
            token = self._inbox.get(self._sequence.response.until)
        except TimeoutError:
            self._leave()
            return None
        except BaseException:
            self._sequence.abandoned = True
            raise
        return self._take(token)


class AsyncStream(_Reader, AsyncIterator[Token]):
    """`Stream` for asyncio, for one reader in one event loop.

    Leaving the loop, `aclose`, or cancelling the reading task ends the request.
    """

    def __init__(self, scheduler: Scheduler, sequence: Sequence, whole: bool = False) -> None:
        self._inbox: AsyncInbox[Token | None] = AsyncInbox()
        super().__init__(scheduler, sequence, self._inbox.put, whole)

    async def __anext__(self) -> Token:
        token = None if self._ended else await self._next()
        if token is None:
            raise StopAsyncIteration
        return token

    async def drain(self) -> GenerationResult:
        """Wait for the end without reading tokens one by one, and return the result."""
        while not self._ended:
            await self._next()
        return self.result

    async def aclose(self) -> None:
        """End the request. Its slot becomes free after the current engine call. Idempotent."""
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


class SegmentStream:
    """The segments of a sound, each decoded when it is read.

    Attributes:
        result: The result of the whole sound. None before the last segment was read.
    """

    def __init__(self, segments: Generator[Segment, None, GenerationResult]) -> None:
        self.result: GenerationResult | None = None
        self._segments = segments

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Segment:
        try:
            return next(self._segments)
        except StopIteration as end:
            self.result = self.result or end.value
            raise


def is_list_of_prompts(prompt: Any) -> bool:
    """Return True for a list of texts, lists or arrays.

    A list of token ids or of messages is one prompt.
    """
    if not isinstance(prompt, (list, tuple)) or not prompt:
        return False
    return not isinstance(prompt[0], (Integral, float, Mapping))


class PromptList:
    """The requests of a list of prompts.

    Each request that leaves the queue lets the next one in (`follow`), so a long list neither fills
    the queue nor keeps other callers out.

    Args:
        make: Creates the sequence for a prompt.
        prompts: The prompts.
        until: Deadline of all requests, on the monotonic clock.
        ended: Called once all requests have ended.
    """

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
        # None: not created before the deadline.
        self._made: list[Sequence | BaseException | None] = [None] * len(prompts)
        self.running = 0
        self._abandoned = False

    def follow(self) -> Sequence | None:
        """Return the request of the next prompt, None if there is none.

        It is created in the caller's context. Prompts for which no request can be created fail
        individually.
        """
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
        """End all requests that are still running."""
        self._abandoned = True
        for sequence in self._made:
            if isinstance(sequence, Sequence):
                sequence.abandoned = True

    def results(self) -> list[GenerationResult]:
        """Return the results in the order of the prompts. Unfinished ones have their tokens so far.

        Raises:
            BatchError: If any prompt failed. It contains all results.
        """
        self.abandon()
        outcomes = [_outcome(each) for each in self._made]
        failed = [
            (number, each)
            for number, each in enumerate(outcomes)
            if isinstance(each, BaseException)
        ]
        for _, error in failed:
            if not isinstance(error, Exception):
                raise error  # a callback raised it to end more than its request
        if failed:
            number, error = failed[0]
            raise BatchError(
                f"{len(failed)} of {len(outcomes)} prompts failed, first prompt {number}: "
                f"{type(error).__name__}: {error}; the exception's results have the others",
                list(outcomes),
            )
        return [each for each in outcomes if isinstance(each, GenerationResult)]


def _outcome(made: Sequence | BaseException | None) -> GenerationResult | BaseException:
    if made is None:
        return GenerationResult("", (), (), (), finish_reason="deadline", stats=Stats())
    if isinstance(made, BaseException):
        return made
    if not made.ended:
        made.response.freeze()
    return made.result if made.error is None else made.error


def _patience(until: float) -> float | None:
    """Return the seconds that a caller with a deadline waits, None if it waits indefinitely."""
    return None if until == math.inf else max(0.0, until + GRACE - monotonic())
