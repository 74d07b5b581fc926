"""Reads the audio files of clients in separate processes, which may crash.

The decoders of compressed audio are large C libraries. A file that makes one of them crash, or take
too long or too much memory, ends its process and not the server.

This module is also the program of such a process. It reads the length of a file and the file from
standard input. It writes SAMPLES or REFUSED, the length of the result, and the result, which is an
array or an error message.
"""

from __future__ import annotations

import math
import os
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from freeexport.serving.errors import ApiError, draining
from runtime.errors import PromptError, one_line
from runtime.speech.audio import LONGEST_SECONDS, RATE, LateError, read_audio

READ_SECONDS = 300.0  # limit for reading a file
# Limit for the address space of a process, in bytes. The longest audio has 0.9 GB of samples.
LARGEST_MEMORY = 4 << 30
PACKAGES = str(Path(__file__).resolve().parents[2])
SAMPLES = b"s"
REFUSED = b"r"
LENGTH = struct.Struct("<Q")
Process = subprocess.Popen[bytes]


class AudioReader:
    """Reads audio files, each in a process that reads one at a time. Thread-safe.

    One idle process is kept for the next file. More start when they are needed.
    """

    def __init__(self) -> None:
        self._idle = list[Process]()
        self._busy = set[Process]()
        self._closed = False

    def read(self, content: bytes, until: float) -> np.ndarray:
        """Return float32 samples [n] at 16 kHz of a file. See `read_audio`.

        Raises:
            PromptError: If the audio is not valid, or cannot be read within the limits.
            LateError: If it has not been read by `until`, on the monotonic clock.
            ApiError: If no process can be started, or the server shuts down (status 503).
        """
        process = self._take()
        self._busy.add(process)
        if self._closed:
            process.kill()
        limit = min(until, time.monotonic() + READ_SECONDS)
        timer = threading.Timer(limit - time.monotonic(), process.kill)
        timer.start()
        result = None
        try:
            result = _exchange(process, content)
        finally:
            timer.cancel()
            self._busy.discard(process)
            if result is None or self._idle or self._closed:
                _end(process)
            else:
                self._idle.append(process)
        if isinstance(result, np.ndarray):
            return result
        if result is not None:
            raise PromptError(result)
        if self._closed:
            raise draining()
        if not self._idle:
            with suppress(ApiError):
                self._idle.append(_start())
        if time.monotonic() >= until:
            raise LateError
        if time.monotonic() >= limit:
            raise PromptError(
                f"the audio takes more than {READ_SECONDS:g} s to read; send a shorter file"
            )
        raise PromptError("the audio makes its decoder crash; convert it to a WAV file")

    def prepare(self) -> None:
        """Start a process for the first file, and wait until it is ready."""
        with suppress(PromptError, ApiError):
            self.read(b"", math.inf)

    def _take(self) -> Process:
        with suppress(IndexError):
            process = self._idle.pop()
            if process.poll() is None:
                return process
            _end(process)
        return _start()

    def close(self) -> None:
        """End all processes."""
        self._closed = True
        for process in tuple(self._busy):
            process.kill()
        while self._idle:
            _end(self._idle.pop())


def _start() -> Process:
    path = os.pathsep.join(filter(None, [PACKAGES, os.environ.get("PYTHONPATH")]))
    try:
        return subprocess.Popen(
            (sys.executable, "-m", __name__),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # only the server receives the signals of a terminal
        )
    except OSError as error:
        message = f"cannot read audio now ({one_line(error)}); retry later"
        raise ApiError(503, message, "audio_busy", retry_after=1) from None


def _exchange(process: Process, content: bytes) -> np.ndarray | str | None:
    """Send a file to a process. Return its samples or an error message, None if it has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.write(LENGTH.pack(len(content)))
        process.stdin.write(content)
        process.stdin.flush()
    head = process.stdout.read(1 + LENGTH.size)
    if len(head) < 1 + LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head[1:])
    if length > LONGEST_SECONDS * RATE * 4:  # the decoder was taken over
        return None
    result = process.stdout.read(length)
    if len(result) < length:
        return None
    if head[:1] == SAMPLES:
        return np.frombuffer(result, np.float32, length // 4)
    return result.decode("utf-8", "replace")


def _end(process: Process) -> None:
    process.kill()
    with suppress(BrokenPipeError), process:  # closes the pipes and waits
        pass


def main() -> None:
    """Read files for the server until it closes standard input."""
    source = os.fdopen(os.dup(0), "rb")
    target = os.fdopen(os.dup(1), "wb")
    # C libraries write about damaged files to standard error. Tracebacks are still written.
    sys.stderr = os.fdopen(os.dup(2), "w")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nowhere, number)
    _limit_memory()
    while head := source.read(LENGTH.size):
        kind, result = _read(source.read(*LENGTH.unpack(head)))
        target.write(kind + LENGTH.pack(len(result)))
        target.write(result)
        target.flush()


def _read(content: bytes) -> tuple[bytes, bytes | memoryview]:
    try:
        return SAMPLES, read_audio(content).data.cast("B")
    except PromptError as error:
        return REFUSED, str(error).encode()
    except MemoryError:
        return REFUSED, (
            b"the audio takes more than %d GiB of memory to read; send a shorter file"
            % (LARGEST_MEMORY >> 30)
        )


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = LARGEST_MEMORY if hard == resource.RLIM_INFINITY else min(LARGEST_MEMORY, hard)
    with suppress(ValueError, OSError):  # macOS
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


if __name__ == "__main__":
    main()
