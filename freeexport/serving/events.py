"""Responses that last: streams of server-sent events, and work that ends if the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from freeexport.serving.errors import ApiError, api_error
from freeexport.serving.service import RequestLog
from runtime import GenerationResult

Result = TypeVar("Result")
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

# Seconds of silence after which a comment is sent, so that proxies keep the connection open.
PING_SECONDS = 15.0
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
PING = b": ping\n\n"


class ClientGone(Exception):
    """The client has disconnected."""


class EventStream:
    """ASGI response that streams events, with pings during silence.

    Ends `record` when the stream ends.

    Args:
        id: ID of the response.
        record: Log line of the request.
    """

    def __init__(self, id: str, record: RequestLog) -> None:
        self._id = id
        self._record = record
        self._written = 0.0
        self._send: Send

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        self._send = send
        status = 499
        failed = None
        try:
            await while_there(receive, self._answer())
            status = 200
        except ClientGone:
            pass
        except Exception as error:
            failed = api_error(error)
            status = failed.status
            await self._write(self._failed(failed))
            await send({"type": "http.response.body", "body": b""})
            if status == 500:
                raise
        finally:
            self._record.results = await self._end()
            self._record.end(status, failed)

    async def _events(self) -> None:
        """Write all events."""
        raise NotImplementedError

    def _failed(self, error: ApiError) -> bytes:
        """Return the last events of a stream that fails."""
        raise NotImplementedError

    async def _end(self) -> list[GenerationResult]:
        """Release what the request uses, and return the results so far. Called once."""
        raise NotImplementedError

    async def _answer(self) -> None:
        headers = [*HEADERS, (b"x-request-id", self._id.encode())]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        self._written = asyncio.get_running_loop().time()
        async with together([self._events(), self._ping()]) as (events, _):
            await events
        await self._send({"type": "http.response.body", "body": b""})

    async def _ping(self) -> None:
        while True:
            silent = asyncio.get_running_loop().time() - self._written
            if silent >= PING_SECONDS:
                await self._write(PING)
            await asyncio.sleep(PING_SECONDS - silent if silent < PING_SECONDS else PING_SECONDS)

    async def _write(self, data: bytes) -> None:
        self._written = asyncio.get_running_loop().time()
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        await asyncio.sleep(0)  # let other tasks run, even if the next event is ready


async def while_there(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Await `work` unless the client disconnects first.

    Raises:
        ClientGone: If the client disconnects. `work` is cancelled.
    """

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async with together([work, disconnected()]) as (task, gone):
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        result: Result = task.result()
        return result


@asynccontextmanager
async def together(
    works: Sequence[Coroutine[Any, Any, Any]],
) -> AsyncIterator[list[asyncio.Task[Any]]]:
    """Run coroutines as tasks and cancel the unfinished ones at the end of the block."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
