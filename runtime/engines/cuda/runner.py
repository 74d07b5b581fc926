"""Runs an engine with its KV cache in a stream, and the encoder of a model that has one.

The host blocks only when it waits for an event.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from runtime.engines.cuda.device_array import DeviceArray
from runtime.engines.cuda.driver import CudaEvent, CudaStream
from runtime.engines.kv_cache import KVCache
from runtime.engines.runner import Encoder, Event, Runner

# Events created in advance, because creating one could disturb the capture of another runner.
SPARE_EVENTS = 4
# Smallest width to which prompts are padded. Widths are powers of 2, so that bound calls and CUDA
# graphs can be reused.
MIN_WIDTH = 32


class CudaKVCache(KVCache):
    """KV cache on a device. `lengths` are on the host and passed with each call."""


class CallEvents(NamedTuple):
    """Events of one call.

    Attributes:
        ready: Recorded after the work that other streams do for the call.
        begin: Start of the call, timed.
        end: End of the call, timed.
    """

    ready: CudaEvent
    begin: CudaEvent
    end: CudaEvent


class CudaRunner(Runner):
    """Runs calls of an engine in a stream.

    One thread enqueues all calls. Enqueuing takes as long as launching hundreds of kernels, during
    which another runner can proceed, and ONNX Runtime ties captured CUDA graphs to a thread.

    Args:
        engine: Engine whose calls have `enqueue` and `finish` (see `DeviceCall`).
        cache: KV cache of the engine.
        stream: Stream of the calls.
        beside: The caller continues while a submitted call runs.
        heads: The engine has a head.
    """

    def __init__(
        self, engine: Any, cache: KVCache, stream: CudaStream, beside: bool, heads: bool = True
    ) -> None:
        super().__init__(engine, cache, heads)
        self.stream = stream
        self.beside = beside
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="runner")
        self._events = [self._new_events() for _ in range(SPARE_EVENTS)]
        self._scratch: dict[str, DeviceArray] = {}

    def padded(self, slot: int, rows: int, heads: int, max_rows: int) -> tuple[int, int]:
        """Return powers of two, or at most `max_rows`, so that few CUDA graphs serve all sizes.

        Without CUDA graphs, or room in the cache, sizes are not changed.
        """
        engine: Any = self.engine
        width = min(_power(rows), max_rows)
        fits = self.cache.length(slot) + width <= self.cache.rows
        if not engine.captures or not fits:
            return rows, heads
        return width, min(_power(heads), width)

    def submit(self, call: Any) -> Event:
        """Enqueue the call after the work that is in other streams now.

        It does not wait for work that they receive later, such as shallow steps during a deep pass.
        """
        events = self._events.pop() if self._events else self._new_events()
        try:
            for other in call.others:  # at most one, because a session has two streams
                other.record(events.ready)
            return _Enqueued(self, call, events, self._thread.submit(self._enqueue, call, events))
        except BaseException:
            self.give_back(events)
            raise

    def run(self, call: Any) -> float:
        return self.submit(call).wait()

    def value(self, array: Any) -> Any:
        return array

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        return self.stream.cuda.zeros(shape, dtype, self.stream)

    def scratch(self, name: str, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        """Return scratch memory, which is kept and only grows: allocating on a device is slow."""
        size = int(np.prod(shape))
        if name not in self._scratch or self._scratch[name].size < size:
            self._scratch[name] = self.zeros((size,), dtype)
        return self._scratch[name].reshaped(shape)

    def close(self) -> None:
        """Enqueue the submitted calls and stop. No call may be submitted after this."""
        self._thread.shutdown()
        self._scratch.clear()

    def seconds(self, events: CallEvents) -> float:
        """Return the device time of a finished call, in seconds."""
        return events.end.seconds_since(events.begin)

    def give_back(self, events: CallEvents) -> None:
        """Return events for reuse by the next call."""
        self._events.append(events)

    def _enqueue(self, call: Any, events: CallEvents) -> None:
        if call.others:
            self.stream.wait(events.ready)
        self.stream.record(events.begin)
        call.enqueue()
        self.stream.record(events.end)

    def _new_events(self) -> CallEvents:
        device = self.stream.cuda
        return CallEvents(device.event(), device.event(timed=True), device.event(timed=True))


def _power(count: int) -> int:
    """Return the next power of two, and 0 for 0."""
    return 1 << (count - 1).bit_length() if count else 0


class _Enqueued(Event):
    """A submitted call. `wait` returns its device time, in seconds."""

    def __init__(
        self, runner: CudaRunner, call: Any, events: CallEvents, future: Future[None]
    ) -> None:
        super().__init__(0.0)
        self._runner = runner
        self._call = call
        self._events = events
        self._future = future
        self._waited = False
        self._error: BaseException | None = None

    def done(self) -> bool:
        """Return True if `wait` would return or raise at once."""
        if self._waited:
            return True
        try:
            if not self._future.done():
                return False
            return self._future.exception() is not None or self._events.end.done()
        except Exception:
            return True

    def wait(self) -> float:
        if not self._waited:
            self._waited = True
            try:
                self._future.result()
                self._events.end.wait()
                self._call.finish()
                self._seconds = self._runner.seconds(self._events)
            except BaseException as error:
                self._error = error
            finally:
                self._runner.give_back(self._events)
        if self._error is not None:
            raise self._error
        return self._seconds


class CudaEncoder(Encoder):
    """Encoder and prologue on a device.

    Args:
        encoder: Encoder engine.
        prologue: Prologue engine.
        runner: Runner whose stream and thread they use.
        longest: Longest prompt, in tokens.
        hidden_size: d.
    """

    def __init__(
        self, encoder: Any, prologue: Any, runner: CudaRunner, longest: int, hidden_size: int
    ) -> None:
        super().__init__(encoder, prologue)
        self._runner = runner
        self._longest = longest
        self._hidden_size = hidden_size
        self._places: WeakKeyDictionary[Any, dict[int, _Place]] = WeakKeyDictionary()

    def run(self, tokens: np.ndarray, reader: object = None) -> dict[str, Any]:
        """Encode a prompt, int64 [n].

        Returns DeviceArrays `cross.{layer}.key|value` [1, heads, E, head_dim] with E >= n, and
        `cross_lengths` int32 [1] on the host. Calls with the same `reader` and E return the same
        arrays.
        """
        count = len(tokens)
        width = min(self._longest, max(MIN_WIDTH, 1 << (count - 1).bit_length()))
        places = self._places.setdefault(reader, {}) if reader is not None else {}
        place = places.get(width) or self._place(width)
        places[width] = place
        place.tokens[0, :count] = tokens
        place.tokens[0, count:] = 0
        place.cross["cross_lengths"][0] = count
        for call in place.calls:
            self._runner.run(call)
        return place.cross

    def _place(self, width: int) -> _Place:
        encoder = self._encoder
        prologue = self._prologue
        zeros = self._runner.zeros
        tokens = np.zeros((1, width), np.int64)
        lengths = np.zeros(1, np.int32)
        shapes = {
            name: (1, heads, width, size)
            for name, (_, heads, _, size) in prologue.output_shapes.items()
        }
        cross = {
            name: zeros(shape, prologue.dtype(name))  # type: ignore[attr-defined]
            for name, shape in shapes.items()
        }
        # Not scratch memory, which is replaced when it grows.
        dtype = encoder.dtype("hidden")  # type: ignore[attr-defined]
        hidden = zeros((1, width, self._hidden_size), dtype)
        reads = encoder.bind({"input_ids": tokens, "lengths": lengths}, {"hidden": hidden})
        projects = prologue.bind({"hidden": hidden}, cross)
        return _Place(tokens, {**cross, "cross_lengths": lengths}, [reads, projects])


class _Place(NamedTuple):
    """Inputs, outputs and bound calls for prompts of one width."""

    tokens: np.ndarray
    cross: dict[str, Any]
    calls: list[Any]
