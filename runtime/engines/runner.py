"""A lane: an engine, its KV cache, and where its calls run: at once, or in a thread beside the caller's.

On a GPU a lane is a stream: runtime/cuda/runner.py.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter
from typing import Any

import numpy as np

from runtime.engines.kv_cache import KVCache
from runtime.engines.onnx import Call, OnnxEngine, value


class Event:
    """A submitted call. Neither protocol nor abstract: to ask whether something is one, at every token, must cost
    nothing. This one is done."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def done(self) -> bool:
        return True

    def wait(self) -> float:
        """Until it is done: the seconds it took. Raises what it raised."""
        return self._seconds


class Runner:
    """`beside`: calls run in a thread of the lane's own, one after the other, and `submit` does not wait for them."""

    def __init__(self, engine: OnnxEngine, cache: KVCache, beside: bool = False) -> None:
        self.engine, self.cache = engine, cache
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lane") if beside else None

    @property
    def beside(self) -> bool:
        return self._thread is not None

    def submit(self, call: Call) -> Event:
        return Event(_timed(call)) if self._thread is None else _Submitted(self._thread.submit(_timed, call))

    def run(self, call: Call) -> float:
        """Submit a call and wait for it: the seconds it took."""
        if self._thread is not None:
            return self._thread.submit(_timed, call).result()
        began = perf_counter()
        call.run()
        return perf_counter() - began

    def run_here(self, call: Call) -> float:
        """Run a call in this thread, before those that were submitted and have not begun: the seconds it took."""
        return _timed(call)

    def value(self, array: Any) -> Any:
        """An array in the form that the engine binds at once: for those that are bound again and again."""
        return value(array)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """An array where the engine's calls want theirs."""
        return np.zeros(shape, dtype)

    def scratch(self, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        """The same, of finite numbers, until the next call for this name."""
        return np.zeros(shape, dtype)


class _Submitted(Event):
    def __init__(self, future: Future[float]) -> None:
        self._future = future

    def done(self) -> bool:
        return self._future.done()

    def wait(self) -> float:
        return self._future.result()


def _timed(call: Call) -> float:
    began = perf_counter()
    call.run()
    return perf_counter() - began
