"""The fake of CUDA with graphs: what is put into a stream while it is captured is kept, and done when launched."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np
from fake_cuda import OK, Access, FakeCuda, Misuse, _Block, cudaError_t

cudaStreamCaptureMode = IntEnum(
    "cudaStreamCaptureMode",
    {"cudaStreamCaptureModeGlobal": 0, "cudaStreamCaptureModeThreadLocal": 1, "cudaStreamCaptureModeRelaxed": 2},
)
INVALIDATED = cudaError_t["cudaErrorStreamCaptureInvalidated"]


@dataclass
class _Graph:
    entries: list[tuple[str, list[Access], Callable[[], None]]] = field(default_factory=list)


class GraphCuda(FakeCuda):
    """`architecture`: what the device says it is. `captures` and `launches` count."""

    cudaStreamCaptureMode = cudaStreamCaptureMode

    def __init__(self, *arguments: Any, architecture: tuple[int, int] = (9, 0), **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.architecture = architecture
        self.captures = self.launches = 0
        self._captured: dict[int, _Graph] = {}
        self._graphs: dict[int, _Graph] = {}

    def capturing(self, stream: int) -> bool:
        return stream in self._captured

    @property
    def graphs(self) -> int:
        """Graphs that are not destroyed."""
        return len(self._graphs)

    def enqueue(self, stream: int, what: str, accesses: Iterable[Access], action: Callable[[], None]) -> None:
        with self._lock:
            if stream in self._captured:
                self._captured[stream].entries.append((what, list(accesses), action))
            else:
                super().enqueue(stream, what, accesses, action)

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        if failed := self._failure("cudaGetDeviceProperties"):
            return failed, None
        return OK, SimpleNamespace(major=self.architecture[0], minor=self.architecture[1])

    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> tuple[Any, ...]:
        if failed := self._failure("cudaStreamBeginCapture"):
            return (failed,)
        self._stream(int(stream))
        self._captured[int(stream)] = _Graph()
        return (OK,)

    def cudaStreamEndCapture(self, stream: Any) -> tuple[Any, ...]:
        graph = self._captured.pop(int(stream))
        if failed := self._failure("cudaStreamEndCapture"):
            return failed, None
        self.captures += 1
        return OK, self._keep(graph)

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, ...]:
        if failed := self._failure("cudaGraphInstantiate"):
            return failed, None
        return OK, self._keep(self._graphs[int(graph)])

    def cudaGraphLaunch(self, graphExec: Any, stream: Any) -> tuple[Any, ...]:
        if failed := self._failure("cudaGraphLaunch"):
            return (failed,)
        self.launches += 1
        for what, accesses, action in self._graphs[int(graphExec)].entries:
            self.enqueue(int(stream), what, accesses, action)
        return (OK,)

    def cudaGraphDestroy(self, graph: Any) -> tuple[Any, ...]:
        del self._graphs[int(graph)]
        return (OK,)

    def cudaGraphExecDestroy(self, graphExec: Any) -> tuple[Any, ...]:
        del self._graphs[int(graphExec)]
        return (OK,)

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        if self._captured:
            return INVALIDATED, None
        return super().cudaMalloc(size)

    def cudaStreamSynchronize(self, stream: Any) -> tuple[Any, ...]:
        if int(stream) in self._captured:
            raise Misuse("the host waits for a stream that is being captured")
        return super().cudaStreamSynchronize(stream)

    def cudaEventRecord(self, event: Any, stream: Any) -> tuple[Any, ...]:
        if int(stream) in self._captured:
            raise Misuse("events are not part of what is captured here")
        return super().cudaEventRecord(event, stream)

    def cudaStreamWaitEvent(self, stream: Any, event: Any, flags: int) -> tuple[Any, ...]:
        if int(stream) in self._captured:
            raise Misuse("a captured stream waits for what is not captured")
        return super().cudaStreamWaitEvent(stream, event, flags)

    def _keep(self, graph: _Graph) -> int:
        self._handles += 1
        self._graphs[self._handles] = graph
        return self._handles

    def _allocate(self, size: int, pinned: bool) -> int:
        """At a multiple of 256, as cudaMalloc."""
        room = np.full(size + 256, 0xFF, np.uint8)
        start = -room.ctypes.data % 256
        data = room[start : start + size]
        with self._lock:
            self._blocks[data.ctypes.data] = _Block(data, pinned)
        return int(data.ctypes.data)
