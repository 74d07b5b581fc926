"""From options to a server that listens, and to its end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

import uvicorn

from freeexport.serving.routes import application
from freeexport.serving.service import ServerOptions, Service
from runtime.errors import OptionError

BACKLOG = 1024
# Seconds: how long an idle connection is kept, longer than the proxies before it do, and how long one that was told
# of the end has to read it.
KEEP_ALIVE, LAST_WORDS = 75, 2
LARGEST_HEADERS = 64 << 10


class _Server(uvicorn.Server):
    """Leaves signals to whoever runs it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is a free one. Raises OptionError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OptionError(f"host {host!r} cannot be listened on: {error.strerror}; choose another --host") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise OptionError(f"port {port} of {host}: {error.strerror}; choose another --port") from None
    return listening


async def serve(
    service: Service, listening: socket.socket, stop: asyncio.Event, ready: Callable[[], None] = lambda: None
) -> None:
    """Load the bundles, answer until `stop`, and drain. `ready` is called when all are loaded. Raises what a bundle
    that cannot be opened raises."""
    config = uvicorn.Config(
        application(service),
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=LAST_WORDS,
        h11_max_incomplete_event_size=LARGEST_HEADERS,
    )
    server = _Server(config)
    listener = asyncio.ensure_future(server.serve(sockets=[listening]))
    try:
        await asyncio.to_thread(service.open)
        ready()
        stopped = asyncio.ensure_future(stop.wait())
        await asyncio.wait((stopped, listener), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        await service.drain()
    finally:
        server.should_exit = True
        await listener
        service.close()


def run(options: ServerOptions, host: str, port: int) -> None:
    """The command: serve until SIGTERM or SIGINT, then drain; a second signal ends at once."""
    listening = listen(host, port)
    address, number = listening.getsockname()[:2]
    where = f"http://{f'[{address}]' if ':' in address else address}:{number}"

    def say(text: str, stream: TextIO) -> None:
        with suppress(OSError):  # nobody reads it any more
            print(text, file=stream, flush=True)

    def log(line: str) -> None:
        say(line, sys.stdout)

    def ready() -> None:
        say(f"serving {', '.join(options.names)} on {where}/v1", sys.stderr)

    async def main() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()

        def end() -> None:
            if stop.is_set():
                os._exit(1)
            stop.set()
            say(f"draining, for {options.shutdown_timeout:g} s at most", sys.stderr)

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end)
        await serve(Service(options, log), listening, stop, ready)

    say(f"loading {', '.join(map(str, options.bundles))}", sys.stderr)
    asyncio.run(main())
