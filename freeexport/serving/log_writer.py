"""Log lines, written by a thread of their own: an output that nobody reads holds nobody up."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from contextlib import suppress
from typing import TextIO

# Bytes of lines that wait to be written; others are dropped, and counted in the next that is written.
MOST_WAITING = 4 << 20


class LogWriter:
    """Writes lines to the file descriptor of `stream`; nothing where that is None."""

    def __init__(self, stream: TextIO | None, most: int = MOST_WAITING) -> None:
        # A copy, and not the stream: its lock would be held by a write that blocks, and the interpreter could not end.
        self._file = None if stream is None else os.dup(stream.fileno())
        self._lines = deque[bytes]()
        self._waiting, self._most = 0, most
        self._dropped = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="freeexport-log", daemon=True)
        self._thread.start()

    def write(self, line: str) -> None:
        data = line.encode(errors="replace") + b"\n"
        # Reentrant, as Condition's lock is: a signal handler may write while its thread does.
        with self._changed:
            if self._waiting + len(data) > self._most:
                self._dropped += 1
                return
            self._waiting += len(data)
            self._lines.append(data)
            self._changed.notify()

    def close(self, seconds: float) -> None:
        """Write what waits, for so long at most."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(seconds)

    def handler(self) -> logging.Handler:
        """For the log of Python's libraries."""
        writer = self

        class Handler(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                writer.write(self.format(record))

        return Handler()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._closed)
                if not self._lines:
                    break
                data = self._lines.popleft()
                size = len(data)
                if self._dropped:
                    data += b'{"dropped_lines": %d}\n' % self._dropped
                    self._dropped = 0
            with suppress(OSError):  # nobody can read it any more
                while data and self._file is not None:
                    data = data[os.write(self._file, data) :]
            with self._changed:
                self._waiting -= size
        if self._file is not None:
            os.close(self._file)
