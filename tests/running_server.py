"""Servers on a free port for tests over HTTP, in a thread or in a separate process."""

from __future__ import annotations

import asyncio
import faulthandler
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from freeexport.serving.server import listen, serve
from freeexport.serving.service import ServerOptions, Service
from runtime import SessionOptions

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "onnx", "scipy")
# Bans the end of the sequence, which random models predict at any time.
ENDLESS = {"logit_bias": {"2": -100}}
MESSAGES = [{"role": "user", "content": "hello"}]


class Running:
    """Server in a thread.

    Attributes:
        url: Address without /v1.
        log: Parsed log lines.
        thread: Ends when the server has drained.

    Args:
        options: Options of the server.
        buffer: Size of the socket buffers in bytes. Default: the system's.
    """

    def __init__(self, options: ServerOptions, buffer: int | None = None) -> None:
        self.log: list[dict[str, Any]] = []
        self._listening = listen("127.0.0.1", 0)
        self._buffer = buffer
        if buffer is not None:
            self._listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        self.address: tuple[str, int] = self._listening.getsockname()
        self.url = "http://{}:{}".format(*self.address)
        self._options = options
        self._ready = threading.Event()
        self.failed = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        assert self._ready.wait(60), self.failed

    def stop(self) -> None:
        """Shut down as after SIGTERM."""
        if self.thread.is_alive():
            with suppress(RuntimeError):  # the loop is closing
                self._loop.call_soon_threadsafe(self._stop.set)

    def send(self, data: bytes) -> socket.socket:
        """Send data on a new connection and return the connection."""
        connection = socket.socket()
        if self._buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._buffer)
        connection.settimeout(20)
        connection.connect(self.address)
        connection.sendall(data)
        return connection

    def ask(self, path: str, body: bytes, headers: str = "") -> socket.socket:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
        return self.send(head.encode() + body)

    def _run(self) -> None:
        async def main() -> None:
            self._loop = asyncio.get_running_loop()
            self._stop = asyncio.Event()
            self.service = Service(self._options, lambda line: self.log.append(json.loads(line)))
            await serve(self.service, self._listening, self._stop, lambda _: self._ready.set())

        asyncio.run(main())


@contextmanager
def running(
    *bundles: Path, slots: int = 4, queue: int = 64, buffer: int | None = None, prefix_cache_mb: int = 0, **options: Any
) -> Iterator[Running]:
    session = SessionOptions(threads=1, slots=slots, queue=queue, prefix_cache_mb=prefix_cache_mb)
    # Requests that a test left running end before the thread must have ended.
    options = {"shutdown_timeout": 10.0, **options}
    server = Running(ServerOptions(bundles, session=session, **options), buffer)
    try:
        yield server
    finally:
        server.stop()
        server.thread.join(30)
        if server.thread.is_alive():
            faulthandler.dump_traceback(all_threads=True)
        assert not server.thread.is_alive(), [request.line for request in server.service.running]


def read(connection: socket.socket) -> bytes:
    """Read until the server closes the connection."""
    with connection:
        parts = []
        while part := connection.recv(1 << 16):
            parts.append(part)
        return b"".join(parts)


def status(response: bytes) -> int:
    return int(response.split(b" ", 2)[1])


def eventually(true: Callable[[], bool], seconds: float = 60) -> bool:
    """Wait until `true` returns True, for at most `seconds`. Return its last result."""
    until = time.monotonic() + seconds
    while not true() and time.monotonic() < until:
        time.sleep(0.005)
    return true()


@contextmanager
def command(*arguments: str, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """Run `freeexport serve` in a process.

    Yields the process, its address, and its lines on standard error until it was ready. Its last line
    names the modules of HEAVY that it imported.
    """
    code = (
        "import sys, atexit; from freeexport.cli import main;"
        f"atexit.register(lambda: print('imported', *(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr));"
        f"main(['serve', *{list(arguments)!r}])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            said = list[str]()
            assert process.stderr is not None
            for line in process.stderr:
                said.append(line)
                if line.startswith("serving"):
                    break
            found = re.search(r"http://\S+(?=/v1)", said[-1])
            assert found, said
            yield process, found.group(), said
        finally:
            process.kill()
