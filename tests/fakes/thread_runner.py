"""Calls that run beside their caller on a CPU, as a stream of a GPU lets them: in a thread of the runner's own."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from runtime.engines.backend import Backend, Load
from runtime.engines.kv_cache import KVCache
from runtime.engines.runner import Event, Runner


class ThreadRunner(Runner):
    """Calls run one after the other, and `submit` does not wait for them."""

    def __init__(self, engine: Any, cache: KVCache) -> None:
        super().__init__(engine, cache)
        self.beside = True
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="beside")

    def submit(self, call: Any) -> Event:
        return _Submitted(self._thread.submit(super().run, call))

    def run(self, call: Any) -> float:
        return self.submit(call).wait()


class _Submitted(Event):
    def __init__(self, future: Future[float]) -> None:
        super().__init__(0.0)
        self._future = future

    def done(self) -> bool:
        return self._future.done()

    def wait(self) -> float:
        return self._future.result()


def runners_beside(backend: Backend, engine: Load) -> tuple[Runner, Runner]:
    """In place of `Backend.runners`: sessions on the CPU that overlap."""
    shallow = Runner(engine("shallow"), backend._cache(backend.manifest.shallow_caches))
    return shallow, ThreadRunner(engine("deep"), backend._cache(backend.manifest.deep_layers))
