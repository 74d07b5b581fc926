"""A runner on a GPU: an engine, its KV cache, and a stream. Only a wait for an event holds the host up.

Not yet run on a GPU; checked against tests/fakes/fake_cuda.py.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from runtime.cuda import driver as cuda
from runtime.cuda.device_array import DeviceArray
from runtime.engines.kv_cache import KVCache
from runtime.engines.runner import Event, Runner
from runtime.errors import EngineError


class CudaRunner(Runner):
    """`engine`: its calls have `enqueue`, which puts them into `stream`, and `finish`, which waits for them and lets
    the host's arrays have what they gave. `beside`: the caller goes on meanwhile.

    Calls are put into the stream by one thread, for two reasons: it takes as long as hundreds of kernels take to start,
    in which another runner goes on; and what ONNX Runtime captures as a CUDA graph belongs to a thread.
    """

    def __init__(self, engine: Any, cache: KVCache, stream: cuda.Stream, beside: bool) -> None:
        super().__init__(engine, cache)
        self.stream, self.beside = stream, beside
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="runner")
        device = stream.cuda
        # Enough for what is ever under way, so that none is made while another runner captures.
        self._events = [(device.event(timed=True), device.event(timed=True)) for _ in range(4)]
        self._scratch: dict[str, DeviceArray] = {}
        self._origin: cuda.Event | None = None
        self._seen: list[tuple[float, float]] = []

    def submit(self, call: Any) -> Event:
        return _Enqueued(self, call, self._thread.submit(self._enqueue, call))

    def run(self, call: Any) -> float:
        return self.submit(call).wait()

    def value(self, array: Any) -> Any:
        return array

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        return self.stream.cuda.zeros(shape, dtype, self.stream)

    def scratch(self, name: str, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        """Kept, and as large as it ever was: memory of the device is not had at once."""
        size = int(np.prod(shape))
        if name not in self._scratch or self._scratch[name].size < size:
            self._scratch[name] = self.zeros((size,), dtype)
        return self._scratch[name].reshaped(shape)

    def watch(self, origin: cuda.Event | None) -> list[tuple[float, float]]:
        """Begin and end of the calls from now on, in seconds of the device since the timed event `origin`, each as it
        is waited for; None ends that."""
        self._origin, self._seen = origin, []
        return self._seen

    def close(self) -> None:
        """No call may be submitted any more. Those that were are put into the stream first."""
        self._thread.shutdown()
        self._scratch.clear()

    def give_back(self, begin: cuda.Event, end: cuda.Event) -> None:
        """These have happened and serve again."""
        if self._origin is not None:
            self._seen.append((begin.seconds_since(self._origin), end.seconds_since(self._origin)))
        self._events.append((begin, end))

    def _enqueue(self, call: Any) -> tuple[cuda.Event, cuda.Event]:
        device = self.stream.cuda
        begin, end = self._events.pop() if self._events else (device.event(timed=True), device.event(timed=True))
        self.stream.record(begin)
        call.enqueue()
        self.stream.record(end)
        return begin, end


class _Enqueued(Event):
    """A call that is being put into a stream, or is there. `wait` says how long the device took."""

    def __init__(self, runner: CudaRunner, call: Any, future: Future[tuple[cuda.Event, cuda.Event]]) -> None:
        super().__init__(0.0)
        self._runner, self._call, self._future = runner, call, future
        self._waited = False
        self._error: BaseException | None = None

    def done(self) -> bool:
        if self._waited:
            return True
        if not self._future.done():
            return False
        try:
            return self._future.result()[1].done()
        except EngineError:
            return True  # `wait` raises it, where the request is that it belongs to

    def wait(self) -> float:
        if not self._waited:
            self._waited = True
            try:
                self._seconds = self._finish()
            except BaseException as error:
                self._error = error
        if self._error is not None:
            raise self._error
        return self._seconds

    def _finish(self) -> float:
        begin, end = self._future.result()
        end.wait()
        self._call.finish()
        seconds = end.seconds_since(begin)
        # Not before: the runner's thread may record them anew at once.
        self._runner.give_back(begin, end)
        return seconds
