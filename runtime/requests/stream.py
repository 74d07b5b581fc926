"""The tokens of one request for one reader: in a thread, or in an asyncio program."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

from runtime.requests.request import Request
from runtime.result import GenerationResult, Token
from runtime.scheduling.patience import patience
from runtime.scheduling.scheduler import Scheduler

if TYPE_CHECKING:
    from runtime.requests.asyncio_bridge import News


class _Request:
    """A request that has a place among the others from the start. Raises as Scheduler.join does."""

    def __init__(self, scheduler: Scheduler, request: Request) -> None:
        self._scheduler, self._reply = scheduler, request.responses[0]
        self._row = row = request.task()
        self._given = 0
        self._rest: deque[Token] | None = None  # what is left to read, where it was left
        scheduler.join(row)

    def __del__(self) -> None:
        # Nothing that takes a lock: this may be anywhere. Whoever drives next ends the request.
        if hasattr(self, "_row"):
            self._row.abandoned = True

    @property
    def result(self) -> GenerationResult:
        """The tokens so far, read or not; `finish_reason` is "cancelled" or "deadline" unless the request came to its
        end."""
        return self._reply.result

    def _next(self) -> Token | None:
        """What is there; None where nothing is. Raises what ended the request, once."""
        tokens = self._row.tokens if self._rest is None else self._rest
        if tokens:
            self._given += 1
            return tokens.popleft()
        if self._rest is None:
            error, self._row.error = self._row.error, None
            if error is not None:
                raise error
        return None

    def _leave(self) -> None:
        """Go without the thread that drives, which is late: the result is what is there."""
        self._row.abandoned = True
        self._reply.leave()
        self._rest = deque(self._reply.tokens_from(self._given))

    def _forget(self) -> None:
        self._row.tokens.clear()
        self._row.error = None
        self._rest = None if self._rest is None else deque()


class Stream(_Request, Iterator[Token]):
    """The tokens of one request, as they become final. `result` is complete once the stream has ended."""

    def __next__(self) -> Token:
        self._wait(whole=False)
        token = self._next()
        if token is None:
            raise StopIteration
        return token

    def drain(self) -> GenerationResult:
        """To the end, without reading the tokens one by one: the result."""
        self._wait(whole=True)
        self._row.tokens.clear()
        if self._rest is None and self._row.error is not None:
            raise self._row.error
        return self.result

    def close(self) -> None:
        """End the request and give its slot back. Idempotent."""
        self._row.abandoned = True
        if not (self._row.ended or self._scheduler.process.left or self._scheduler.driven_here):
            self._reply.end()
            self._scheduler.wait(self._row, whole=True, until=self._row.until)
        self._forget()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait(self, whole: bool) -> None:
        if self._rest is not None or self._row.ready(whole):
            return
        try:
            ready = self._scheduler.wait(self._row, whole, self._row.until)
        except BaseException:
            self._row.abandoned = True
            raise
        if not ready:
            self._leave()


class AsyncStream(_Request, AsyncIterator[Token]):
    """`Stream` for asyncio, for one reader of one event loop. Its request begins with the first token that is awaited.
    Leaving the loop, `aclose`, or cancelling the task that reads ends the request."""

    _news: News | None = None

    async def __anext__(self) -> Token:
        await self._wait(whole=False)
        token = self._next()
        if token is None:
            raise StopAsyncIteration
        return token

    async def drain(self) -> GenerationResult:
        """To the end, without reading the tokens one by one: the result."""
        await self._wait(whole=True)
        self._row.tokens.clear()
        if self._rest is None and self._row.error is not None:
            raise self._row.error
        return self.result

    async def aclose(self) -> None:
        """End the request; its slot is free after what is decoded now. Idempotent."""
        self._row.abandoned = True
        if not (self._row.ended or self._scheduler.process.left):
            self._reply.end()
            self._scheduler.attend(self._row, True)
        self._forget()
        self._rest = deque()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _wait(self, whole: bool) -> None:
        row = self._row
        if self._rest is not None or row.ready(whole):
            return
        if self._news is None:
            from runtime.requests.asyncio_bridge import News

            self._news = News()
            row.told = self._news.tell
            self._scheduler.attend(row, True)
        try:
            while not row.ready(whole):
                if not await self._news.come(patience(row.until)):
                    self._leave()
                    return
        except BaseException:
            row.abandoned = True
            raise
