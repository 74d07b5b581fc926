"""A call of a TensorRT engine on fixed arrays."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from runtime.cuda.device_array import DeviceArray, moved
from runtime.cuda.driver import Stream
from runtime.cuda.graph import CudaGraph
from runtime.cuda.staging import ALIGNMENT, Staging, laid_out
from runtime.errors import EngineError
from runtime.tensorrt.context import Context

if TYPE_CHECKING:
    from runtime.tensorrt.engine import TensorRTEngine

logger = logging.getLogger(__name__)

# A call is captured as a CUDA graph when it comes again after so many runs: capturing costs as much as several.
RUNS_BEFORE_CAPTURE = 3
CAPTURED_PROFILE = "decode"


class _Layout(NamedTuple):
    """Where the arrays of the host stand in a staging: inputs from 0 to `sent`, outputs to `fetched`, then, to `size`,
    outputs that nobody asked for. `addresses` of arrays of the device; `streams` that these must be ready in."""

    shapes: dict[str, tuple[int, ...]]
    offsets: dict[str, int]
    addresses: dict[str, int]
    streams: tuple[Stream, ...]
    sent: int
    fetched: int
    size: int


class TensorRTCall:
    """Change the arrays in place, run, read the arrays. `enqueue` and `finish` are the two halves of `run`: nothing in
    between may touch the arrays."""

    def __init__(self, engine: TensorRTEngine, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        self._engine = engine
        self._inputs: dict[str, Any] = {}
        self._outputs: dict[str, Any] = {}
        self._layout: _Layout | None = None
        self._context: Context | None = None
        self._staging: Staging | None = None
        self._graph: CudaGraph | None = None
        self._runs = 0
        self._under_way = False
        self._own = False  # context and staging are this call's alone, and stay
        self.rebind(inputs, outputs)

    def rebind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Other arrays, of any shape, for these names; the others stay. EngineError for a name or type that the engine
        does not have."""
        for given, kept, is_input in ((inputs, self._inputs, True), (outputs, self._outputs, False)):
            for name, array in given.items():
                self._check(name, array, is_input)
                if moved(kept.get(name), array):
                    self._layout = None
                kept[name] = array

    def run(self) -> None:
        self.enqueue()
        self.finish()

    def enqueue(self) -> None:
        """Put the run into the engine's stream. Raises EngineError, CapacityError."""
        engine = self._engine
        with engine.lock:
            if engine.captures:
                self._enqueue()
            else:
                # Another lane may capture, and its stream be one that this call waits for.
                with engine.stream.cuda.undisturbed:
                    self._enqueue()

    def _enqueue(self) -> None:
        engine = self._engine
        engine.stream.cuda.make_current()
        engine.forget_errors()
        if self._layout is None:
            self._prepare()
        layout = self._layout
        assert layout is not None
        staging = self._staging = self._staging or engine.staging.take(layout.size)
        if self._under_way:
            # A run that failed: the device may still be reading what it was given.
            engine.stream.synchronize()
        self._under_way = True
        for name, array in self._inputs.items():
            if name in layout.offsets:
                staging.view(layout.offsets[name], array)[...] = array
        for stream in layout.streams:
            engine.stream.follow(stream)
        self._put(layout, staging)
        engine.stream.record(staging.event)
        self._runs += 1

    def finish(self) -> None:
        """Wait for it, and let the arrays of the host have what it gave."""
        staging, layout = self._staging, self._layout
        assert staging is not None
        assert layout is not None
        try:
            staging.event.wait()
            self._under_way = False
            for name, array in self._outputs.items():
                if name in layout.offsets:
                    array[...] = staging.view(layout.offsets[name], array)
        finally:
            if not self._own:
                with self._engine.lock:
                    self._engine.staging.give(staging)
                self._staging = None

    def close(self) -> None:
        """Let go of memory, graph and contexts: it may not run any more."""
        self._drop_graph()
        self._layout = self._context = None

    def _prepare(self) -> None:
        """Decide where everything stands."""
        engine = self._engine
        self._drop_graph()
        shapes = {name: tuple(array.shape) for name, array in self._inputs.items()}
        missing = [name for name, tensor in engine.tensors.items() if tensor.is_input and name not in shapes]
        if missing:
            raise EngineError(f"a call of the TensorRT engine {engine.name} lacks {', '.join(missing)}")
        self._context = engine.context(engine.profile(shapes))
        self._context.set_shapes(shapes)
        bound = {**self._inputs, **self._outputs}
        on_device = {name: array for name, array in bound.items() if isinstance(array, DeviceArray)}
        inputs, sent = laid_out({n: a.nbytes for n, a in self._inputs.items() if n not in on_device})
        outputs, fetched = laid_out({n: a.nbytes for n, a in self._outputs.items() if n not in on_device}, sent)
        addresses = {name: array.address for name, array in on_device.items()}
        # What is written in place stands where it is read.
        addresses |= {f"present.{name[5:]}": address for name, address in addresses.items() if name.startswith("past.")}
        placed = bound.keys() | addresses.keys()
        unbound = {name: self._bytes(self._context, name) for name in engine.output_names if name not in placed}
        discarded, size = laid_out(unbound, fetched)
        streams = {array.memory.stream for array in on_device.values()} - {engine.stream}
        self._layout = _Layout(
            shapes,
            {**inputs, **outputs, **discarded},
            addresses,
            tuple(streams),
            sent,
            fetched,
            size,
        )

    def _put(self, layout: _Layout, staging: Staging) -> None:
        if self._graph is not None:
            self._graph.launch()
        elif self._wants_graph(layout):
            self._capture(layout, staging)
        else:
            assert self._context is not None
            self._set(self._context, layout, staging)
            self._put_each(self._context, layout, staging)

    def _wants_graph(self, layout: _Layout) -> bool:
        engine = self._engine
        if not engine.captures or self._runs < RUNS_BEFORE_CAPTURE:
            return False
        # What TensorRT reads from the host's memory would stay what it was when it was captured.
        fixed = any(tensor.on_host for tensor in engine.tensors.values())
        return not fixed and engine.profile(layout.shapes).name == CAPTURED_PROFILE

    def _capture(self, layout: _Layout, staging: Staging) -> None:
        """Run it, and make it a graph for the next time. Its context is its own, as no other call may change it."""
        engine = self._engine
        context = engine.new_context(engine.profile(layout.shapes))
        context.set_shapes(layout.shapes)
        self._set(context, layout, staging)
        # TensorRT wants to have run once with these shapes before it is captured.
        self._put_each(context, layout, staging)
        try:
            with engine.stream.cuda.undisturbed:
                self._graph = CudaGraph(engine.stream, lambda: self._put_each(context, layout, staging))
        except EngineError as error:
            if engine.stream.cuda.lost:
                raise
            engine.captures = False
            logger.warning("calls of the TensorRT engine %s run one kernel at a time: %s", engine.name, error)
            return
        self._context, self._own = context, True

    def _set(self, context: Context, layout: _Layout, staging: Staging) -> None:
        tensors = self._engine.tensors
        context.set_shapes(layout.shapes)
        context.set_addresses(layout.addresses)
        context.set_addresses(
            {
                name: staging.host(offset) if tensors[name].on_host else staging.device.address + offset
                for name, offset in layout.offsets.items()
            }
        )

    @staticmethod
    def _put_each(context: Context, layout: _Layout, staging: Staging) -> None:
        staging.send(0, layout.sent)
        context.enqueue()
        staging.fetch(layout.sent, layout.fetched)

    def _drop_graph(self) -> None:
        if self._own and self._staging is not None:
            self._engine.staging.give(self._staging)
            self._staging = None
        self._graph, self._own, self._runs = None, False, 0

    def _bytes(self, context: Context, name: str) -> int:
        return int(np.prod(context.shape(name), dtype=np.int64)) * self._engine.tensors[name].dtype.itemsize

    def _check(self, name: str, array: Any, is_input: bool) -> None:
        tensor = self._engine.tensors.get(name)
        if tensor is None or tensor.is_input is not is_input:
            kind = "input" if is_input else "output"
            raise EngineError(f"the TensorRT engine {self._engine.name} has no {kind} {name}; run freeexport build")
        if array.dtype != tensor.dtype:
            raise EngineError(f"{name} is {array.dtype}, the TensorRT engine {self._engine.name} has {tensor.dtype}")
        if not isinstance(array, DeviceArray):
            if name.startswith(("past.", "present.")):
                raise EngineError(f"{name} is in the host's memory; a TensorRT engine writes its cache on the device")
        elif array.address % ALIGNMENT or not array.contiguous:
            raise EngineError(
                f"{name} stands at address {array.address}, and TensorRT wants multiples of {ALIGNMENT}; "
                "open the session with slots=1, or convert with another capacity"
            )

    def __del__(self) -> None:
        self.close()
