"""ASGI middleware for requests that are refused before their body has been read."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from freeexport.serving.errors import ApiError

# Limits for the rest of a body that is discarded, in bytes and seconds.
DISCARDED = 64 << 20
DISCARD_SECONDS = 30.0


class UnreadBody:
    """Middleware that discards the rest of a body after the response, then closes the connection.

    If the connection were closed at once, clients that are still sending would get a reset in
    place of the response. Most read no response before they have sent the whole body.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", ()))
        unread = headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers
        size = 0

        async def read() -> Message:
            nonlocal unread, size
            message = await receive()
            unread = message.get("more_body", False)
            size += len(message.get("body", b""))
            return message

        async def write(message: Message) -> None:
            if not unread:
                await send(message)
            elif message["type"] == "http.response.start":
                closing = (b"connection", b"close")
                await send({**message, "headers": [*message.get("headers", ()), closing]})
            elif message.get("more_body", False):
                await send(message)
            else:
                await send({**message, "more_body": True})
                with suppress(TimeoutError, asyncio.CancelledError):  # cancelled at shutdown
                    async with asyncio.timeout(DISCARD_SECONDS):
                        while unread and size <= DISCARDED:
                            await read()
                await send({"type": "http.response.body", "body": b""})

        await self._app(scope, read, write)


class Unambiguous:
    """Middleware that rejects requests with both Content-Length and Transfer-Encoding.

    A proxy may read such a request as two (request smuggling). The connection is closed.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if {b"content-length", b"transfer-encoding"} <= {
            name for name, _ in scope.get("headers", ())
        }:
            failed = ApiError(
                400, "the request has Content-Length and Transfer-Encoding; send only one"
            )
            app = Response(
                msgspec.json.encode(failed.body), 400, {"Connection": "close"}, "application/json"
            )
        await app(scope, receive, send)
