"""A stream of server-sent events: the chunks of all choices as they come, pings while there are none."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from freeexport.serving.errors import api_error
from freeexport.serving.generation import ClientGone, Generation, each_token, while_there
from freeexport.serving.protocol import ChatRequest, CompletionRequest
from freeexport.serving.replies import Reply
from freeexport.serving.service import Record
from runtime import AsyncStream, GenerationResult, Token

# Seconds of silence after which a comment keeps proxies from closing the connection.
PING_SECONDS = 15.0
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
DONE, PING = b"data: [DONE]\n\n", b": ping\n\n"

Send = Callable[[dict[str, Any]], Awaitable[None]]


def event(data: Any) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


class EventStream:
    """An ASGI response, whose `record` ends with it."""

    def __init__(
        self,
        generation: Generation,
        reply: Reply,
        request: ChatRequest | CompletionRequest,
        record: Record,
    ) -> None:
        self._generation, self._reply, self._request, self._record = generation, reply, request, record
        self._written = 0.0

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Send) -> None:
        status, failed = 499, None
        try:
            await while_there(receive, self._answer(send))
            status = 200
        except ClientGone:
            pass
        except Exception as error:
            failed = api_error(error)
            status = failed.status
            await self._write(send, event(failed.body) + DONE)
            await send({"type": "http.response.body", "body": b""})
            if status == 500:
                raise
        finally:
            await self._generation.end()
            self._record.results = [stream.result for stream in self._generation.streams]
            self._record.end(status, failed)

    async def _answer(self, send: Send) -> None:
        headers = [*HEADERS, (b"x-request-id", self._reply.id.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        self._written = asyncio.get_running_loop().time()
        pings = asyncio.ensure_future(self._ping(send))
        choices = [asyncio.ensure_future(self._choice(*each, send)) for each in enumerate(self._generation.streams)]
        try:
            results = list(await asyncio.gather(*choices))
        finally:
            for task in (pings, *choices):
                task.cancel()
            await asyncio.gather(pings, *choices, return_exceptions=True)
        if self._request.include_usage:
            await self._write(send, event(self._reply.usage(results, self._generation.prompts)))
        await self._write(send, DONE)
        await send({"type": "http.response.body", "body": b""})

    async def _choice(self, index: int, stream: AsyncStream, send: Send) -> GenerationResult:
        opening = self._reply.opening(index)
        if opening is not None:
            await self._write(send, event(opening))
        held: list[Token] = []  # no text yet: a letter may have several tokens

        async def say(token: Token) -> None:
            held.append(token)
            if token.text:
                await self._write(send, event(self._reply.chunk(index, held)))
                held.clear()

        result = await each_token(stream, say)
        self._generation.check(result)
        await self._write(send, event(self._reply.closing(index, result, held)))
        return result

    async def _ping(self, send: Send) -> None:
        while True:
            silent = asyncio.get_running_loop().time() - self._written
            if silent >= PING_SECONDS:
                await self._write(send, PING)
            await asyncio.sleep(PING_SECONDS - silent if silent < PING_SECONDS else PING_SECONDS)

    async def _write(self, send: Send, data: bytes) -> None:
        self._written = asyncio.get_running_loop().time()
        await send({"type": "http.response.body", "body": data, "more_body": True})
        await asyncio.sleep(0)  # where tokens are there already, others have their turn
