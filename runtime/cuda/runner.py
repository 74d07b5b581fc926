"""A runner on a GPU: an engine, its KV cache, and a stream; and the encoder of a model that has one. Only a wait for an
event holds the host up."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from runtime.cuda import driver as cuda
from runtime.cuda.driver import DeviceArray
from runtime.engines.kv_cache import KVCache
from runtime.engines.runner import Encoder, Event, Runner

# Calls in flight that find their events ready made: creating one could disturb a capture of another runner.
SPARE_EVENTS = 4
# Prompts are padded to powers of 2 from here on, so that calls for their width, and CUDA graphs, are there already.
LEAST_WIDTH = 32


class CudaKVCache(KVCache):
    """`lengths` stay with the host; a call takes them along."""

    _spare: Any = None

    def gather(self, sources: np.ndarray) -> None:
        """Through spare memory: a device does not copy in place."""
        if (sources == np.arange(len(sources))).all():
            return
        length = int(self.lengths.max())
        if self._spare is None:
            self._spare = self._zeros(next(iter(self.arrays.values())).shape, self._dtype)
        spare = self._spare[:, :, :length]
        for array in self.arrays.values():
            kept = array[:, :, :length]
            spare.copy_from(kept)
            for slot, source in enumerate(sources):
                if slot != source:
                    kept[slot] = spare[int(source)]
        self.lengths[:] = self.lengths[sources]


class CallEvents(NamedTuple):
    """The events of one call. `ready`: what other streams write for it is done when it is submitted. `begin` and
    `end`, timed: the call itself, without waiting for `ready`."""

    ready: cuda.Event
    begin: cuda.Event
    end: cuda.Event


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
        self._events = [self._new_events() for _ in range(SPARE_EVENTS)]
        self._scratch: dict[str, DeviceArray] = {}
        self._origin: cuda.Event | None = None
        self._seen: list[tuple[float, float]] = []

    def submit(self, call: Any) -> Event:
        """Let the call run after what other streams have now: not after what they are given while it waits its turn
        in this runner's thread, such as shallow steps beside a deep pass."""
        events = self._events.pop() if self._events else self._new_events()
        try:
            for other in call.others:  # at most one, as a session has two streams
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
        """Kept, and as large as it ever was: memory of the device is not had at once."""
        size = int(np.prod(shape))
        if name not in self._scratch or self._scratch[name].size < size:
            self._scratch[name] = self.zeros((size,), dtype)
        return self._scratch[name].reshaped(shape)

    def watch(self, origin: cuda.Event) -> list[tuple[float, float]]:
        """Begin and end of the calls from now on, in seconds of the device since the timed event `origin`, each as it
        is waited for."""
        self._origin, self._seen = origin, []
        return self._seen

    def close(self) -> None:
        """No call may be submitted any more. Those that were are put into the stream first."""
        self._thread.shutdown()
        self._scratch.clear()

    def seconds(self, events: CallEvents) -> float:
        """Seconds that the device took for a call whose `end` has happened."""
        if self._origin is not None:
            self._seen.append((events.begin.seconds_since(self._origin), events.end.seconds_since(self._origin)))
        return events.end.seconds_since(events.begin)

    def give_back(self, events: CallEvents) -> None:
        """Let the next call have these: it may record them at once."""
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


class _Enqueued(Event):
    """A call that is being put into a stream, or is there. `wait` says how long the device took."""

    def __init__(self, runner: CudaRunner, call: Any, events: CallEvents, future: Future[None]) -> None:
        super().__init__(0.0)
        self._runner, self._call, self._events, self._future = runner, call, events, future
        self._waited = False
        self._error: BaseException | None = None

    def done(self) -> bool:
        """Whether `wait` returns, or raises, at once."""
        if self._waited:
            return True
        try:
            return self._future.done() and (self._future.exception() is not None or self._events.end.done())
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
    """`runner`: in whose stream and thread the engines run. `longest` prompt, in tokens; `hidden_size` is d."""

    def __init__(self, encoder: Any, prologue: Any, runner: CudaRunner, longest: int, hidden_size: int) -> None:
        super().__init__(encoder, prologue)
        self._runner, self._longest, self._hidden_size = runner, longest, hidden_size
        self._places: WeakKeyDictionary[Any, dict[int, _Place]] = WeakKeyDictionary()

    def run(self, tokens: np.ndarray, reader: object = None) -> dict[str, Any]:
        """Prompt int64 [n] -> DeviceArrays `cross.{layer}.key|value` [1, heads, E, head_dim], E at least n, and
        `cross_lengths` int32 [1] of the host. The same arrays for a `reader` and a width each time."""
        count = len(tokens)
        width = min(self._longest, max(LEAST_WIDTH, 1 << (count - 1).bit_length()))
        places = self._places.setdefault(reader, {}) if reader is not None else {}
        place = places.get(width) or self._place(width)
        places[width] = place
        place.tokens[0, :count], place.tokens[0, count:] = tokens, 0
        place.cross["cross_lengths"][0] = count
        for call in place.calls:
            self._runner.run(call)
        return place.cross

    def _place(self, width: int) -> _Place:
        encoder, prologue, zeros = self._encoder, self._prologue, self._runner.zeros
        tokens, lengths = np.zeros((1, width), np.int64), np.zeros(1, np.int32)
        shapes = {name: (1, heads, width, size) for name, (_, heads, _, size) in prologue.output_shapes.items()}
        cross = {name: zeros(shape, prologue.dtype(name)) for name, shape in shapes.items()}  # type: ignore[attr-defined]
        # Kept by this place: a scratch that grows is another one.
        hidden = zeros((1, width, self._hidden_size), encoder.dtype("hidden"))  # type: ignore[attr-defined]
        reads = encoder.bind({"input_ids": tokens, "lengths": lengths}, {"hidden": hidden})
        return _Place(tokens, {**cross, "cross_lengths": lengths}, [reads, prologue.bind({"hidden": hidden}, cross)])


class _Place(NamedTuple):
    """Inputs and outputs of a prompt of one width, and the bound calls between."""

    tokens: np.ndarray
    cross: dict[str, Any]
    calls: list[Any]
