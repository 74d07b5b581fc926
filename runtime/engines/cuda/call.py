"""Calls of an engine on a CUDA device, with fixed arrays.

Host arrays are copied through pinned staging memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import numpy as np

from runtime.engines.cuda.device_array import DeviceArray
from runtime.engines.cuda.driver import CudaStream

# Alignment of addresses, in bytes, which TensorRT requires.
ALIGNMENT = 256
MIN_STAGING = 1 << 14


class Staging:
    """Pinned host memory and device memory with the same layout, and an event for the end of a
    call.

    Args:
        stream: Stream for the copies.
        size: Bytes of each memory.
    """

    def __init__(self, stream: CudaStream, size: int) -> None:
        self.stream = stream
        self.size = size
        self.pinned = stream.cuda.pinned(size)
        self.device = stream.cuda.empty((size,), np.uint8, stream)
        self.event = stream.cuda.event()
        self.host = int(self.pinned.ctypes.data)

    def send(self, start: int, end: int) -> None:
        """Enqueue a copy of bytes `start` to `end` to the device."""
        if end > start:
            self.stream.copy(self.device.address + start, self.host + start, end - start)

    def fetch(self, start: int, end: int) -> None:
        """Enqueue a copy of bytes `start` to `end` from the device."""
        if end > start:
            self.stream.copy(self.host + start, self.device.address + start, end - start)

    def view(self, offset: int, like: np.ndarray) -> np.ndarray:
        """Return the pinned memory at `offset` as an array with the shape and type of `like`."""
        view: np.ndarray = (
            self.pinned[offset : offset + like.nbytes].view(like.dtype).reshape(like.shape)
        )
        return view


class DeviceEngine:
    """Base of engines on a device.

    Args:
        name: Name of the engine.
        stream: Stream that all calls are enqueued into, in order and from one thread.
        captures: Capture repeated calls as CUDA graphs.
    """

    call: type[DeviceCall]
    shares_prompts = False  # see `OnnxEngine`

    def __init__(self, name: str, stream: CudaStream, captures: bool) -> None:
        self.name = name
        self.stream = stream
        self.captures = captures
        self.calls: WeakSet[DeviceCall] = WeakSet()
        self.stagings: list[Staging] = []

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> DeviceCall:
        """Return a call on fixed arrays."""
        return self.call(self, inputs, outputs)

    def take_staging(self, size: int) -> Staging:
        """Return the smallest unused staging of at least `size` bytes, or a new one.

        Pinned memory is freed only when the device is closed.
        """
        fitting = [staging for staging in self.stagings if staging.size >= size]
        if not fitting:
            return Staging(self.stream, max(MIN_STAGING, 1 << (size - 1).bit_length()))
        chosen = min(fitting, key=lambda staging: staging.size)
        self.stagings.remove(chosen)
        return chosen

    def close(self) -> None:
        """Release all memory. Call it before the stream is destroyed, with no call running."""
        for call in list(self.calls):
            call.close()


class DeviceCall:
    """A call on fixed arrays: change the inputs in place, run, read the outputs.

    `run` is `enqueue` followed by `finish`. In between, the arrays must not be touched. Before
    `enqueue`, the engine's stream must wait for the streams in `others`, which also use the call's
    device arrays.

    Args:
        engine: A DeviceEngine.
        inputs: numpy arrays, copied to the device at every run, or DeviceArrays, used in place.
        outputs: numpy arrays, copied from the device at every run, or DeviceArrays, written in
            place.
    """

    others: tuple[CudaStream, ...] = ()
    _staging: Staging | None = None  # None after arrays have changed
    _sent = 0  # end of the inputs in the staging
    _fetched = 0  # end of the outputs, which follow
    _runs = 0
    _running = False

    def __init__(self, engine: Any, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        self._engine = engine
        self._inputs: dict[str, Any] = {}
        self._outputs: dict[str, Any] = {}
        self._views: dict[str, np.ndarray] = {}
        self._offsets: dict[str, int] = {}
        self.rebind(inputs, outputs)
        engine.calls.add(self)

    def rebind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Replace arrays, by name. New arrays may have other shapes. The others stay bound.

        Raises:
            EngineError: If the engine does not accept an array.
        """
        for name, array in inputs.items():
            self._check(name, array, is_input=True)
            self._replace(self._inputs, name, array)
        for name, array in outputs.items():
            self._check(name, array, is_input=False)
            self._replace(self._outputs, name, array)
        arrays = [*self._inputs.values(), *self._outputs.values()]
        streams: set[Any] = {
            array.memory.stream for array in arrays if isinstance(array, DeviceArray)
        }
        self.others = tuple(streams - {self._engine.stream})

    def _replace(self, bound: dict[str, Any], name: str, array: Any) -> None:
        old = bound.get(name)
        # Host arrays have no address: they are copied, so they may move.
        moved = getattr(old, "address", None) != getattr(array, "address", None)
        if old is None or old.shape != array.shape or moved:
            self.close()
        bound[name] = array

    def run(self) -> None:
        for other in self.others:
            self._engine.stream.follow(other)
        self.enqueue()
        self.finish()

    def enqueue(self) -> None:
        """Enqueue the run into the engine's stream.

        Raises:
            EngineError: If the engine cannot run.
            DeviceError: If the device was lost.
            CapacityError: If the device has too little memory.
        """
        stream = self._engine.stream
        stream.cuda.make_current()
        staging = self._staging or self._lay_out()
        if self._running:
            # The last run failed, and the device may still be reading its inputs.
            stream.synchronize()
        self._running = True
        for name, array in self._inputs.items():
            if name in self._views:
                self._views[name][...] = array
        self._launch(staging)
        stream.record(staging.event)
        self._runs += 1

    def finish(self) -> None:
        """Wait for the run and copy results into the host arrays."""
        assert self._staging is not None
        if not self._staging.event.done():
            self._staging.event.wait()
        self._running = False
        for name, array in self._outputs.items():
            if name in self._views:
                array[...] = self._views[name]

    def close(self) -> None:
        """Release memory. A staging that the device may still use is not reused."""
        staging = self._staging
        self._staging = None
        if staging is not None and not self._running:
            self._engine.stagings.append(staging)

    def _lay_out(self) -> Staging:
        """Assign staging memory to the host arrays and prepare the engine for all arrays."""
        inputs, self._sent = laid_out(_host_sizes(self._inputs))
        outputs, self._fetched = laid_out(_host_sizes(self._outputs), self._sent)
        self._offsets = {**inputs, **outputs}
        self._runs = 0
        staging = self._engine.take_staging(self._fetched)
        bound = {**self._inputs, **self._outputs}
        self._views = {
            name: staging.view(offset, bound[name]) for name, offset in self._offsets.items()
        }
        try:
            self._prepare(staging)
        except BaseException:
            self._engine.stagings.append(staging)
            raise
        self._staging = staging
        return staging

    def _prepare(self, staging: Staging) -> None:
        """Prepare the engine for the arrays."""

    def _launch(self, staging: Staging) -> None:
        """Enqueue copies and the engine's work."""

    def _check(self, name: str, array: Any, is_input: bool) -> None:
        """Raise EngineError for an array that the engine does not accept."""

    def __del__(self) -> None:
        self.close()


def _host_sizes(arrays: Mapping[str, Any]) -> dict[str, int]:
    """Return the sizes of the host arrays, in bytes."""
    host = {name: array for name, array in arrays.items() if not isinstance(array, DeviceArray)}
    return {name: array.nbytes for name, array in host.items()}


def laid_out(sizes: Mapping[str, int], start: int = 0) -> tuple[dict[str, int], int]:
    """Lay out arrays of the given sizes in bytes, one after the other from `start`.

    Returns the offset of each array and the end. Empty arrays get an offset of their own.
    """
    offsets = {}
    for name, size in sizes.items():
        offsets[name] = start
        start += max(1, -(-size // ALIGNMENT)) * ALIGNMENT
    return offsets, start
