"""A stand-in for cuda.bindings.runtime: streams that lag behind the host by chance, and memory that is watched.

What is put into a stream is done later, in an order that streams and events allow and the seed chooses; what is put
there while it is captured is kept, and done when the graph is launched. It raises

- `Race` where two accesses to the same bytes, one of them writing, are not ordered by a stream, an event or the host;
- `Misuse` on memory that was freed, never allocated or is too small, on a dead stream or event, on pageable memory.

Device memory is host memory here: what runs on the CPU takes the part of the device; `enqueue` puts it into a stream.
Fresh memory is full of NaN. `lose(after)` makes the device fail, `refuse(name, error)` one function.
"""

from __future__ import annotations

import ctypes
import functools
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

cudaError_t = IntEnum(
    "cudaError_t",
    {
        "cudaSuccess": 0,
        "cudaErrorInvalidValue": 1,
        "cudaErrorMemoryAllocation": 2,
        "cudaErrorInsufficientDriver": 35,
        "cudaErrorNoDevice": 100,
        "cudaErrorInvalidDevice": 101,
        "cudaErrorInvalidResourceHandle": 400,
        "cudaErrorNotReady": 600,
        "cudaErrorIllegalAddress": 700,
        "cudaErrorStreamCaptureInvalidated": 901,
    },
)
cudaMemcpyKind = IntEnum(
    "cudaMemcpyKind",
    {
        "cudaMemcpyHostToHost": 0,
        "cudaMemcpyHostToDevice": 1,
        "cudaMemcpyDeviceToHost": 2,
        "cudaMemcpyDeviceToDevice": 3,
        "cudaMemcpyDefault": 4,
    },
)
cudaStreamCaptureMode = IntEnum(
    "cudaStreamCaptureMode",
    {"cudaStreamCaptureModeGlobal": 0, "cudaStreamCaptureModeThreadLocal": 1, "cudaStreamCaptureModeRelaxed": 2},
)
OK, INVALIDATED = cudaError_t(0), cudaError_t["cudaErrorStreamCaptureInvalidated"]
# What may wait for the device, and so not be done while another thread captures in global mode.
UNSAFE = frozenset(
    f"cuda{name}"
    for name in ("Malloc", "HostAlloc", "MemGetInfo", "EventQuery", "EventSynchronize", "StreamSynchronize")
) | {"cudaEventCreateWithFlags", "cudaStreamCreateWithPriority"}


class Misuse(Exception):
    """A use that CUDA leaves undefined."""


class Race(Misuse):
    """Two accesses that nothing orders."""


class Access(NamedTuple):
    """Bytes that something in a stream reads or writes."""

    address: int
    size: int
    writes: bool


class _Past(NamedTuple):
    access: Access
    stream: int
    number: int
    what: str


@dataclass(eq=False)
class _Block:
    data: np.ndarray
    pinned: bool
    freed: bool = False
    past: list[_Past] = field(default_factory=list)


@dataclass(eq=False)
class _Stream:
    queue: deque[tuple[str, Any]] = field(default_factory=deque)
    # Of each stream, how many of its entries are known to be done before what is put in next.
    clock: dict[int, int] = field(default_factory=dict)
    count: int = 0


@dataclass(eq=False)
class _Event:
    recorded: int = 0
    happened: int = 0
    clock: dict[int, int] = field(default_factory=dict)
    timed: bool = True


# What a captured stream holds: what, its accesses, and what is done.
_Graph = list[tuple[str, list[Access], Callable[[], None]]]


def _may_fail(function: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """A function that gives its results, if any, behind an error code; or an error alone, which tests can ask for."""

    @functools.wraps(function)
    def wrapped(fake: FakeCuda, *arguments: Any) -> tuple[Any, ...]:
        with fake._lock:
            found = fake._failure(function.__name__) or function(fake, *arguments)
        if isinstance(found, cudaError_t):
            return found, None
        return (OK,) if found is None else (OK, *(found if isinstance(found, tuple) else (found,)))

    return wrapped


class FakeCuda:
    """See the module. `free_bytes` is what cudaMemGetInfo says; `waits` counts how often the host waited, by function;
    `captures` and `launches` of graphs count. `architecture`: what the device says it is."""

    cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode = cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode
    cudaStreamNonBlocking, cudaEventDefault, cudaEventDisableTiming, cudaHostAllocPortable = 1, 0, 2, 1

    def __init__(
        self,
        seed: int = 0,
        devices: int = 1,
        free_bytes: int = 1 << 34,
        driver: int = 13000,
        architecture: tuple[int, int] = (9, 0),
    ) -> None:
        self.devices, self.free_bytes, self.driver, self.architecture = devices, free_bytes, driver, architecture
        self.waits: dict[str, int] = {}
        self.captures = self.launches = 0
        self._captured: dict[int, _Graph] = {}
        self._captors: dict[int, int] = {}  # id of the capturing thread, by stream
        self._graphs: dict[int, _Graph] = {}
        self._chance = random.Random(seed)
        self._lock = threading.RLock()
        self._blocks: dict[int, _Block] = {}
        self._streams: dict[int, _Stream] = {}
        self._events: dict[int, _Event] = {}
        self._host: dict[int, int] = {}
        self._handles = 1
        self._refused: dict[str, cudaError_t] = {}
        self._left: int | None = None
        self._busy = False
        self._put_off: list[tuple[int, bool]] = []
        self._capturing: int | None = None
        self._ignoring: set[int] = set()  # threads that ignore captures of others

    # For tests

    def refuse(self, name: str, error: str) -> None:
        """Let every call of a function fail."""
        self._refused[name] = cudaError_t[error]

    def lose(self, after: int) -> None:
        """Let everything fail once so many more entries of streams are done."""
        self._left = after

    def enqueue(self, stream: int, what: str, accesses: Iterable[Access], action: Callable[[], None]) -> None:
        """Put something of the CPU's into a stream; `action` runs when its turn comes."""
        with self._lock:
            if stream in self._captured:
                self._captured[stream].append((what, list(accesses), action))
                return
            entry = self._stream(stream)
            self._order(stream, entry, what, list(accesses))
            entry.queue.append(("do", action))
            self._progress()

    def capturing(self, stream: int) -> bool:
        return stream in self._captured

    @property
    def graphs(self) -> int:
        """Graphs that are not destroyed."""
        return len(self._graphs)

    @contextmanager
    def captured(self) -> Iterator[None]:
        """While a thread captures in global mode: others may then not do what may wait for the device."""
        with self._lock:
            self._capturing = threading.get_ident()
        time.sleep(self._chance.choice((0.0, 0.001)))
        try:
            yield
        finally:
            with self._lock:
                self._capturing = None

    def check_undisturbing(self, what: str) -> None:
        """Misuse where another thread captures, and this one does not ignore it."""
        here = threading.get_ident()
        if self._capturing not in (None, here) and here not in self._ignoring:
            raise Misuse(f"{what} while another thread captures")

    @property
    def allocated(self) -> int:
        """Bytes of the device that are not freed."""
        return sum(block.data.nbytes for block in self._blocks.values() if not block.freed and not block.pinned)

    @property
    def alive(self) -> tuple[int, int]:
        """Streams and events that are not destroyed."""
        return len(self._streams), len(self._events)

    # The functions of cuda.bindings.runtime

    def cudaDriverGetVersion(self) -> tuple[Any, ...]:
        return OK, self.driver

    def cudaRuntimeGetVersion(self) -> tuple[Any, ...]:
        return OK, 13050

    @_may_fail
    def cudaGetDeviceCount(self) -> Any:
        return self.devices

    def cudaGetErrorString(self, error: Any) -> tuple[Any, ...]:
        return OK, error.name.encode()

    def cudaThreadExchangeStreamCaptureMode(self, mode: Any) -> tuple[Any, ...]:
        assert mode == cudaStreamCaptureMode["cudaStreamCaptureModeThreadLocal"]
        self._ignoring.add(threading.get_ident())
        return OK, cudaStreamCaptureMode["cudaStreamCaptureModeGlobal"]

    @_may_fail
    def cudaSetDevice(self, device: int) -> Any:
        return None if device < self.devices else cudaError_t(101)

    @_may_fail
    def cudaMemGetInfo(self) -> Any:
        return self.free_bytes - self.allocated, self.free_bytes

    def cudaDeviceGetStreamPriorityRange(self) -> tuple[Any, ...]:
        return OK, 0, -5

    @_may_fail
    def cudaGetDeviceProperties(self, device: int) -> Any:
        return SimpleNamespace(major=self.architecture[0], minor=self.architecture[1])

    @_may_fail
    def cudaMalloc(self, size: int) -> Any:
        # In thread-local mode only a thread that captures must not allocate.
        if threading.get_ident() in self._captors.values():
            return INVALIDATED
        return cudaError_t(2) if size > self.free_bytes - self.allocated else self._allocate(size, pinned=False)

    @_may_fail
    def cudaHostAlloc(self, size: int, flags: int) -> Any:
        return self._allocate(size, pinned=True)

    def cudaFree(self, devPtr: int) -> tuple[Any, ...]:
        return self._release(devPtr, pinned=False)

    def cudaFreeHost(self, ptr: int) -> tuple[Any, ...]:
        return self._release(ptr, pinned=True)

    @_may_fail
    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: Any) -> Any:
        accesses = [Access(devPtr, count, True)]
        self.enqueue(int(stream), "cudaMemsetAsync", accesses, lambda: ctypes.memset(devPtr, value, count))

    @_may_fail
    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: Any, stream: Any) -> Any:
        accesses = [Access(src, count, False), Access(dst, count, True)]
        self.enqueue(int(stream), "cudaMemcpyAsync", accesses, lambda: ctypes.memmove(dst, src, count))

    @_may_fail
    def cudaMemcpy2DAsync(
        self, dst: int, dpitch: int, src: int, spitch: int, width: int, height: int, kind: Any, stream: Any
    ) -> Any:
        if width > min(dpitch, spitch):
            return cudaError_t(1)
        rows = range(height)
        accesses = [Access(src + row * spitch, width, False) for row in rows]
        accesses += [Access(dst + row * dpitch, width, True) for row in rows]

        def action() -> None:
            for row in rows:
                ctypes.memmove(dst + row * dpitch, src + row * spitch, width)

        self.enqueue(int(stream), "cudaMemcpy2DAsync", accesses, action)
        return None

    @_may_fail
    def cudaStreamCreateWithPriority(self, flags: int, priority: int) -> Any:
        return self._keep(self._streams, _Stream())

    def cudaStreamDestroy(self, stream: Any) -> tuple[Any, ...]:
        if self._stream(int(stream)).queue:
            raise Misuse("a stream is destroyed while something is in it")
        del self._streams[int(stream)]
        return (OK,)

    @_may_fail
    def cudaStreamWaitEvent(self, stream: Any, event: Any, flags: int) -> Any:
        entry, awaited = self._uncaptured(stream), self._event(event)
        entry.queue.append(("wait", (awaited, awaited.recorded)))
        _merge(entry.clock, awaited.clock)
        self._progress()

    def cudaStreamSynchronize(self, stream: Any) -> tuple[Any, ...]:
        with self._lock:
            entry = self._uncaptured(stream)
            clock = {**entry.clock, int(stream): entry.count}
            return self._host_waits("cudaStreamSynchronize", lambda: not entry.queue, clock)

    @_may_fail
    def cudaEventCreateWithFlags(self, flags: int) -> Any:
        return self._keep(self._events, _Event(timed=flags == 0))

    def cudaEventDestroy(self, event: Any) -> tuple[Any, ...]:
        self._event(event)
        del self._events[int(event)]
        return (OK,)

    @_may_fail
    def cudaEventRecord(self, event: Any, stream: Any) -> Any:
        entry, recorded = self._uncaptured(stream), self._event(event)
        recorded.recorded += 1
        recorded.clock = {**entry.clock, int(stream): entry.count}
        entry.queue.append(("record", (recorded, recorded.recorded)))
        self._progress()

    @_may_fail
    def cudaEventQuery(self, event: Any) -> Any:
        self._progress()
        asked = self._event(event)
        if asked.happened < asked.recorded:
            return cudaError_t(600)
        _merge(self._host, asked.clock)
        return None

    def cudaEventSynchronize(self, event: Any) -> tuple[Any, ...]:
        with self._lock:
            asked = self._event(event)
            return self._host_waits("cudaEventSynchronize", lambda: asked.happened >= asked.recorded, asked.clock)

    def cudaEventElapsedTime(self, start: Any, end: Any) -> tuple[Any, ...]:
        first, second = self._event(start), self._event(end)
        if not (first.timed and second.timed):
            return cudaError_t(400), None
        ready = first.happened == first.recorded and second.happened == second.recorded
        return (OK, 0.5) if ready else (cudaError_t(600), None)

    @_may_fail
    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> Any:
        self._stream(int(stream))
        assert mode == cudaStreamCaptureMode["cudaStreamCaptureModeThreadLocal"]
        self._captured[int(stream)] = []
        self._captors[int(stream)] = threading.get_ident()

    def cudaStreamEndCapture(self, stream: Any) -> tuple[Any, ...]:
        graph = self._captured.pop(int(stream))
        del self._captors[int(stream)]
        if failed := self._failure("cudaStreamEndCapture"):
            return failed, None
        self.captures += 1
        return OK, self._keep(self._graphs, graph)

    @_may_fail
    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:
        return self._keep(self._graphs, self._graphs[int(graph)])

    @_may_fail
    def cudaGraphLaunch(self, graphExec: Any, stream: Any) -> Any:
        self.launches += 1
        for what, accesses, action in self._graphs[int(graphExec)]:
            self.enqueue(int(stream), what, accesses, action)

    def cudaGraphDestroy(self, graph: Any) -> tuple[Any, ...]:
        del self._graphs[int(graph)]
        return (OK,)

    def cudaGraphExecDestroy(self, graphExec: Any) -> tuple[Any, ...]:
        del self._graphs[int(graphExec)]
        return (OK,)

    # What they are made of

    def _uncaptured(self, stream: Any) -> _Stream:
        if int(stream) in self._captured:
            raise Misuse("events and waits are not part of what is captured here")
        return self._stream(int(stream))

    def _keep(self, kept: dict[int, Any], made: Any) -> int:
        self._handles += 1
        kept[self._handles] = made
        return self._handles

    def _failure(self, name: str) -> cudaError_t | None:
        if name in UNSAFE:
            self.check_undisturbing(name)
        if self._left is not None and self._left <= 0:
            return cudaError_t["cudaErrorIllegalAddress"]
        return self._refused.get(name)

    def _stream(self, handle: int) -> _Stream:
        if handle not in self._streams:
            raise Misuse(f"stream {handle} does not exist")
        return self._streams[handle]

    def _event(self, handle: Any) -> _Event:
        if int(handle) not in self._events:
            raise Misuse(f"event {int(handle)} does not exist")
        return self._events[int(handle)]

    def _allocate(self, size: int, pinned: bool) -> int:
        room = np.full(size + 256, 0xFF, np.uint8)
        data = room[(start := -room.ctypes.data % 256) : start + size]  # at a multiple of 256, as cudaMalloc
        with self._lock:
            self._blocks[data.ctypes.data] = _Block(data, pinned)
        return int(data.ctypes.data)

    def _release(self, address: int, pinned: bool) -> tuple[Any, ...]:
        if not pinned:
            self.check_undisturbing("cudaFree")
        with self._lock:
            block = self._blocks.get(address)
            if block is None or block.freed or block.pinned is not pinned:
                raise Misuse(f"address {address} is freed twice, or was never allocated")
            if self._busy:
                # Python collects garbage whenever it likes, also in what takes the part of the device.
                self._put_off.append((address, pinned))
                return (OK,)
            # As cudaFree, which waits for the device.
            self._run(lambda: all(not entry.queue for entry in self._streams.values()))
            block.freed = True  # kept, so that nothing else gets its address
            block.data[:] = 0xFF
            return (OK,)

    def _order(self, handle: int, entry: _Stream, what: str, accesses: list[Access]) -> None:
        """Check what something new in a stream reads and writes against all that is not known to be before it."""
        _merge(entry.clock, self._host)
        entry.count += 1
        entry.clock[handle] = entry.count
        for access in accesses:
            if access.size:
                block = self._block(access, what)
                self._check(block, access, handle, entry, what)

    def _block(self, access: Access, what: str) -> _Block:
        for address, block in self._blocks.items():
            if address <= access.address < address + block.data.nbytes:
                if block.freed:
                    raise Misuse(f"{what} uses memory that was freed")
                if access.address + access.size > address + block.data.nbytes:
                    raise Misuse(f"{what} uses {access.size} bytes behind the end of an allocation")
                return block
        raise Misuse(f"{what} uses address {access.address}, which is neither device nor pinned memory")

    def _check(self, block: _Block, access: Access, handle: int, entry: _Stream, what: str) -> None:
        end, kept = access.address + access.size, list[_Past]()
        for past in block.past:
            begin = past.access.address
            meets = begin < end and access.address < begin + past.access.size
            known = entry.clock.get(past.stream, 0) >= past.number
            if meets and not known and (access.writes or past.access.writes):
                raise Race(f"{what} in stream {handle} and {past.what} in stream {past.stream} use the same bytes")
            covered = begin >= access.address and begin + past.access.size <= end and known
            if not (covered and (access.writes or (past.stream == handle and not past.access.writes))):
                kept.append(past)
        block.past = [*kept, _Past(access, handle, entry.count, what)]

    def _progress(self) -> None:
        for _ in range(self._chance.randrange(4)):
            if not self._step():
                return

    def _step(self) -> bool:
        """Do one entry of a stream that is ready: whether there was one."""
        ready = [entry for entry in self._streams.values() if entry.queue and _ready(entry.queue[0])]
        if not ready:
            return False
        kind, item = self._chance.choice(ready).queue.popleft()
        if kind == "record":
            event, number = item
            event.happened = max(event.happened, number)
        elif kind == "do" and self._failure("") is None:
            self._busy = True
            try:
                item()
            finally:
                self._busy = False
            if self._left is not None:
                self._left -= 1
            while self._put_off:
                self._release(*self._put_off.pop())
        return True

    def _run(self, enough: Callable[[], bool]) -> None:
        while not enough():
            if not self._step():
                raise Misuse("the host waits for what never happens")

    def _host_waits(self, name: str, enough: Callable[[], bool], clock: dict[int, int]) -> tuple[Any, ...]:
        self.waits[name] = self.waits.get(name, 0) + 1
        if failed := self._failure(name):
            return (failed,)
        self._run(enough)
        _merge(self._host, clock)
        return (self._failure(name) or OK,)


def _ready(entry: tuple[str, Any]) -> bool:
    if entry[0] != "wait":
        return True
    event, number = entry[1]
    return bool(event.happened >= number)


def _merge(clock: dict[int, int], other: dict[int, int]) -> None:
    for stream, count in other.items():
        clock[stream] = max(clock.get(stream, 0), count)
