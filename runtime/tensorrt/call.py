"""A call of a TensorRT engine on fixed arrays."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.cuda.device_array import DeviceArray
from runtime.cuda.device_call import DeviceCall, Layout
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


class TensorRTCall(DeviceCall):
    _engine: TensorRTEngine

    def __init__(self, engine: TensorRTEngine, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}  # of arrays of the device
        self._context: Context | None = None
        self._graph: CudaGraph | None = None
        self._own = False  # context and staging are this call's alone, and stay
        super().__init__(engine, inputs, outputs)

    def close(self) -> None:
        """Let go of memory, graph and contexts: it may not run any more."""
        self._drop_graph()
        self._layout = self._context = None

    def _alone(self) -> AbstractContextManager[Any]:
        return self._engine.lock

    def _enqueue(self) -> None:
        self._engine.forget_errors()
        super()._enqueue()

    def _finished(self) -> None:
        if not self._own and self._staging is not None:
            with self._engine.lock:
                self._engine.staging.give(self._staging)
            self._staging = None

    def _prepare(self) -> Layout:
        engine = self._engine
        self._drop_graph()
        shapes = self._shapes = {name: tuple(array.shape) for name, array in self._inputs.items()}
        missing = [name for name, tensor in engine.tensors.items() if tensor.is_input and name not in shapes]
        if missing:
            raise EngineError(f"a call of the TensorRT engine {engine.name} lacks {', '.join(missing)}")
        self._context = engine.context(engine.profile(shapes))
        self._context.set_shapes(shapes)
        layout = Layout.of(self._inputs, self._outputs)
        bound = {**self._inputs, **self._outputs}
        addresses = {name: array.address for name, array in bound.items() if isinstance(array, DeviceArray)}
        # What is written in place stands where it is read.
        addresses |= {f"present.{name[5:]}": address for name, address in addresses.items() if name.startswith("past.")}
        self._addresses = addresses
        placed = bound.keys() | addresses.keys()
        unbound = {name: self._bytes(self._context, name) for name in engine.output_names if name not in placed}
        discarded, size = laid_out(unbound, layout.fetched)
        self._layout = layout._replace(offsets={**layout.offsets, **discarded}, size=size)
        return self._layout

    def _launch(self, layout: Layout, staging: Staging) -> None:
        if self._graph is not None:
            self._graph.launch()
        elif self._wants_graph():
            self._capture(layout, staging)
        else:
            assert self._context is not None
            self._set(self._context, layout, staging)
            self._put_each(self._context, layout, staging)

    def _wants_graph(self) -> bool:
        engine = self._engine
        if not engine.captures or self._runs < RUNS_BEFORE_CAPTURE:
            return False
        # What TensorRT reads from the host's memory would stay what it was when it was captured.
        fixed = any(tensor.on_host for tensor in engine.tensors.values())
        return not fixed and engine.profile(self._shapes).name == CAPTURED_PROFILE

    def _capture(self, layout: Layout, staging: Staging) -> None:
        """Run it, and make it a graph for the next time. Its context is its own, as no other call may change it."""
        engine = self._engine
        context = engine.new_context(engine.profile(self._shapes))
        context.set_shapes(self._shapes)
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

    def _set(self, context: Context, layout: Layout, staging: Staging) -> None:
        tensors = self._engine.tensors
        context.set_shapes(self._shapes)
        context.set_addresses(self._addresses)
        context.set_addresses(
            {
                name: staging.host(offset) if tensors[name].on_host else staging.device.address + offset
                for name, offset in layout.offsets.items()
            }
        )

    @staticmethod
    def _put_each(context: Context, layout: Layout, staging: Staging) -> None:
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
            raise EngineError(
                f"the TensorRT engine {self._engine.name} has no {kind} {name}; run convert BUNDLE --build"
            )
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
