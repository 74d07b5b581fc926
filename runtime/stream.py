"""The tokens of one request for one reader, in a thread or an asyncio program, and requests for a list of prompts."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from collections.abc import Sequence as List
from contextlib import suppress
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

    @property
    def empty(self) -> bool:
        return self._queue.empty()

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
        loop, event = self._loop, self._event
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
            else:
                import asyncio

                async with asyncio.timeout(_patience(until)):
                    await self._event.wait()


class _Reader:
    """A request that has a place among the others from the start. `whole`: its tokens are not read one by one."""

    _inbox: Inbox[Token | None] | AsyncInbox[Token | None]

    def __init__(self, scheduler: Scheduler, sequence: Sequence, whole: bool = False) -> None:
        self._scheduler, self._sequence = scheduler, sequence
        self._given, self._ended = 0, False
        self._rest: deque[Token] = deque()  # what is left to read, where the reader left before the end
        inbox = self._inbox
        sequence.deliver = None if whole else inbox.put
        sequence.on_end = partial(inbox.put, None)
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
        """Go without the worker, which is late: the result is what is there."""
        self._sequence.abandoned = self._ended = True
        result = self._sequence.leave()
        self._rest = deque(self._sequence.tokens[self._given : len(result.token_ids)])

    def _after_end(self) -> Token | None:
        return self._rest.popleft() if self._rest else None


class Stream(_Reader, Iterator[Token]):
    """The tokens of one request, as they become final. `result` is complete once the stream has ended. It is decoded
    whether or not it is read; closing the stream, or dropping it, ends it."""

    def __init__(self, scheduler: Scheduler, sequence: Sequence, whole: bool = False) -> None:
        self._inbox: Inbox[Token | None] = Inbox()
        super().__init__(scheduler, sequence, whole)

    def __next__(self) -> Token:
        token = self._after_end() if self._ended else self._next()
        if token is None:
            raise StopIteration
        return token

    def drain(self) -> GenerationResult:
        """To the end, without reading the tokens one by one: the result."""
        while not self._ended:
            self._next()
        self._rest.clear()
        return self.result

    def close(self) -> None:
        """End the request and give its slot back. Idempotent."""
        self._sequence.abandoned = True
        self._rest.clear()
        if self._ended or self._scheduler.forked or self._scheduler.inside:
            self._ended = True
            return
        with suppress(TimeoutError):
            while self._inbox.get(self._sequence.until) is not None:
                pass
        self._ended = True

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _next(self) -> Token | None:
        inbox = self._inbox
        try:
            if inbox.empty:
                self._scheduler.check()  # within a callback it would wait for itself
            token = inbox.get(self._sequence.until)
        except TimeoutError:
            self._leave()
            return self._after_end()
        except BaseException:
            self._sequence.abandoned = True
            raise
        return self._take(token)


class AsyncStream(_Reader, AsyncIterator[Token]):
    """`Stream` for asyncio, for one reader of one event loop. Leaving the loop, `aclose`, or cancelling the task that
    reads ends the request."""

    def __init__(self, scheduler: Scheduler, sequence: Sequence, whole: bool = False) -> None:
        self._inbox: AsyncInbox[Token | None] = AsyncInbox()
        super().__init__(scheduler, sequence, whole)

    async def __anext__(self) -> Token:
        token = self._after_end() if self._ended else await self._next()
        if token is None:
            raise StopAsyncIteration
        return token

    async def drain(self) -> GenerationResult:
        """To the end, without reading the tokens one by one: the result."""
        while not self._ended:
            await self._next()
        self._rest.clear()
        return self.result

    async def aclose(self) -> None:
        """End the request; its slot is free after what is decoded now. Idempotent."""
        self._sequence.abandoned = self._ended = True
        self._rest.clear()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _next(self) -> Token | None:
        try:
            token = await self._inbox.get(self._sequence.until)
        except TimeoutError:
            self._leave()
            return self._after_end()
        except BaseException:
            self._sequence.abandoned = True
            raise
        return self._take(token)


class PromptList:
    """The requests of a list of prompts: one more than there are slots is in the scheduler at once, so a long list
    neither fills the queue nor keeps other callers out. `until` is the deadline of all, by the monotonic clock."""

    def __init__(
        self,
        scheduler: Scheduler,
        make: Callable[[Prompt], Sequence],
        prompts: List[Prompt],
        slots: int,
        until: float,
        ended: Callable[[int], None],
    ) -> None:
        self._scheduler, self._make, self._until, self._ended = scheduler, make, until, ended
        self._slots, self._left = slots, iter(list(enumerate(prompts)))
        self._results: list[GenerationResult | BaseException] = [_late()] * len(prompts)
        self.running: dict[int, Sequence] = {}

    def begin(self) -> None:
        """Submit the first prompts. Raises QueueFullError where not even one finds a place."""
        for count in range(self._slots + 1):
            self._follow(forced=count > 0)

    def take(self, number: int) -> None:
        """The request of this prompt has ended; the next follows."""
        sequence = self.running.pop(number)
        self._results[number] = sequence.result if sequence.error is None else sequence.error
        self._follow(forced=True)

    def leave(self) -> None:
        """Go at the deadline without the worker, which is late: what is there are the results."""
        self.abandon()
        for number, sequence in self.running.items():
            self._results[number] = sequence.leave()

    def abandon(self) -> None:
        for sequence in self.running.values():
            sequence.abandoned = True

    def results(self) -> list[GenerationResult]:
        """In the order of the prompts. Raises BatchError, with all that there is, where any failed."""
        failed = [(number, each) for number, each in enumerate(self._results) if isinstance(each, BaseException)]
        for _, error in failed:
            if not isinstance(error, Exception):
                raise error  # a callback ended more than its request
        if failed:
            number, error = failed[0]
            raise BatchError(
                f"{len(failed)} of {len(self._results)} prompts failed, the first of them prompt {number}: "
                f"{type(error).__name__}: {error}; the exception's results have the others",
                list(self._results),
            )
        return [each for each in self._results if isinstance(each, GenerationResult)]

    def _follow(self, forced: bool) -> None:
        """Submit the next prompt; those of which no request can be made fail individually."""
        for number, prompt in self._left:
            if monotonic() >= self._until:
                continue
            try:
                sequence = self._make(prompt)
            except Exception as error:
                self._results[number] = error
                continue
            sequence.on_end = partial(self._ended, number)
            self._scheduler.submit(sequence, forced)
            self.running[number] = sequence
            return


def _late() -> GenerationResult:
    """The result of a prompt that did not begin before the deadline."""
    return GenerationResult("", (), (), (), "deadline", Stats())


def _patience(until: float) -> float | None:
    """Seconds that a caller with a deadline, by the monotonic clock, waits; None is without limit."""
    return None if until == math.inf else max(0.0, until + GRACE - monotonic())
