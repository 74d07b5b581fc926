"""Arrays in the memory of a CUDA device."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np


class CopyStream(Protocol):
    """The part of a CudaStream (driver.py) that arrays need."""

    cuda: Any
    handle: Any

    def follow(self, other: Any) -> None:
        """Let work enqueued from now on start after the work that is in `other` now."""

    def copy(self, target: int, source: int, size: int) -> None:
        """Enqueue a copy of `size` bytes between addresses."""


class Memory:
    """An allocation, freed with the last array that uses it.

    `stream` is where copies to it are enqueued.
    """

    __slots__ = ("address", "size", "stream")

    def __init__(self, address: int, size: int, stream: CopyStream) -> None:
        self.address = address
        self.size = size
        self.stream = stream

    def __del__(self) -> None:
        self.stream.cuda.free(self.address)


class DeviceArray:
    """An array on a device, with the part of numpy's interface that the runtime needs.

    It has `shape`, `dtype` and `strides` in bytes, basic slicing, and asynchronous assignment from
    arrays of the same shape, type and device. `address` is that of the first element. bfloat16,
    which numpy lacks, is uint16.
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
        self.memory = memory
        self.address = address
        self.shape = tuple(shape)
        self.dtype = dtype
        self.strides = _dense(self.shape, dtype.itemsize) if strides is None else strides

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def contiguous(self) -> bool:
        dense = _dense(self.shape, self.dtype.itemsize)
        axes = zip(self.shape, self.strides, dense, strict=True)
        return all(size == 1 or stride == expected for size, stride, expected in axes)

    def reshaped(self, shape: tuple[int, ...]) -> DeviceArray:
        """Return a view of the first elements of a contiguous array with another shape.

        Raises:
            ValueError: If the array is not contiguous or too small.
        """
        count = int(np.prod(shape, dtype=np.int64))
        if not self.contiguous or count > self.size:
            raise ValueError(f"{list(self.shape)} cannot be read as {list(shape)}")
        return DeviceArray(self.memory, self.address, shape, self.dtype)

    def __getitem__(self, key: Any) -> DeviceArray:
        """Return a view. Indices are integers, slices of step 1, and None for a new dimension.

        Raises:
            IndexError: If an index is out of range or of another kind.
        """
        keys = key if isinstance(key, tuple) else (key,)
        left = len(self.shape) - sum(part is not None for part in keys)
        if left < 0:
            raise IndexError(f"{len(keys)} indices for {len(self.shape)} dimensions")
        address = self.address
        shape = list[int]()
        strides = list[int]()
        dimensions = iter(zip(self.shape, self.strides, strict=True))
        for part in (*keys, *[slice(None)] * left):
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
        return DeviceArray(
            self.memory, address, tuple(shape), dtype=self.dtype, strides=tuple(strides)
        )

    def __setitem__(self, key: Any, source: DeviceArray) -> None:
        self[key].copy_from(source)

    def copy_from(self, source: DeviceArray) -> None:
        """Enqueue a copy of `source`, after the work that is in its stream now.

        Raises:
            ValueError: If shape or type differ.
        """
        if source.shape != self.shape or source.dtype != self.dtype:
            raise ValueError(
                f"{source.dtype}{list(source.shape)} does not fit {self.dtype}{list(self.shape)}"
            )
        if self.size == 0:
            return
        stream = self.memory.stream
        stream.follow(source.memory.stream)
        # Trailing dimensions that are dense in both arrays form one row of bytes. A call copies
        # evenly spaced rows.
        width = self.dtype.itemsize
        axis = len(self.shape)
        while axis:
            dense = self.strides[axis - 1] == source.strides[axis - 1] == width
            if self.shape[axis - 1] != 1 and not dense:
                break
            width *= self.shape[axis - 1]
            axis -= 1
        if not axis:
            stream.copy(self.address, source.address, width)
            return
        rows = self.shape[axis - 1]
        step = self.strides[axis - 1]
        source_step = source.strides[axis - 1]
        kind = stream.cuda.runtime.cudaMemcpyKind.cudaMemcpyDefault
        for index in np.ndindex(*self.shape[: axis - 1]):
            stream.cuda.call(
                "cudaMemcpy2DAsync",
                self._address_of(index),
                step,
                source._address_of(index),
                source_step,
                width,
                rows,
                kind,
                stream.handle,
            )

    def _address_of(self, index: tuple[int, ...]) -> int:
        offsets = (i * stride for i, stride in zip(index, self.strides, strict=False))
        return self.address + sum(offsets)


def _dense(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides = [0] * len(shape)
    step = itemsize
    for axis in reversed(range(len(shape))):
        strides[axis] = step
        step *= max(1, shape[axis])
    return tuple(strides)
