"""Calls of an engine on a CUDA device, on fixed arrays: those of the host are copied through a staging."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any
from weakref import WeakSet

import numpy as np

from runtime.cuda.driver import DeviceArray, Stream

# TensorRT wants addresses that are multiples of this.
ALIGNMENT = 256
LEAST_STAGING = 1 << 14


class Staging:
    """Pinned memory of the host and device memory of the same layout, `size` bytes, and an event for a call's end."""

    def __init__(self, stream: Stream, size: int) -> None:
        self.stream, self.size = stream, size
        self.pinned = stream.cuda.pinned(size)
        self.device = stream.cuda.empty((size,), np.uint8, stream)
        self.event = stream.cuda.event()
        self.host = int(self.pinned.ctypes.data)

    def send(self, start: int, end: int) -> None:
        """Put a copy of these bytes to the device into the stream."""
        if end > start:
            self.stream.copy(self.device.address + start, self.host + start, end - start)

    def fetch(self, start: int, end: int) -> None:
        """Put a copy of these bytes from the device into the stream."""
        if end > start:
            self.stream.copy(self.host + start, self.device.address + start, end - start)

    def view(self, offset: int, like: np.ndarray) -> np.ndarray:
        """The part of the pinned memory that an array of the host is copied to and from."""
        view: np.ndarray = self.pinned[offset : offset + like.nbytes].view(like.dtype).reshape(like.shape)
        return view


class DeviceEngine:
    """Shared by engines on a device: the `name`, the `stream` that calls are put into, in order and always from the
    same thread, and unused stagings. `captures`: calls of one token a row that come again become CUDA graphs."""

    call: type[DeviceCall]

    def __init__(self, name: str, stream: Stream, captures: bool) -> None:
        self.name, self.stream, self.captures = name, stream, captures
        self.calls: WeakSet[DeviceCall] = WeakSet()
        self.stagings: list[Staging] = []

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> DeviceCall:
        """A call on fixed arrays."""
        return self.call(self, inputs, outputs)

    def take_staging(self, size: int) -> Staging:
        """The smallest unused one of `size` bytes or more. Pinned memory is freed only when the device is closed."""
        fitting = [staging for staging in self.stagings if staging.size >= size]
        if not fitting:
            return Staging(self.stream, max(LEAST_STAGING, 1 << (size - 1).bit_length()))
        chosen = min(fitting, key=lambda staging: staging.size)
        self.stagings.remove(chosen)
        return chosen

    def close(self) -> None:
        """Let go of everything, before the stream is gone. No call may run any more."""
        for call in list(self.calls):
            call.close()


class DeviceCall:
    """Change the arrays in place, run, read the arrays. `enqueue` and `finish` are the two halves of `run`: nothing in
    between may touch the arrays. Before `enqueue` the engine's stream must wait for the `others`, the streams whose
    arrays the call uses too.

    `inputs` and `outputs` are numpy arrays, copied to the device and back at every run, or DeviceArrays of this device,
    used where they are. In the staging, inputs stand from byte 0 to `_sent`, outputs from there to `_fetched`.
    """

    others: tuple[Stream, ...] = ()
    _staging: Staging | None = None  # None: arrays have changed
    _sent = _fetched = _runs = 0
    _under_way = False

    def __init__(self, engine: Any, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        self._engine = engine
        self._inputs: dict[str, Any] = {}
        self._outputs: dict[str, Any] = {}
        self._views: dict[str, np.ndarray] = {}
        self._offsets: dict[str, int] = {}
        self.rebind(inputs, outputs)
        engine.calls.add(self)

    def rebind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Other arrays, of any shape, for these names; the others stay. EngineError for what the engine does not
        take."""
        for given, kept, is_input in ((inputs, self._inputs, True), (outputs, self._outputs, False)):
            for name, array in given.items():
                self._check(name, array, is_input)
                old = kept.get(name)
                # That an array of the host stands elsewhere does not matter: it is copied.
                places = (getattr(each, "address", None) for each in (old, array))
                if old is None or old.shape != array.shape or len({*places}) > 1:
                    self.close()
                kept[name] = array
        arrays = [*self._inputs.values(), *self._outputs.values()]
        streams = {array.memory.stream for array in arrays if isinstance(array, DeviceArray)}
        self.others = tuple(streams - {self._engine.stream})

    def run(self) -> None:
        for other in self.others:
            self._engine.stream.follow(other)
        self.enqueue()
        self.finish()

    def enqueue(self) -> None:
        """Put the run into the engine's stream. Raises EngineError, DeviceError, CapacityError."""
        stream = self._engine.stream
        # Memory may be taken, which would disturb another call that is captured.
        with nullcontext() if self._engine.captures else stream.cuda.undisturbed:
            stream.cuda.make_current()
            staging = self._staging or self._lay_out()
            if self._under_way:
                # A run that failed: the device may still be reading what it was given.
                stream.synchronize()
            self._under_way = True
            for name, array in self._inputs.items():
                if name in self._views:
                    self._views[name][...] = array
            self._launch(staging)
            stream.record(staging.event)
            self._runs += 1

    def finish(self) -> None:
        """Wait for it, and let the arrays of the host have what it gave."""
        assert self._staging is not None
        if not self._staging.event.done():
            self._staging.event.wait()
        self._under_way = False
        for name, array in self._outputs.items():
            if name in self._views:
                array[...] = self._views[name]

    def close(self) -> None:
        """Let go of memory. What the device may still be copying into is not for other calls."""
        staging, self._staging = self._staging, None
        if staging is not None and not self._under_way:
            self._engine.stagings.append(staging)

    def _lay_out(self) -> Staging:
        """Give the arrays of the host places in a staging, and `_prepare` the engine for all arrays."""
        ins, outs = (
            {name: array.nbytes for name, array in arrays.items() if not isinstance(array, DeviceArray)}
            for arrays in (self._inputs, self._outputs)
        )
        ins, self._sent = laid_out(ins)
        outs, self._fetched = laid_out(outs, self._sent)
        self._offsets, self._runs = {**ins, **outs}, 0
        staging = self._engine.take_staging(self._fetched)
        bound = {**self._inputs, **self._outputs}
        self._views = {name: staging.view(offset, bound[name]) for name, offset in self._offsets.items()}
        try:
            self._prepare(staging)
        except BaseException:
            self._engine.stagings.append(staging)
            raise
        self._staging = staging
        return staging

    def _prepare(self, staging: Staging) -> None:
        """Make what the engine needs for these arrays."""

    def _launch(self, staging: Staging) -> None:
        """Put the copies and the engine's work into the stream."""

    def _check(self, name: str, array: Any, is_input: bool) -> None:
        """Raise EngineError for an array that the engine does not take."""

    def __del__(self) -> None:
        self.close()


def laid_out(sizes: Mapping[str, int], start: int = 0) -> tuple[dict[str, int], int]:
    """Offsets at which each of these many bytes begins, one after the other from `start` on, and where all end. Empty
    ones have a place of their own too."""
    offsets = {}
    for name, size in sizes.items():
        offsets[name] = start
        start += max(1, -(-size // ALIGNMENT)) * ALIGNMENT
    return offsets, start
