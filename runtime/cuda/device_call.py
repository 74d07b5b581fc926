"""A call of an engine on a CUDA device, on fixed arrays: those of the host are copied through a staging."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np

from runtime.cuda.device_array import DeviceArray, moved
from runtime.cuda.driver import Stream
from runtime.cuda.staging import Staging, laid_out


class Layout(NamedTuple):
    """Where the arrays of the host stand in a staging: inputs from byte 0 to `sent`, outputs to `fetched`, and what
    else an engine writes there to `size`."""

    offsets: dict[str, int]
    sent: int
    fetched: int
    size: int

    @classmethod
    def of(cls, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Layout:
        ins, sent = laid_out({name: array.nbytes for name, array in inputs.items() if _on_host(array)})
        outs, fetched = laid_out({name: array.nbytes for name, array in outputs.items() if _on_host(array)}, sent)
        return cls({**ins, **outs}, sent, fetched, fetched)


class DeviceCall:
    """Change the arrays in place, run, read the arrays. `enqueue` and `finish` are the two halves of `run`: nothing in
    between may touch the arrays. Before `enqueue` the engine's stream must wait for the `others`, the streams whose
    arrays the call uses too."""

    def __init__(self, engine: Any, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        self._engine = engine
        self._inputs: dict[str, Any] = {}
        self._outputs: dict[str, Any] = {}
        self.others: tuple[Stream, ...] = ()
        self._layout: Layout | None = None
        self._staging: Staging | None = None
        self._views: dict[str, np.ndarray] = {}
        self._runs = 0
        self._under_way = False
        self.rebind(inputs, outputs)

    def rebind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Other arrays, of any shape, for these names; the others stay. EngineError for what the engine does not
        take."""
        for given, kept, is_input in ((inputs, self._inputs, True), (outputs, self._outputs, False)):
            for name, array in given.items():
                self._check(name, array, is_input)
                if moved(kept.get(name), array):
                    self._layout = None
                kept[name] = array
        arrays = [*self._inputs.values(), *self._outputs.values()]
        streams = {array.memory.stream for array in arrays if not _on_host(array)}
        self.others = tuple(streams - {self._engine.stream})

    def run(self) -> None:
        for other in self.others:
            self._engine.stream.follow(other)
        self.enqueue()
        self.finish()

    def enqueue(self) -> None:
        """Put the run into the engine's stream. Raises EngineError, DeviceError, CapacityError."""
        engine = self._engine
        # Memory may be taken, which would disturb another call that is captured.
        with self._alone(), nullcontext() if engine.captures else engine.stream.cuda.undisturbed:
            self._enqueue()

    def finish(self) -> None:
        """Wait for it, and let the arrays of the host have what it gave."""
        assert self._staging is not None
        try:
            if not self._staging.event.done():
                self._staging.event.wait()
            self._under_way = False
            for name, array in self._outputs.items():
                if name in self._views:
                    array[...] = self._views[name]
        finally:
            self._finished()

    def _enqueue(self) -> None:
        stream = self._engine.stream
        stream.cuda.make_current()
        layout = self._layout or self._prepare()
        staging = self._staging or self._take(layout)
        if self._under_way:
            # A run that failed: the device may still be reading what it was given.
            stream.synchronize()
        self._under_way = True
        for name, array in self._inputs.items():
            if name in self._views:
                self._views[name][...] = array
        self._launch(layout, staging)
        stream.record(staging.event)
        self._runs += 1

    def _take(self, layout: Layout) -> Staging:
        bound = {**self._inputs, **self._outputs}
        staging = self._staging = self._engine.staging.take(layout.size)
        self._views = {
            name: staging.view(offset, bound[name]) for name, offset in layout.offsets.items() if name in bound
        }
        return staging

    def close(self) -> None:
        """Let go of memory: it may not run any more."""
        raise NotImplementedError

    def _prepare(self) -> Layout:
        """Set the layout for the arrays of now."""
        raise NotImplementedError

    def _launch(self, layout: Layout, staging: Staging) -> None:
        """Put the copies and the engine's work into the stream."""
        raise NotImplementedError

    def _check(self, name: str, array: Any, is_input: bool) -> None:
        """Raise EngineError for an array that the engine does not take."""

    def _finished(self) -> None:
        """After a run, and after one that failed."""

    def _alone(self) -> AbstractContextManager[Any]:
        """Held while a run is put into the stream."""
        return nullcontext()

    def __del__(self) -> None:
        self.close()


def _on_host(array: Any) -> bool:
    return not isinstance(array, DeviceArray)
