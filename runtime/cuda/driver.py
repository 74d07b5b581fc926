"""A CUDA device through cuda-python: memory, streams and events. Nothing here waits but `wait` and `synchronize`."""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np

from runtime.errors import CapacityError, DeviceError, first_line

INSTALL = "pip install 'freeexport[gpu]'"
# What leaves a device unusable for the rest of the process (CUDA Runtime API, cudaError_t): its context is lost.
LOST = frozenset(
    f"cudaError{name}"
    for name in (
        "IllegalAddress", "LaunchFailure", "LaunchTimeout", "Assert", "HardwareStackError", "IllegalInstruction",
        "MisalignedAddress", "InvalidAddressSpace", "InvalidPc", "ECCUncorrectable", "NvlinkUncorrectable",
        "DevicesUnavailable", "ContextIsDestroyed", "Contained", "TensorMemoryLeak", "ExternalDevice", "Unknown",
    )
)  # fmt: skip


class Cuda:
    """Device number `index`, for all threads. What it hands out is freed by `close`. After an error that loses the
    device every use raises DeviceError, but `close`, which then frees nothing."""

    def __init__(self, index: int, runtime: Any = None) -> None:
        """`runtime`: the module cuda.bindings.runtime, imported where it is None. DeviceError where there is no
        cuda-python, no driver, or no such device."""
        self.index = index
        self.runtime = runtime or _import_runtime()
        self.lost = ""
        # Held by whoever puts much into a stream, so that another can be captured without being disturbed.
        self.undisturbed = threading.Lock()
        # Python may collect garbage, and so come to `free`, while this thread holds it.
        self._lock = threading.RLock()
        self._put_off: deque[int] = deque()
        self._memory: set[int] = set()
        self._streams: list[Stream] = []
        self._ends = ExitStack()  # of streams, events and pinned memory
        self._check_driver()

    def __str__(self) -> str:
        return f"cuda:{self.index}"

    def call(self, name: str, *arguments: Any) -> Any:
        """A function of the CUDA Runtime API: what it returns after its error code. Raises DeviceError."""
        if self.lost:
            raise DeviceError(f"device {self} was lost ({self.lost}); close the session and start the program anew")
        failed, *values = getattr(self.runtime, name)(*arguments)
        if int(failed):
            raise self._error(name, failed)
        return values[0] if len(values) == 1 else tuple(values)

    def make_current(self) -> None:
        """Make it the device of this thread: needed before memory, streams and events are made."""
        self.call("cudaSetDevice", self.index)

    def require(self, needed: int, what: str) -> None:
        """CapacityError where fewer than `needed` bytes are free; `what` needs them."""
        self.make_current()
        self._free_put_off()
        free, _ = self.call("cudaMemGetInfo")
        if needed > free:
            raise CapacityError(
                f"{what} needs {needed} bytes of device {self}, and {free} are free; lower capacity or slots, or free "
                "memory there"
            )

    def stream(self, urgent: bool) -> Stream:
        """A new stream that waits for no other; what is `urgent` goes before what is not, where both are ready."""
        self.make_current()
        least, greatest = self.call("cudaDeviceGetStreamPriorityRange")
        flags, priority = self.runtime.cudaStreamNonBlocking, greatest if urgent else least
        handle = self.call("cudaStreamCreateWithPriority", flags, priority)
        self._ends.callback(self.runtime.cudaStreamDestroy, handle)
        self._streams.append(Stream(self, handle))
        return self._streams[-1]

    def event(self, timed: bool = False) -> Event:
        """A new event, of the past until it is recorded."""
        self.make_current()
        flags = self.runtime.cudaEventDefault if timed else self.runtime.cudaEventDisableTiming
        handle = self.call("cudaEventCreateWithFlags", flags)
        self._ends.callback(self.runtime.cudaEventDestroy, handle)
        return Event(self, handle)

    def empty(self, shape: tuple[int, ...], dtype: Any, stream: Stream) -> DeviceArray:
        """Device memory whose copies are put into `stream`; freed with its last view. CapacityError where it is too
        much."""
        dtype = np.dtype(dtype)
        size = max(1, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
        self.make_current()
        self._free_put_off()
        address = int(self.call("cudaMalloc", size))
        with self._lock:
            self._memory.add(address)
        return DeviceArray(Memory(self, address, size, stream), address, shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: Any, stream: Stream) -> DeviceArray:
        """A new array, zeroed in `stream`."""
        array = self.empty(shape, dtype, stream)
        self.call("cudaMemsetAsync", array.address, 0, array.memory.size, stream.handle)
        return array

    def pinned(self, size: int) -> np.ndarray:
        """Host memory uint8 [size] that copies to and from the device do not have to wait for. Lives until `close`."""
        self.make_current()
        address = int(self.call("cudaHostAlloc", max(1, size), self.runtime.cudaHostAllocPortable))
        self._ends.callback(self.runtime.cudaFreeHost, address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def free(self, address: int) -> None:
        """Give device memory back: at once, or where another thread may be capturing, when memory is next wanted.
        After `close`, or where the device is lost, nothing is left to give back."""
        # Whatever thread collects garbage comes here: it must neither disturb a capture nor wait for its end.
        self._put_off.append(address)
        self._free_put_off()

    def _free_put_off(self) -> None:
        if not self._put_off or not self.undisturbed.acquire(blocking=False):
            return
        try:
            while self._put_off:
                address = self._put_off.popleft()
                with self._lock:
                    known = address in self._memory
                    self._memory.discard(address)
                if known and not self.lost:
                    self.runtime.cudaFree(address)
        finally:
            self.undisturbed.release()

    def close(self) -> None:
        """Wait for all streams and free everything. Idempotent, and silent where the device is lost: then the driver
        has freed it."""
        with self._lock:
            memory, self._memory = self._memory, set()
            streams, self._streams = self._streams, []
            ends = self._ends.pop_all()
        if self.lost:
            return
        for stream in streams:
            self.runtime.cudaStreamSynchronize(stream.handle)
        for address in memory:
            self.runtime.cudaFree(address)
        ends.close()

    def _error(self, name: str, failed: Any) -> Exception:
        code, (_, said) = getattr(failed, "name", str(failed)), self.runtime.cudaGetErrorString(failed)
        text = f"{name}: {code}, {said.decode(errors='replace') if isinstance(said, bytes) else said}"
        if code == "cudaErrorMemoryAllocation":
            return CapacityError(f"device {self} has too little memory ({text}); lower capacity or slots")
        if code in LOST:
            self.lost = text
            return DeviceError(
                f"device {self} was lost ({text}); requests in flight end here: close the session, start anew"
            )
        return DeviceError(f"device {self} refused a call ({text}); run freeexport doctor")

    def _check_driver(self) -> None:
        failed, version = self.runtime.cudaDriverGetVersion()
        if int(failed) or not version:
            raise DeviceError(f"device {self}: no NVIDIA driver is loaded here; install one, or choose device='cpu'")
        failed, count = self.runtime.cudaGetDeviceCount()
        name = getattr(failed, "name", str(failed))
        if name == "cudaErrorInsufficientDriver":
            _, own = self.runtime.cudaRuntimeGetVersion()
            raise DeviceError(
                f"device {self}: the driver is for CUDA {dotted(version)} and cuda-python for {dotted(own)}; "
                f"install a newer driver, or pip install 'cuda-python=={version // 1000}.*'"
            )
        if int(failed) and name != "cudaErrorNoDevice":
            raise DeviceError(f"device {self}: CUDA does not start ({name}); run freeexport doctor")
        if int(failed) or self.index >= count:
            count = 0 if int(failed) else count
            raise DeviceError(f"device {self} does not exist: this machine shows {count} CUDA devices; choose another")


class Stream:
    """A queue of the device. `handle` is what its functions take, int(handle) its address."""

    def __init__(self, cuda: Cuda, handle: Any) -> None:
        self.cuda, self.handle = cuda, handle
        self._passing: Event | None = None

    def record(self, event: Event) -> None:
        """Let `event` happen once all is done that is in the queue now."""
        self.cuda.call("cudaEventRecord", event.handle, self.handle)

    def wait(self, event: Event) -> None:
        """Make work that is put into the queue from now on begin after `event`. The host goes on."""
        self.cuda.call("cudaStreamWaitEvent", self.handle, event.handle, 0)

    def follow(self, other: Stream) -> None:
        """Make work that is put into this queue from now on begin after all that is in `other` now."""
        if other is not self:
            if other._passing is None:
                other._passing = self.cuda.event()
            other.record(other._passing)
            self.wait(other._passing)

    def copy(self, target: int, source: int, size: int) -> None:
        """Put a copy of `size` bytes between addresses, each of the device or pinned, into the queue."""
        kind = self.cuda.runtime.cudaMemcpyKind.cudaMemcpyDefault
        self.cuda.call("cudaMemcpyAsync", target, source, size, kind, self.handle)

    def synchronize(self) -> None:
        """Let the host wait until the queue is empty. Never on the way to a token."""
        self.cuda.call("cudaStreamSynchronize", self.handle)


class Event:
    """A point in a stream; recorded again, it is another point."""

    def __init__(self, cuda: Cuda, handle: Any) -> None:
        self.cuda, self.handle = cuda, handle

    def done(self) -> bool:
        """Whether it has happened."""
        failed, *_ = self.cuda.runtime.cudaEventQuery(self.handle)
        if getattr(failed, "name", "") == "cudaErrorNotReady":
            return False
        if int(failed):
            raise self.cuda._error("cudaEventQuery", failed)
        return True

    def wait(self) -> None:
        """Let the host wait until it has happened."""
        self.cuda.call("cudaEventSynchronize", self.handle)

    def seconds_since(self, earlier: Event) -> float:
        """Seconds of the device between two timed events that have happened."""
        return float(self.cuda.call("cudaEventElapsedTime", earlier.handle, self.handle)) / 1e3


class CudaGraph:
    """Records what `put` puts into `stream`, without being done. It holds addresses: the memory must outlive it."""

    def __init__(self, stream: Stream, put: Callable[[], None]) -> None:
        self._stream, cuda = stream, stream.cuda
        self._graph: Any = None
        # Only this thread's calls are watched for what capture does not allow.
        mode = cuda.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        cuda.call("cudaStreamBeginCapture", stream.handle, mode)
        try:
            put()
        except BaseException:
            # What was captured is discarded; the error that ended it says more than this one's would.
            _, graph = cuda.runtime.cudaStreamEndCapture(stream.handle)
            if graph is not None and int(graph):
                cuda.runtime.cudaGraphDestroy(graph)
            raise
        graph = cuda.call("cudaStreamEndCapture", stream.handle)
        try:
            self._graph = cuda.call("cudaGraphInstantiate", graph, 0)
        finally:
            cuda.runtime.cudaGraphDestroy(graph)

    def launch(self) -> None:
        """Put it into the stream."""
        self._stream.cuda.call("cudaGraphLaunch", self._graph, self._stream.handle)

    def __del__(self) -> None:
        if self._graph is not None and not self._stream.cuda.lost:
            self._stream.cuda.runtime.cudaGraphExecDestroy(self._graph)


def _import_runtime() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise DeviceError(
            f"a CUDA device needs cuda-python, which cannot be imported ({first_line(error)}); {INSTALL}"
        ) from error
    return runtime


def dotted(version: int) -> str:
    """A version as CUDA's functions say it, 13000, as people do: 13.0."""
    return f"{version // 1000}.{version % 1000 // 10}"


class Memory:
    """An allocation; freed when the last array on it is gone. `stream` is where copies to it are put."""

    __slots__ = ("address", "cuda", "size", "stream")

    def __init__(self, cuda: Cuda, address: int, size: int, stream: Stream) -> None:
        self.cuda, self.address, self.size, self.stream = cuda, address, size, stream

    def __del__(self) -> None:
        self.cuda.free(self.address)


class DeviceArray:
    """Like a numpy array as far as the runtime needs one: `shape`, `dtype`, `strides` in bytes, basic slicing, and
    assignment from arrays of the same shape and type on the same device, which returns before it is done. bfloat16,
    which numpy does not have, is uint16 here. `address` is that of the first element."""

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
        """A view of the same elements, at most as many, from the first on; only of a contiguous array."""
        count = int(np.prod(shape, dtype=np.int64))
        if not self.contiguous or count > self.size:
            raise ValueError(f"{list(self.shape)} cannot be read as {list(shape)}")
        return DeviceArray(self.memory, self.address, shape, self.dtype)

    def __getitem__(self, key: Any) -> DeviceArray:
        """Integers, slices of step 1, and None for a dimension of 1. IndexError for anything else or outside."""
        keys = key if isinstance(key, tuple) else (key,)
        left = len(self.shape) - sum(part is not None for part in keys)
        if left < 0:
            raise IndexError(f"{len(keys)} indices for {len(self.shape)} dimensions")
        address, shape, strides = self.address, list[int](), list[int]()
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
        return DeviceArray(self.memory, address, tuple(shape), self.dtype, tuple(strides))

    def __setitem__(self, key: Any, source: DeviceArray) -> None:
        self[key].copy_from(source)

    def copy_from(self, source: DeviceArray) -> None:
        """Put a copy of `source` into the stream of this array's memory, after what the source's stream has now."""
        if source.shape != self.shape or source.dtype != self.dtype:
            raise ValueError(f"{source.dtype}{list(source.shape)} does not fit {self.dtype}{list(self.shape)}")
        if self.size == 0:
            return
        stream = self.memory.stream
        stream.follow(source.memory.stream)
        # The last dimensions that are dense in both are one row of bytes; a call copies rows at even steps.
        width, axis = self.dtype.itemsize, len(self.shape)
        while axis and (self.shape[axis - 1] == 1 or self.strides[axis - 1] == source.strides[axis - 1] == width):
            width *= self.shape[axis - 1]
            axis -= 1
        if not axis:
            stream.copy(self.address, source.address, width)
            return
        rows, step, step_there = self.shape[axis - 1], self.strides[axis - 1], source.strides[axis - 1]
        cuda, kind = stream.cuda, stream.cuda.runtime.cudaMemcpyKind.cudaMemcpyDefault
        for index in np.ndindex(*self.shape[: axis - 1]):
            to, at = (
                array.address + sum(i * stride for i, stride in zip(index, array.strides, strict=False))
                for array in (self, source)
            )
            cuda.call("cudaMemcpy2DAsync", to, step, at, step_there, width, rows, kind, stream.handle)


def _dense(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides, step = [0] * len(shape), itemsize
    for axis in reversed(range(len(shape))):
        strides[axis] = step
        step *= max(1, shape[axis])
    return tuple(strides)
