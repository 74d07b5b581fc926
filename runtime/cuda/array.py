"""Memory of a device in the shape of an array: views by slicing, and copies that are put into its stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from runtime.cuda.driver import Cuda, Stream


class Memory:
    """An allocation; freed when the last array on it is gone. `stream` is where copies to it are put."""

    __slots__ = ("address", "cuda", "size", "stream")

    def __init__(self, cuda: Cuda, address: int, size: int, stream: Stream) -> None:
        self.cuda, self.address, self.size, self.stream = cuda, address, size, stream

    def __del__(self) -> None:
        self.cuda.free(self.address)


class DeviceArray:
    """Like a numpy array as far as the runtime needs one: `shape`, `dtype`, `strides` in bytes, basic slicing, and
    assignment from arrays of the same shape and type on the same device, which returns before it is done.

    bfloat16, which numpy does not have, is uint16 here. `address` is that of the first element.
    """

    __slots__ = ("address", "dtype", "memory", "shape", "strides")

    def __init__(
        self,
        memory: Memory,
        address: int,
        shape: tuple[int, ...],
        dtype: np.dtype,
        strides: tuple[int, ...] | None = None,
    ) -> None:
        self.memory, self.address, self.shape, self.dtype = memory, address, tuple(shape), dtype
        self.strides = _dense(self.shape, dtype.itemsize) if strides is None else strides

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def contiguous(self) -> bool:
        dense = _dense(self.shape, self.dtype.itemsize)
        return all(n == 1 or a == b for n, a, b in zip(self.shape, self.strides, dense, strict=True))

    def reshaped(self, shape: tuple[int, ...]) -> DeviceArray:
        """The same elements, at most as many, from the first on; only of a contiguous array."""
        count = int(np.prod(shape, dtype=np.int64))
        if not self.contiguous or count > self.size:
            raise ValueError(f"{list(self.shape)} cannot be read as {list(shape)}")
        return DeviceArray(self.memory, self.address, shape, self.dtype)

    def __getitem__(self, key: Any) -> DeviceArray:
        """Integers, slices of step 1, and None for a dimension of 1. IndexError for anything else or outside."""
        keys = _padded(key if isinstance(key, tuple) else (key,), len(self.shape))
        address, shape, strides = self.address, list[int](), list[int]()
        dimensions = iter(zip(self.shape, self.strides, strict=True))
        for part in keys:
            if part is None:
                shape.append(1)
                strides.append(0)
                continue
            size, stride = next(dimensions)
            if isinstance(part, slice):
                start, stop, step = part.indices(size)
                if step != 1:
                    raise IndexError(f"slices of device memory have step 1, not {step}")
                shape.append(max(0, stop - start))
                strides.append(stride)
            else:
                start = range(size)[part]
            address += start * stride
        return DeviceArray(self.memory, address, tuple(shape), self.dtype, tuple(strides))

    def __setitem__(self, key: Any, source: DeviceArray) -> None:
        self[key].copy_from(source)

    def copy(self) -> DeviceArray:
        """A copy, put into the stream of this array's memory."""
        memory = self.memory
        target = memory.cuda.empty(self.shape, self.dtype, memory.stream)
        target.copy_from(self)
        return target

    def copy_from(self, source: DeviceArray) -> None:
        """Put a copy of `source` into the stream of this array's memory, after what the source's stream has now."""
        if source.shape != self.shape or source.dtype != self.dtype:
            raise ValueError(f"{source.dtype}{list(source.shape)} does not fit {self.dtype}{list(self.shape)}")
        if self.size == 0:
            return
        stream = self.memory.stream
        stream.follow(source.memory.stream)
        for target_at, source_at, steps, width, rows in _pieces(self, source):
            if rows == 1:
                stream.copy(target_at, source_at, width)
            else:
                stream.copy_rows(target_at, steps[0], source_at, steps[1], width, rows)


def _pieces(target: DeviceArray, source: DeviceArray) -> Iterator[tuple[int, int, tuple[int, int], int, int]]:
    """Copies of rows at even steps that make up one of arrays: addresses, steps, bytes of a row, number of rows."""
    width, axis = target.dtype.itemsize, len(target.shape)
    while axis and (target.shape[axis - 1] == 1 or target.strides[axis - 1] == source.strides[axis - 1] == width):
        width *= target.shape[axis - 1]
        axis -= 1
    if not axis:
        yield target.address, source.address, (width, width), width, 1
        return
    steps = target.strides[axis - 1], source.strides[axis - 1]
    for index in np.ndindex(*target.shape[: axis - 1]):
        to = target.address + sum(i * stride for i, stride in zip(index, target.strides, strict=False))
        at = source.address + sum(i * stride for i, stride in zip(index, source.strides, strict=False))
        yield to, at, steps, width, target.shape[axis - 1]


def _padded(keys: tuple[Any, ...], dimensions: int) -> list[Any]:
    left = dimensions - sum(key is not None for key in keys)
    if left < 0:
        raise IndexError(f"{len(keys)} indices for {dimensions} dimensions")
    return [*keys, *[slice(None)] * left]


def _dense(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides, step = [0] * len(shape), itemsize
    for axis in reversed(range(len(shape))):
        strides[axis] = step
        step *= max(1, shape[axis])
    return tuple(strides)
