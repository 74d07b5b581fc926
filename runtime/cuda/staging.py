"""Pinned memory and device memory of the same layout, through which small arrays of the host reach an engine."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from runtime.cuda.driver import Stream

# What TensorRT wants addresses to be multiples of.
ALIGNMENT = 256
LEAST = 1 << 14


def laid_out(sizes: Mapping[str, int], start: int = 0) -> tuple[dict[str, int], int]:
    """Where each of these many bytes begins, one after the other from `start` on, and where all end. What is empty has
    a place of its own too."""
    offsets = {}
    for name, size in sizes.items():
        offsets[name] = start
        start += max(1, -(-size // ALIGNMENT)) * ALIGNMENT
    return offsets, start


class Staging:
    """`pinned` uint8 [size] on the host, `device` of the same size, and an `event`."""

    def __init__(self, stream: Stream, size: int) -> None:
        self.stream, self.size = stream, size
        self.pinned = stream.cuda.pinned(size)
        self.device = stream.cuda.empty((size,), np.uint8, stream)
        self.event = stream.cuda.event()
        self._host = int(self.pinned.ctypes.data)

    def send(self, start: int, end: int) -> None:
        """Put a copy of these bytes to the device into the stream."""
        if end > start:
            self.stream.copy(self.device.address + start, self._host + start, end - start)

    def fetch(self, start: int, end: int) -> None:
        """Put a copy of these bytes from the device into the stream."""
        if end > start:
            self.stream.copy(self._host + start, self.device.address + start, end - start)

    def view(self, offset: int, like: np.ndarray) -> np.ndarray:
        """The part of the pinned memory that an array of the host is copied to and from."""
        view: np.ndarray = self.pinned[offset : offset + like.nbytes].view(like.dtype).reshape(like.shape)
        return view

    def host(self, offset: int) -> int:
        """The address of a byte on the host."""
        return self._host + offset


class StagingPool:
    """Stagings that are in no use. Not thread-safe. Pinned memory is given back only when the device is closed."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._free: list[Staging] = []

    def take(self, size: int) -> Staging:
        """One of `size` bytes or more, the smallest there is."""
        fitting = [staging for staging in self._free if staging.size >= size]
        if not fitting:
            return Staging(self._stream, max(LEAST, 1 << (size - 1).bit_length()))
        chosen = min(fitting, key=lambda staging: staging.size)
        self._free.remove(chosen)
        return chosen

    def give(self, staging: Staging) -> None:
        self._free.append(staging)
