"""A call of an engine on ONNX Runtime's CUDA provider, on fixed arrays."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from runtime.cuda.device_array import DeviceArray, moved
from runtime.cuda.driver import Stream
from runtime.cuda.staging import Staging, laid_out
from runtime.errors import EngineError

if TYPE_CHECKING:
    from runtime.cuda.engine import CudaEngine

logger = logging.getLogger(__name__)

# A call becomes a CUDA graph when it comes again after so many runs: capturing costs as much as several.
RUNS_BEFORE_CAPTURE = 2
# Graphs that an engine keeps: ONNX Runtime has no way to give one up.
MOST_GRAPHS = 256


class _Bound(NamedTuple):
    """What a call's arrays became: an IO binding; views of the pinned memory for arrays of the host, inputs from byte 0
    to `sent`, outputs from there to `fetched`; and the other streams that the arrays belong to."""

    binding: Any
    views: dict[str, np.ndarray]
    sent: int
    fetched: int
    streams: tuple[Stream, ...]


class CudaCall:
    """Change the arrays in place, run, read the arrays. `enqueue` and `finish` are the two halves of `run`: nothing in
    between may touch the arrays."""

    def __init__(self, engine: CudaEngine, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        self._engine = engine
        self._inputs: dict[str, Any] = {}
        self._outputs: dict[str, Any] = {}
        self._bound: _Bound | None = None
        self._staging: Staging | None = None
        self._options: Any = None
        self._runs = self._graph = 0
        self._under_way = False
        self.rebind(inputs, outputs)

    def rebind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Other arrays, of any shape, for these names; the others stay."""
        for given, kept in ((inputs, self._inputs), (outputs, self._outputs)):
            for name, array in given.items():
                if moved(kept.get(name), array):
                    self._bound = None
                kept[name] = array

    def run(self) -> None:
        self.enqueue()
        self.finish()

    def enqueue(self) -> None:
        """Put the run into the engine's stream. Raises EngineError, DeviceError, CapacityError."""
        engine = self._engine
        if engine.captures:
            self._enqueue()
        else:
            # Memory may be taken, which would disturb another lane that captures.
            with engine.stream.cuda.undisturbed:
                self._enqueue()

    def _enqueue(self) -> None:
        engine = self._engine
        stream = engine.stream
        stream.cuda.make_current()
        bound = self._bound or self._bind()
        staging = self._staging
        assert staging is not None
        if self._under_way:
            # A run that failed: the device may still be reading what it was given.
            stream.synchronize()
        for name, array in self._inputs.items():
            if name in bound.views:
                bound.views[name][...] = array
        for other in bound.streams:
            stream.follow(other)
        self._under_way = True
        staging.send(0, bound.sent)
        self._run(bound)
        staging.fetch(bound.sent, bound.fetched)
        stream.record(staging.event)
        self._runs += 1

    def finish(self) -> None:
        """Wait for it, and let the arrays of the host have what it gave."""
        assert self._staging is not None
        assert self._bound is not None
        if not self._staging.event.done():
            self._staging.event.wait()
        self._under_way = False
        for name, array in self._outputs.items():
            if name in self._bound.views:
                array[...] = self._bound.views[name]

    def close(self) -> None:
        """Let go of the session and of memory: it may not run any more."""
        staging, self._bound, self._staging = self._staging, None, None
        # What the device may still be copying into is not for others.
        if staging is not None and not self._under_way:
            self._engine.staging.give(staging)

    def _run(self, bound: _Bound) -> None:
        engine = self._engine
        captures = self._wants_graph()
        if captures:
            self._graph, engine.graphs_left = next(engine.graphs), engine.graphs_left - 1
            self._options = engine.run_options(self._graph)
        try:
            with engine.stream.cuda.undisturbed if captures else nullcontext():
                engine.session.run_with_iobinding(bound.binding, self._options)
        except Exception as error:
            self._failed(error, captures)
            engine.session.run_with_iobinding(bound.binding, self._options)

    def _wants_graph(self) -> bool:
        tokens = self._inputs.get("input_ids")
        repeats = self._runs >= RUNS_BEFORE_CAPTURE and self._graph == 0 and self._engine.graphs_left > 0
        return self._engine.captures and repeats and tokens is not None and tokens.shape[1] == 1

    def _failed(self, error: Exception, captures: bool) -> None:
        """Raise why a run failed; return where it was the capture alone, after which it can run without."""
        engine = self._engine
        text = next(iter(str(error).splitlines()), type(error).__name__)[:300]
        # A lost device says so at the next call.
        engine.stream.record(engine.stream.cuda.event())
        if not captures:
            raise EngineError(f"{engine.name} failed on device {engine.stream.cuda}: {text}") from error
        logger.warning("steps of %s run one kernel at a time, as no CUDA graph can be captured: %s", engine.name, text)
        engine.graphs_left, self._graph = 0, 0
        self._options = engine.run_options(0)

    def _bind(self) -> _Bound:
        engine = self._engine
        self.close()
        bound = {**self._inputs, **self._outputs}
        hosted = {name: array for name, array in bound.items() if not isinstance(array, DeviceArray)}
        ins, sent = laid_out({name: array.nbytes for name, array in hosted.items() if name in self._inputs})
        outs, fetched = laid_out({name: array.nbytes for name, array in hosted.items() if name in self._outputs}, sent)
        staging = self._staging = engine.staging.take(fetched)
        offsets = {**ins, **outs}
        binding = engine.session.io_binding()
        for name, array in bound.items():
            place = staging.device.address + offsets[name] if name in hosted else array.address
            put = binding.bind_input if name in self._inputs else binding.bind_output
            put(name, "cuda", engine.stream.cuda.index, engine.element_type(name), list(array.shape), place)
        views = {name: staging.view(offsets[name], array) for name, array in hosted.items()}
        streams = {array.memory.stream for array in bound.values() if isinstance(array, DeviceArray)}
        self._options, self._graph, self._runs = engine.run_options(0), 0, 0
        self._bound = _Bound(binding, views, sent, fetched, tuple(streams - {engine.stream}))
        return self._bound

    def __del__(self) -> None:
        self.close()
