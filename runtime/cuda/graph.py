"""A CUDA graph: what was put into a stream once, to be put in again at the cost of one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runtime.cuda.driver import Stream


class CudaGraph:
    """What `put` puts into `stream`, recorded without being done. It holds addresses: the memory must outlive it."""

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
