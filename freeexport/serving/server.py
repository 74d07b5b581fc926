"""HTTP server: its socket, protocol, signals, log lines and shutdown."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from queue import SimpleQueue
from types import FrameType
from typing import Any, TextIO

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from freeexport.serving.events import PING
from freeexport.serving.routes import application
from freeexport.serving.service import ServerOptions, Service
from runtime.errors import OptionError, cut, shown

BACKLOG = 1024
KEEP_ALIVE = 75  # timeout of idle connections in seconds, longer than that of usual proxies
LAST_WORDS = 2  # seconds for clients and logs to read the last lines
LARGEST_HEADERS = 64 << 10
# Limit for log lines that wait to be written, in bytes. Other lines are dropped, and counted in the
# next line that is written.
MOST_WAITING = 4 << 20
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
# Errors of accept(2) if the process or the machine lacks file descriptors or memory.
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class _Listening(socket.socket):
    """Listening socket that reports a lack of file descriptors at most once a second.

    After such an error asyncio pauses for a second, but first retries for its whole backlog.
    """

    _failed = -1.0

    def accept(self) -> tuple[socket.socket, Any]:
        try:
            return super().accept()
        except OSError as error:
            if error.errno in EXHAUSTED:
                if time.monotonic() - self._failed < 0.9:
                    raise BlockingIOError from None
                self._failed = time.monotonic()
            raise


class _Protocol(H11Protocol):
    """HTTP/1.1 protocol that still answers clients which have closed their side of the connection.

    Clients that have left look the same until a write to them fails. The protocol therefore writes
    interim responses, or pings in a stream. HTTP/1.0 has no interim responses, so its clients count
    as gone.
    """

    _ended = False

    def eof_received(self) -> bool | None:  # type: ignore[override]
        cycle = self.cycle
        if (
            cycle is None
            or cycle.response_complete
            or cycle.more_body
            or self.scope["http_version"] == "1.0"
        ):
            return None
        self._ended = True
        self._probe(0.05)
        return True

    def _probe(self, seconds: float) -> None:
        cycle = self.cycle
        if not (self.transport.is_closing() or cycle.disconnected or cycle.response_complete):
            # A response that has started and is incomplete is a stream of events.
            self.transport.write(
                self.conn.send(h11.Data(data=PING)) if cycle.response_started else CONTINUE
            )
            self.loop.call_later(seconds, self._probe, min(2 * seconds, 5.0))

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._ended and self.cycle.response_complete:
            self.transport.close()


class LogWriter:
    """Writes log lines in a thread, so that a blocked output delays no request.

    Args:
        stream: Output. None discards all lines.
        most: Limit for waiting lines, in bytes. Other lines are dropped.
    """

    def __init__(self, stream: TextIO | None, most: int = MOST_WAITING) -> None:
        # Not the stream itself: a blocked write would hold its lock, and the interpreter could not
        # exit.
        self._file = None if stream is None else os.dup(stream.fileno())
        self._lines = SimpleQueue[bytes]()
        self._most = most
        self._waiting = 0
        self._dropped = 0
        self._lock = threading.RLock()  # a signal handler may interrupt `write`
        self._thread = threading.Thread(target=self._run, name="freeexport-log", daemon=True)
        self._thread.start()

    def write(self, line: str) -> None:
        """Queue a line."""
        data = line.rstrip("\n").encode(errors="replace") + b"\n"
        with self._lock:
            if self._waiting + len(data) > self._most:
                self._dropped += 1
                return
            self._waiting += len(data)
            self._lines.put(data)

    def close(self, seconds: float) -> None:
        """Write the waiting lines within `seconds`, and end the thread."""
        self._lines.put(b"")
        self._thread.join(seconds)

    def _run(self) -> None:
        while data := self._lines.get():
            with self._lock:
                self._waiting -= len(data)
                if self._dropped:
                    data += b'{"dropped_lines": %d}\n' % self._dropped
                    self._dropped = 0
            with suppress(OSError):  # the output was closed
                while data and self._file is not None:
                    data = data[os.write(self._file, data) :]
        if self._file is not None:
            os.close(self._file)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Port 0 selects a free port.

    Raises:
        OptionError: If the host or the port cannot be used.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ][0]
    except OSError as error:
        raise OptionError(
            f"host {shown(host)} is not available: {error.strerror}; choose another --host"
        ) from None
    try:
        return _Listening(
            fileno=socket.create_server((host, port), family=family, backlog=BACKLOG).detach()
        )
    except OSError as error:
        problem = os.strerror(error.errno or 0)
        raise OptionError(f"port {port} of {cut(host)}: {problem}; choose another --port") from None


async def serve(
    service: Service,
    listening: socket.socket,
    stop: asyncio.Event,
    ready: Callable[[Service], None] = lambda _: None,
) -> None:
    """Load the bundles, serve until `stop` is set, then drain.

    Args:
        service: Service with the bundles.
        listening: Socket of `listen`.
        stop: Starts the shutdown.
        ready: Called when all bundles are loaded.

    Raises:
        FreeExportError: If a bundle cannot be opened. See `Session`.
    """
    config = uvicorn.Config(
        application(service),
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",  # warnings are only about invalid requests
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=LAST_WORDS,
        h11_max_incomplete_event_size=LARGEST_HEADERS,
    )
    server = uvicorn.Server(config)
    server.capture_signals = nullcontext  # type: ignore  # handled by the caller
    listener = asyncio.ensure_future(server.serve(sockets=[listening]))
    try:
        await asyncio.to_thread(service.open)
        ready(service)
        stopped = asyncio.ensure_future(stop.wait())
        await asyncio.wait((stopped, listener), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        await service.drain()
    finally:
        server.should_exit = True
        await listener
        service.close()


def run_server(options: ServerOptions, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT, then drain. A second signal exits at once.

    Raises:
        OptionError: If the host or the port cannot be used.
        FreeExportError: If a bundle cannot be opened.
    """
    listening = listen(host, port)
    address, number = listening.getsockname()[:2]
    where = f"http://{f'[{address}]' if ':' in address else address}:{number}"
    log = LogWriter(sys.__stdout__)
    said = LogWriter(sys.__stderr__)

    def ready(service: Service) -> None:
        modes = [
            f"{name}: {session.describe_mode(mode=options.mode)}"
            for name, session in service.sessions.items()
        ]
        said.write(f"serving {', '.join(options.names)} on {where}/v1; {'; '.join(modes)}")

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        signals = 0

        # Unlike a handler of the loop, this one is called even while the loop is busy.
        def end(number: int, frame: FrameType | None) -> None:
            nonlocal signals
            signals += 1
            if signals > 1:
                os._exit(1)
            loop.call_soon_threadsafe(stop.set)
            said.write(f"draining, at most {options.shutdown_timeout:g} s")

        def failed(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            if getattr(context.get("exception"), "errno", None) in EXHAUSTED:
                said.write(
                    "out of file descriptors, new connections wait; raise the limit (ulimit -n)"
                )
            else:
                loop.default_exception_handler(context)

        loop.set_exception_handler(failed)
        before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            await serve(Service(options, log.write), listening, stop, ready)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    logging.basicConfig(handlers=[logging.StreamHandler(said)])
    said.write(f"loading {', '.join(map(str, options.bundles))}")
    try:
        asyncio.run(main())
    finally:
        log.close(LAST_WORDS)
        said.close(LAST_WORDS)
