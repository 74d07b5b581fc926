"""A CUDA device through cuda-python: memory, streams, events and graphs.

The host waits only in functions called `wait` and `synchronize`.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np

from runtime.engines.cuda.device_array import DeviceArray, Memory
from runtime.errors import CapacityError, DeviceError, first_line

INSTALL = "pip install 'freeexport[gpu]'"
# Errors that destroy the context and leave the device unusable for the process (cudaError_t of the
# CUDA Runtime API).
LOST = frozenset(
    {
        "cudaErrorAssert",
        "cudaErrorContained",
        "cudaErrorContextIsDestroyed",
        "cudaErrorDevicesUnavailable",
        "cudaErrorECCUncorrectable",
        "cudaErrorExternalDevice",
        "cudaErrorHardwareStackError",
        "cudaErrorIllegalAddress",
        "cudaErrorIllegalInstruction",
        "cudaErrorInvalidAddressSpace",
        "cudaErrorInvalidPc",
        "cudaErrorLaunchFailure",
        "cudaErrorLaunchTimeout",
        "cudaErrorMisalignedAddress",
        "cudaErrorNvlinkUncorrectable",
        "cudaErrorTensorMemoryLeak",
        "cudaErrorUnknown",
    }
)


class Cuda:
    """CUDA device number `index`, usable from all threads.

    Everything it creates is freed by `close`. After an error that loses the device, every use
    except `close` raises DeviceError.
    """

    def __init__(self, index: int, runtime: Any = None) -> None:
        """Open the device.

        Args:
            index: Number of the device.
            runtime: Module `cuda.bindings.runtime`. Default: import it.

        Raises:
            DeviceError: If cuda-python, the driver or the device is missing.
        """
        self.index = index
        self.runtime = runtime or _import_runtime()
        self.lost = ""
        # Held during a capture, in which its thread must not free memory.
        self.undisturbed = threading.Lock()
        self._thread = threading.local()
        # Reentrant: garbage collection may call `free` while this thread holds the lock.
        self._lock = threading.RLock()
        self._deferred: deque[int] = deque()
        self._memory: set[int] = set()
        self._streams: list[CudaStream] = []
        self._ends = ExitStack()  # of streams, events and pinned memory
        self._check_driver()

    def __str__(self) -> str:
        return f"cuda:{self.index}"

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the CUDA Runtime API and return its results without the error code.

        Raises:
            DeviceError: If the call fails, or the device was lost before.
            CapacityError: If the device has too little memory.
        """
        if self.lost:
            raise DeviceError(
                f"device {self} was lost ({self.lost}); close the session and restart the program"
            )
        self.enter_thread()
        failed, *values = getattr(self.runtime, name)(*arguments)
        if int(failed):
            raise self._error(name, failed)
        return values[0] if len(values) == 1 else tuple(values)

    def enter_thread(self) -> None:
        """Let this thread ignore captures of other threads.

        ONNX Runtime captures in global mode. By default, threads must not allocate, synchronize or
        query events while another one captures so, in this session or any other.
        """
        if not hasattr(self._thread, "entered"):
            mode = self.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
            self.runtime.cudaThreadExchangeStreamCaptureMode(mode)
            self._thread.entered = True

    def make_current(self) -> None:
        """Make this the thread's device. Needed before memory, streams and events are created."""
        self.call("cudaSetDevice", self.index)

    def require(self, needed: int, what: str) -> None:
        """Check that `needed` bytes are free for `what`.

        Raises:
            CapacityError: If they are not.
        """
        self.make_current()
        self._free_deferred()
        free, _ = self.call("cudaMemGetInfo")
        if needed > free:
            raise CapacityError(
                f"{what} needs {needed} bytes of device {self}, and {free} are free; "
                "lower capacity or slots, or free memory there"
            )

    def stream(self, urgent: bool) -> CudaStream:
        """Create a stream that does not wait for others.

        Args:
            urgent: Run before streams that are not urgent, if both have work.
        """
        self.make_current()
        least, greatest = self.call("cudaDeviceGetStreamPriorityRange")
        flags = self.runtime.cudaStreamNonBlocking
        priority = greatest if urgent else least
        handle = self.call("cudaStreamCreateWithPriority", flags, priority)
        self._ends.callback(self.runtime.cudaStreamDestroy, handle)
        self._streams.append(CudaStream(self, handle))
        return self._streams[-1]

    def event(self, timed: bool = False) -> CudaEvent:
        """Create an event. It counts as reached until it is recorded."""
        self.make_current()
        flags = self.runtime.cudaEventDefault if timed else self.runtime.cudaEventDisableTiming
        handle = self.call("cudaEventCreateWithFlags", flags)
        self._ends.callback(self.runtime.cudaEventDestroy, handle)
        return CudaEvent(self, handle)

    def empty(self, shape: tuple[int, ...], dtype: Any, stream: CudaStream) -> DeviceArray:
        """Allocate an uninitialized array. It is freed with its last view.

        Args:
            shape: Shape of the array.
            dtype: Type of the elements.
            stream: Stream that copies to the array are enqueued into.

        Raises:
            CapacityError: If the device has too little memory.
        """
        dtype = np.dtype(dtype)
        size = max(1, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
        self.make_current()
        self._free_deferred()
        address = int(self.call("cudaMalloc", size))
        with self._lock:
            self._memory.add(address)
        return DeviceArray(Memory(address, size, stream), address, shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: Any, stream: CudaStream) -> DeviceArray:
        """Allocate an array that is zeroed in `stream`."""
        array = self.empty(shape, dtype, stream)
        self.call("cudaMemsetAsync", array.address, 0, array.memory.size, stream.handle)
        return array

    def pinned(self, size: int) -> np.ndarray:
        """Allocate pinned host memory, uint8 [size], for asynchronous copies.

        It is freed by `close`.
        """
        self.make_current()
        address = int(self.call("cudaHostAlloc", max(1, size), self.runtime.cudaHostAllocPortable))
        self._ends.callback(self.runtime.cudaFreeHost, address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def free(self, address: int) -> None:
        """Free device memory at once, or with the next allocation if a thread is capturing.

        Does nothing after `close`, or if the device is lost.
        """
        # Garbage collection calls this from any thread, the capturing one included.
        self._deferred.append(address)
        self._free_deferred()

    def _free_deferred(self) -> None:
        if not self._deferred or not self.undisturbed.acquire(blocking=False):
            return
        try:
            while self._deferred:
                address = self._deferred.popleft()
                with self._lock:
                    known = address in self._memory
                    self._memory.discard(address)
                if known and not self.lost:
                    self.enter_thread()
                    self.runtime.cudaFree(address)
        finally:
            self.undisturbed.release()

    def close(self) -> None:
        """Wait for all streams and free everything. Idempotent. The driver frees a lost device
        itself.
        """
        with self._lock:
            memory = self._memory
            self._memory = set()
            streams = self._streams
            self._streams = []
            ends = self._ends.pop_all()
        if self.lost:
            return
        for stream in streams:
            self.runtime.cudaStreamSynchronize(stream.handle)
        for address in memory:
            self.runtime.cudaFree(address)
        ends.close()

    def _error(self, name: str, failed: Any) -> Exception:
        code = getattr(failed, "name", str(failed))
        _, message = self.runtime.cudaGetErrorString(failed)
        if isinstance(message, bytes):
            message = message.decode(errors="replace")
        text = f"{name}: {code}, {message}"
        if code == "cudaErrorMemoryAllocation":
            return CapacityError(
                f"device {self} has too little memory ({text}); lower capacity or slots"
            )
        if code in LOST:
            self.lost = text
            return DeviceError(
                f"device {self} was lost ({text}) and running requests failed; "
                "close the session and restart the program"
            )
        return DeviceError(f"device {self} refused a call ({text}); run freeexport doctor")

    def _check_driver(self) -> None:
        failed, version = self.runtime.cudaDriverGetVersion()
        if int(failed) or not version:
            raise DeviceError(
                f"device {self}: no NVIDIA driver is loaded; install one, or choose device='cpu'"
            )
        failed, count = self.runtime.cudaGetDeviceCount()
        name = getattr(failed, "name", str(failed))
        if name == "cudaErrorInsufficientDriver":
            _, required = self.runtime.cudaRuntimeGetVersion()
            raise DeviceError(
                f"device {self}: the driver supports CUDA {dotted(version)}, "
                f"and cuda-python needs {dotted(required)}; "
                f"install a newer driver, or pip install 'cuda-python=={version // 1000}.*'"
            )
        if int(failed) and name != "cudaErrorNoDevice":
            raise DeviceError(
                f"device {self}: CUDA cannot be initialized ({name}); run freeexport doctor"
            )
        if int(failed) or self.index >= count:
            count = 0 if int(failed) else count
            raise DeviceError(
                f"device {self} does not exist: this machine has {count} CUDA devices; "
                "choose another"
            )


class CudaStream:
    """A queue of the device.

    Args:
        cuda: The device.
        handle: The runtime's stream object. int(handle) is its address.
    """

    def __init__(self, cuda: Cuda, handle: Any) -> None:
        self.cuda = cuda
        self.handle = handle
        self._marker: CudaEvent | None = None

    def record(self, event: CudaEvent) -> None:
        """Record `event` after the work that is in the queue now."""
        self.cuda.call("cudaEventRecord", event.handle, self.handle)

    def wait(self, event: CudaEvent) -> None:
        """Let work enqueued from now on start after `event`. Does not block the host."""
        self.cuda.call("cudaStreamWaitEvent", self.handle, event.handle, 0)

    def follow(self, other: CudaStream) -> None:
        """Let work enqueued from now on start after the work that is in `other` now."""
        if other is not self:
            if other._marker is None:
                other._marker = self.cuda.event()
            other.record(other._marker)
            self.wait(other._marker)

    def copy(self, target: int, source: int, size: int) -> None:
        """Enqueue a copy of `size` bytes between addresses, each on the device or pinned."""
        kind = self.cuda.runtime.cudaMemcpyKind.cudaMemcpyDefault
        self.cuda.call("cudaMemcpyAsync", target, source, size, kind, self.handle)

    def synchronize(self) -> None:
        """Block the host until the queue is empty. Never used while decoding."""
        self.cuda.call("cudaStreamSynchronize", self.handle)


class CudaEvent:
    """A point in a stream. It can be recorded again."""

    def __init__(self, cuda: Cuda, handle: Any) -> None:
        self.cuda = cuda
        self.handle = handle

    def done(self) -> bool:
        """Return True if the event has been reached."""
        self.cuda.enter_thread()
        failed, *_ = self.cuda.runtime.cudaEventQuery(self.handle)
        if getattr(failed, "name", "") == "cudaErrorNotReady":
            return False
        if int(failed):
            raise self.cuda._error("cudaEventQuery", failed)
        return True

    def wait(self) -> None:
        """Block the host until the event is reached."""
        self.cuda.call("cudaEventSynchronize", self.handle)

    def seconds_since(self, earlier: CudaEvent) -> float:
        """Return the seconds of device time between two timed events that have been reached."""
        return float(self.cuda.call("cudaEventElapsedTime", earlier.handle, self.handle)) / 1e3


class CudaGraph:
    """A captured sequence of work, which can be launched repeatedly.

    It holds addresses, so the memory must outlive it.

    Args:
        stream: Stream of the work.
        put: Enqueues the work, which is recorded and not executed.
    """

    def __init__(self, stream: CudaStream, put: Callable[[], None]) -> None:
        self._stream = stream
        cuda = stream.cuda
        self._graph: Any = None
        # Check only this thread's calls for operations that capture does not allow.
        mode = cuda.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        cuda.call("cudaStreamBeginCapture", stream.handle, mode)
        try:
            put()
        except BaseException:
            # Discard the capture. The original error is more informative than errors of this.
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
        """Enqueue the recorded work into the stream."""
        self._stream.cuda.call("cudaGraphLaunch", self._graph, self._stream.handle)

    def __del__(self) -> None:
        if self._graph is not None and not self._stream.cuda.lost:
            self._stream.cuda.runtime.cudaGraphExecDestroy(self._graph)


def _import_runtime() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise DeviceError(
            f"a CUDA device needs cuda-python, which cannot be imported ({first_line(error)}); "
            f"run: {INSTALL}"
        ) from error
    return runtime


def dotted(version: int) -> str:
    """Return a CUDA version number such as 13000 as text, 13.0."""
    return f"{version // 1000}.{version % 1000 // 10}"
